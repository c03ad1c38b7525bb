"""The real Prometheus for tests: it scrapes a service by the files in deploy/, only more often."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from auditing import wait_until
from proxying import program, running
from serving import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[1]
DEPLOYED = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "expediter.json"
#: What stands in an expression of Grafana's for the span of a rate.
INTERVAL = "$__rate_interval"

_COMPARED = re.compile(r" (==|>) ([\d.]+)$")


def promtool(*words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool in the folder of the rules."""
    return subprocess.run(
        [program("promtool", "prometheus"), *words],
        cwd=DEPLOYED,
        input=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


class Rule(NamedTuple):
    """One rule, and how it is with Prometheus."""

    name: str
    query: str
    health: str
    error: str


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx2.Client(base_url=url, timeout=PATIENCE_SECONDS)

    def close(self) -> None:
        self._client.close()

    def _data(self, path: str, **query: str) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=query).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, query: str) -> dict[str, float]:
        """Return what an expression gives now: numbers by their labels."""
        found = self._data("query", query=query)["result"]
        return {json.dumps(each["metric"], sort_keys=True): float(each["value"][1]) for each in found}

    def targets(self) -> dict[str, str]:
        """Return the health of each target, and what it was lost by."""
        found = self._data("targets")["activeTargets"]
        return {each["scrapeUrl"]: each["lastError"] or each["health"] for each in found}

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {
            each["labels"]["alertname"] for each in self._data("alerts")["alerts"] if each["state"] == "firing"
        }

    def rules(self) -> list[Rule]:
        """Return every rule."""
        return [
            Rule(each["name"], each["query"], each["health"], each.get("lastError", ""))
            for group in self._data("rules")["groups"]
            for each in group["rules"]
        ]

    def until_firing(self, name: str, *, seconds: float = PATIENCE_SECONDS) -> None:
        """Return once an alert fires."""
        wait_until(lambda: name in self.firing(), seconds)


def always(query: str) -> str:
    """Return the query of an alert with a number in place of silence: 1 where it would fire, else 0."""
    return _COMPARED.sub(r" \1 bool \2", query)


def panels() -> list[tuple[str, str]]:
    """Return the title and the expression of all that the dashboard asks for."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [
        (panel["title"], target["expr"].replace(INTERVAL, "1m"))
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


def faster(folder: Path, *targets: str, alerts: bool = True) -> Path:
    """Write the files of deploy/ into `folder`, with these targets and short times; return the configuration.

    Without `alerts` the times of these stay as they are.
    """
    for name in ("recording.yml", "alerts.yml"):
        text = (DEPLOYED / name).read_text(encoding="utf-8")
        if alerts:
            text = re.sub(r"for: \d+[ms]$", "for: 0s", text, flags=re.M)
            text = text.replace("oldest_age_seconds:unheld > 60", "oldest_age_seconds:unheld > 1")
        (folder / name).write_text(text, encoding="utf-8")
    text = (DEPLOYED / "prometheus.yml").read_text(encoding="utf-8")
    # No shorter: a scrape may take two seconds, and Prometheus gives none more time than lies between two.
    text = text.replace("scrape_interval: 15s", "scrape_interval: 2s")
    text = text.replace("evaluation_interval: 15s", "evaluation_interval: 500ms")
    text = text.replace('["127.0.0.1:8000"]', json.dumps(list(targets)))
    configuration = folder / "prometheus.yml"
    configuration.write_text(text, encoding="utf-8")
    return configuration


@contextmanager
def prometheus(folder: Path, configuration: Path, port: int) -> Iterator[Prometheus]:
    """Run Prometheus on a port of this machine alone, its data in `folder`."""
    command = [
        program("prometheus", "prometheus"),
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    with running(command, folder, port) as url:
        found = Prometheus(url)
        try:
            yield found
        finally:
            found.close()
