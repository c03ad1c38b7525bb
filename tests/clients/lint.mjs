// Says what redocly's and spectral's default rules find in an OpenAPI document; an error makes the exit status 1.
import { readFileSync } from "node:fs";

import { createConfig, lintFromString } from "@redocly/openapi-core";
import spectralCore from "@stoplight/spectral-core";
import spectralRulesets from "@stoplight/spectral-rulesets";

const SEVERITIES = ["error", "warn", "info", "hint"];
const [document] = process.argv.slice(2);
const source = readFileSync(document, "utf8");

async function redocly() {
  const config = await createConfig({ extends: ["recommended"] });
  const found = await lintFromString({ source, absoluteRef: document, config });
  return found.map(({ severity, ruleId, message, location }) => ({
    severity,
    text: `redocly ${ruleId} at ${location[0]?.pointer ?? "#"}: ${message}`,
  }));
}

async function spectral() {
  const linter = new spectralCore.Spectral();
  linter.setRuleset({ extends: [spectralRulesets.oas] });
  const found = await linter.run(source);
  return found.map(({ severity, code, message, path }) => ({
    severity: SEVERITIES[severity],
    text: `spectral ${code} at ${path.join(" ")}: ${message}`,
  }));
}

for (const { severity, text } of [...(await redocly()), ...(await spectral())]) {
  console.log(`${severity}: ${text}`);
  if (severity === "error") process.exitCode = 1;
}
