"""Draw the ratios of bench/results/latest.json against their targets.

.venv-bench/bin/python bench/plot.py bench/results/latest.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "expediter"
from matplotlib import pyplot as plot  # noqa: E402


def main() -> None:
    path = Path(sys.argv[1])
    lines = [line for line in json.loads(path.read_text()) if line["holds"] is not None]
    # One is the target; how far a figure is beyond it is the same to the right wherever smaller is better.
    names, reached = [], []
    for line in lines:
        larger = line["bound"] == "≥"
        share = line["ratio"] / line["target"] if larger else line["target"] / max(line["ratio"], 0.01)
        names.append(f"{line['row']}  {line['name']}" + (f" / {line['baseline']}" if line["baseline"] else ""))
        reached.append(min(share, 10.0))
    figure, axes = plot.subplots(figsize=(11, 0.32 * len(lines) + 1.2))
    colours = ["#2a7f5f" if line["holds"] else "#c0573b" for line in lines]
    axes.barh(range(len(lines)), reached, color=colours)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(lines)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.2, 10)
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "target", "2 x", "4 x", "8 x and more"])
    axes.set_xlabel("measured, as a multiple of the target")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


main()
