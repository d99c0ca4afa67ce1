# SPDX-License-Identifier: Apache-2.0
"""Makes ppo.json: PPO's numbers by TRL 1.12, the last release with a PPOTrainer.

    pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 peft==0.21.2
    python tests/golden/make_ppo_golden.py

TRL computes them inside `PPOTrainer.train`, so its own lines are cut out of its source and run.
Every row is run alone and unpadded for the advantages: TRL's place for the score differs on padded
rows (one past the last token, where it has a value of its own).
"""

import importlib.metadata
import inspect
import json
import os
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from trl.experimental.ppo import ppo_trainer

LENGTHS = (7, 1, 4, 6)
PACKAGES = ("torch", "trl", "transformers", "peft")
SETTINGS = {"gamma": 0.97, "lam": 0.9, "kl_coef": 0.07, "cliprange": 0.2, "cliprange_value": 0.2}


def lines(first, last):
    """TRL's lines from the one that starts with `first` to the one that starts with `last`."""
    source = inspect.getsource(ppo_trainer.PPOTrainer.train).splitlines()
    start = next(i for i, line in enumerate(source) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(source[start:]) if line.strip().startswith(last)) + start
    return textwrap.dedent("\n".join(source[start : end + 1]))


def run(code, **names):
    space = {"torch": torch, "masked_mean": ppo_trainer.masked_mean, **names}
    exec(code, space)
    return space


def main():
    torch.manual_seed(0)
    rows, width = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(width).expand(rows, -1) < torch.tensor(LENGTHS).unsqueeze(1)

    def draw(scale=1.0, shift=0.0):
        return ((torch.randn(rows, width) * scale + shift) * 1e3).round() / 1e3

    old, values, scores = draw(0.5, -2), draw(), draw()[:, 0]
    reference, new, new_values = old + draw(0.2), old + draw(0.3), values + draw(0.4)
    args = SimpleNamespace(**SETTINGS, kl_estimator="k1", whiten_rewards=False)
    rewards, advantages, returns = (torch.zeros(rows, width) for _ in range(3))
    code = lines("logr = ref_logprobs", "returns = advantages + values")
    for i, length in enumerate(LENGTHS):
        cut = slice(i, i + 1), slice(0, length)
        out = run(
            code,
            args=args,
            logprobs=old[cut],
            ref_logprobs=reference[cut],
            values=values[cut],
            scores=scores[i : i + 1],
            responses=old[cut],
            sequence_lengths=torch.tensor([length - 1]),
            sequence_lengths_p1=torch.tensor([length]),
            padding_mask_p1=~mask[cut],
        )
        rewards[cut], advantages[cut], returns[cut] = (
            out["rewards"],
            out["advantages"],
            out["returns"],
        )
    white = ppo_trainer.masked_whiten(advantages, mask).masked_fill(~mask, 0)
    scaled = ppo_trainer.masked_whiten(advantages, mask, shift_mean=False).masked_fill(~mask, 0)
    losses = run(
        lines("vpredclipped = torch.clamp(", "pg_loss = masked_mean"),
        args=args,
        vpred=new_values.masked_fill(~mask, 0),
        mb_values=values.masked_fill(~mask, 0),
        mb_return=returns,
        padding_mask=~mask,
        padding_mask_p1=~mask,
        micro_batch_inds=slice(None),
        new_logprobs=new.masked_fill(~mask, 1.0),
        mb_logprobs=old.masked_fill(~mask, 1.0),
        mb_advantage=white,
    )
    clipped = run(
        lines("pg_clipfrac = masked_mean(", ")"),
        **{k: losses[k] for k in ("pg_losses", "pg_losses2", "padding_mask", "micro_batch_inds")},
    )["pg_clipfrac"]
    found = {
        "made_by": "tests/golden/make_ppo_golden.py",
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
        "settings": SETTINGS,
        "lengths": LENGTHS,
        "inputs": {
            "old_logprobs": old.tolist(),
            "reference_logprobs": reference.tolist(),
            "new_logprobs": new.tolist(),
            "values": values.tolist(),
            "new_values": new_values.tolist(),
            "scores": scores.tolist(),
        },
        "expected": {
            "rewards": rewards.tolist(),
            "advantages": advantages.tolist(),
            "returns": returns.tolist(),
            "whitened": white.tolist(),
            "scaled": scaled.tolist(),
            "policy_loss": losses["pg_loss"].item(),
            "policy_clip_fraction": clipped.item(),
            "value_loss": losses["vf_loss"].item(),
            "value_clip_fraction": losses["vf_clipfrac"].item(),
        },
    }
    text = re.sub(r"\[\s*([^\[\]]*?)\s*\]", row, json.dumps(found, indent=1))
    Path(__file__).with_name("ppo.json").write_text(text + "\n", encoding="utf-8")


def row(found):
    """A list of numbers on one line."""
    return f"[{' '.join(found[1].split())}]"


if __name__ == "__main__":
    main()
