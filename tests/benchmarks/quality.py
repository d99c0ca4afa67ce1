# SPDX-License-Identifier: Apache-2.0
"""Quality beside speed: what the closed-world study found for each share of adapted layers.

    python recipes/closed-world/study.py --out runs/study --part lora
    python tests/benchmarks/quality.py runs/study/lora.json --page docs/benchmarks.md

Means over seeds; the interval is Student's t over the seeds' own means. The same number of episodes
for every row. Speed is in the other tables: runs of the study share the machine with other work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report

from lora_rlhf.estimates import mean_interval

NAMES = {
    "ppo": "1", "fraction-1": "1", "fraction-1-2": "1/2", "fraction-1-4": "1/4",
    "rank-1": "1, r=1", "rank-4": "1, r=4",
}  # fmt: skip
"""Name in the study -> top fraction; the recipe's own run is the whole of the layers."""

SHOWN = {"gold_reward_minus_sft": "gold reward above SFT", "gold_reward": "gold reward",
         "win_rate": "win rate against SFT", "kl": "KL, nats"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and put it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--page", type=Path, help="put the table between the page's markers")
    options = parser.parse_args(argv)
    text = markdown(json.loads(options.json.read_text())["rows"])
    print(text)
    if options.page:
        report.into_page(options.page, "quality", text)


def markdown(rows: list[dict[str, Any]]) -> str:
    """One row for each share of the layers and each rank."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        clear = sum(row["win_rate"]["low"] > 0.5 for row in mine)
        lines.append(
            [
                NAMES.get(name, name),
                str(len(mine)),
                *(_mean(mine, key) for key in SHOWN),
                f"{clear} of {len(mine)}",
            ]
        )
    heads = ["top fraction", "seeds", *SHOWN.values(), "win rate clearly above 50 %"]
    return report.table(heads, lines)


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    found = mean_interval([row[key]["value"] for row in rows])
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**found)


if __name__ == "__main__":
    main()
