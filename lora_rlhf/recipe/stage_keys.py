# SPDX-License-Identifier: Apache-2.0
"""The stages of a run and the recipe keys that each one reads, which may not change on resume."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lora_rlhf.redaction import hide

from .schema import Recipe

ALGORITHMS = {
    "ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "dpo": "DPO", "best_of_n": "best of n",
}  # fmt: skip
"""Algorithm, also the name of a run's third stage -> its name in texts."""

FREE = ("card", "hub", "model.hub_id", "model.shard", "report_to", "reward.gate", "checkpoint",
        "data.max_lost", "data.identity_test", "rounds", "ppo.rollout_server")  # fmt: skip
"""Recipe keys that may differ when a run is resumed, since they do not change what is trained."""

_POLICY = "ppo.updates", "ppo.kl_coef", "ppo.reward", "ppo.missing_eos_penalty", "ppo.watch"
"""Keys of `ppo` that GRPO and RLOO also read, beside `ppo.args`, so that budgets are equal."""

_SAMPLING = ("ppo.args.max_completion_length", "evaluate.batch_size")
"""Keys that the reward stage also reads, to sample the completions that are ranked."""

READS: dict[str, tuple[str, ...]] = {
    "demonstrations": ("sft", "reward"), "comparisons": ("reward", "dpo"),
    "comparisons_held_out_model": ("reward",), "prompts": (*ALGORITHMS, "evaluate"),
    "text": ("ppo",),
}  # fmt: skip
"""Data set, as named in the record -> the stages whose result depends on its rows."""


def stage_of(training: str) -> str:
    """Return the stage that a training belongs to; the reward stage trains several roles."""
    return training if training in ("sft", *ALGORITHMS, "evaluate") else "reward"


def stage_of_role(role: str, algorithm: str) -> str:
    """Return the stage that makes the adapter of a role, by the name of its folder."""
    return algorithm if role in ("policy", "value") else stage_of(role)


def fingerprints(report: dict[str, Any]) -> list[Any]:
    """Return the sha256 of every source of a set, including its evaluation prompts."""
    sources = [*report.get("sources", []), *report.get("evaluate", {}).get("sources", [])]
    return [source.get("sha256") for source in sources]


def keys_read(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the part of the recipe that a stage or an earlier one reads, as dotted keys."""
    names = stage_names(recipe.algorithm)
    upto = names[: names.index(stage) + 1]
    flat = _flat(recipe.model_dump(mode="json"))
    return {k: v for k, v in flat.items() if first_reader(k, recipe.algorithm) in upto}


def has_reward_model(recipe: Recipe) -> bool:
    """Tell if the reward stage trains; it does not for a gold reward without comparisons."""
    return bool(recipe.data.comparisons) or recipe.ppo.reward == "model"


def stage_names(algorithm: str) -> tuple[str, ...]:
    """Return the stages of a run in order."""
    return ("sft", "reward", algorithm, "evaluate", "card")


def identity(recipe: Recipe, without: tuple[str, ...] = ()) -> str:
    """Hash the recipe by sha256, without the keys that leave a run's result unchanged."""
    flat = flat_keys(recipe)
    kept = (k for k in flat if k not in without and first_reader(k, recipe.algorithm))
    data = {k: flat[k] for k in kept}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differences(before: Recipe, now: Recipe) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value before, value now) of every key in which two recipes differ.

    Secrets are masked, as in the recipe that a run writes.
    """
    a, b = flat_keys(before), flat_keys(now)
    keys = sorted(a.keys() | b.keys())
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def flat_keys(recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe as dotted keys, secrets masked."""
    return _flat(hide(recipe.model_dump(mode="json")))


def first_reader(key: str, algorithm: str) -> str | None:
    """Return the first stage whose result depends on a recipe key, or None."""
    if any(key == free or key.startswith(free + ".") for free in FREE):
        return None
    section = key.split(".")[0]
    if key in _SAMPLING:
        return "reward"
    if section == "algorithm":
        return algorithm
    if key == "data.text" or key.startswith("data.text."):
        return "ppo" if algorithm == "ppo" else None
    if section == "ppo" and algorithm in ("grpo", "rloo"):
        return algorithm if key in _POLICY or key.startswith("ppo.args") else None
    if section == "ppo" and algorithm == "dpo":
        return algorithm if key.startswith("ppo.args") else None
    if section in ALGORITHMS:
        return section if section == algorithm else None
    return section if section in ("reward", "evaluate") else "sft"


def _flat(data: Any, at: str = "") -> dict[str, Any]:
    """Flatten dicts and lists into one dict with dotted keys; empty ones stay values."""
    if not data or not isinstance(data, dict | list):
        return {at: data}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return {
        k: v for key, x in items for k, v in _flat(x, f"{at}.{key}" if at else str(key)).items()
    }
