# SPDX-License-Identifier: Apache-2.0
"""Draw docs/images/demo.png from a finished demo: `python docs/make_picture.py runs/demo`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from lora_rlhf.runs.record import Record

SHOWN = {
    "win_rate": "win rate\nagainst SFT",
    "success": "task\nsuccess",
    "constraint": "constraints\nfollowed",
    "hallucination": "hallucination\n(lower is better)",
    "missed_abstention": "invented instead of\n“not stated” (lower is better)",
}
MODELS = {"base": ("base", "#b8bcc4"), "sft": ("SFT", "#6c8ebf"), "policy": ("PPO", "#c8553d")}


def main() -> None:
    record = Record.read(sys.argv[1])
    figure, axes = pyplot.subplots(figsize=(8.2, 2.9), dpi=130)
    for place, (model, (name, color)) in enumerate(MODELS.items()):
        metrics = record.data["evaluation"][model]
        half = {"value": 0.5, "low": 0.5, "high": 0.5}  # SFT against itself
        known = [metrics.get(key) or half for key in SHOWN]
        values = [one["value"] for one in known]
        below = [one["value"] - one["low"] for one in known]
        above = [one["high"] - one["value"] for one in known]
        x = [i + 0.27 * (place - 1) for i in range(len(SHOWN))]
        axes.bar(x, values, 0.25, color=color, label=name)
        axes.errorbar(x, values, [below, above], fmt="none", ecolor="#333", lw=1, capsize=2)
    axes.set_xticks(range(len(SHOWN)), SHOWN.values(), fontsize=8)
    axes.set_ylim(0, 1)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "images" / "demo.png")


if __name__ == "__main__":
    main()
