# SPDX-License-Identifier: Apache-2.0
"""Does PPO learn? The closed-world recipe on five seeds, as docs/learning.md reports it.

    python recipes/closed-world/five_seeds.py --reward gold --out runs/seeds-gold
    python recipes/closed-world/five_seeds.py --reward model --out runs/seeds-model

A seed changes everything that draws: records, demonstrations, labelers, samples, LoRA. Finished
runs in --out are kept, so the command can be stopped and given again.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lora_rlhf
from lora_rlhf import shell, tiny

SETS = {
    "gold": ["ppo.reward=gold", "data.comparisons=[]", "ppo.updates=24"],
    "model": [],
}
METRICS = ("gold_reward", "gold_reward_minus_sft", "win_rate", "kl", "length")


def one(reward: str, seed: int, out: Path, more: list[str]) -> dict[str, Any]:
    """The evaluation of one run, and its reward model's accuracy."""
    sets = [*SETS[reward], f"seed={seed}", "threads=1", *more]
    record = lora_rlhf.run(lora_rlhf.load_recipe(tiny.recipe(), sets), out / f"seed-{seed}")
    found = record.data["evaluation"]
    row = {"seed": seed, "sft": found["sft"]["gold_reward"]}
    row |= {name: found["policy"][name] for name in METRICS}
    row["accuracy"] = record.data["stages"].get("reward", {}).get("accuracy")
    row["seconds"] = sum(s["seconds"] for s in record.data["clock"]["stages"].values())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reward", choices=SETS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], dest="more", help="key=value")
    args = parser.parse_args()
    shell.quieten()
    rows = []
    for seed in range(args.seeds):
        rows.append(one(args.reward, seed, args.out, args.more))
        (args.out / "seeds.json").write_text(json.dumps(rows, indent=1) + "\n")
        show = {k: rows[-1][k] for k in METRICS if rows[-1][k]}
        print(
            seed, {k: [round(v[x], 3) for x in ("value", "low", "high")] for k, v in show.items()}
        )
    better = sum(row["gold_reward_minus_sft"]["low"] > 0 for row in rows)
    wins = sum(row["win_rate"]["low"] > 0.5 for row in rows)
    print(f"gold reward above SFT on {better} of {len(rows)} seeds, win rate above 50 % on {wins}")


if __name__ == "__main__":
    main()
