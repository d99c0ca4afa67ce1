# SPDX-License-Identifier: Apache-2.0
"""A run, loaded again: its backbone with every finished role, and what each model answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from lora_rlhf.algorithms import best_of_n, policy_stage
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.data.filters import breaker
from lora_rlhf.errors import UsageError
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.runs.record import Record
from lora_rlhf.training import sft
from lora_rlhf.training.reward import ensemble, reward_stage


def load(folder: str | Path) -> tuple[Backbone, Record]:
    """The backbone of a run with every role that it finished.

    Raises:
        UsageError: The folder is no run, or no stage of it is finished.
    """
    record = Record.read(folder)
    if not record.done("sft"):
        raise UsageError(f"{folder} has no finished stage", remedy="go on with `lora-rlhf run`")
    recipe = load_recipe(Path(folder) / "recipe.yaml")
    backbone = Backbone.load(recipe.model, recipe.lora)
    sft.load(backbone, record)
    if record.done("reward"):
        reward_stage.load(backbone, record)
    if record.done(record.algorithm) and record.algorithm != "best_of_n":
        policy_stage.load(backbone, record)
    return backbone, record


def generate(
    folder: str | Path,
    text: str,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Answers of base, SFT and policy (or best of n) to one prompt, with the reward of each.

    Returns:
        One dict for each model that the run has: `model`, `text`, `tokens`, and `reward` where
        there is a reward model.
    """
    backbone, record = load(folder)
    recipe = load_recipe(Path(folder) / "recipe.yaml")
    text = breaker(backbone.tokenizer)(text)  # what a user writes is text
    prompt: Any = [{"role": "user", "content": text}] if backbone.tokenizer.chat_template else text
    ids = backbone.encode_prompt(prompt)
    limit = max_new_tokens or ppo_stage.longest(recipe)
    models: list[tuple[str, str | None]] = [("base", None), ("sft", "reference")]
    if record.done(recipe.algorithm):
        models.append(("policy", "policy"))
        if recipe.algorithm == "best_of_n":  # greedy answers are all the same: none is best
            models[-1:] = [("best_of_n", "reference")] if temperature > 0 else []
    rows = []
    for model, role in models:
        options: dict[str, Any] = {
            "max_new_tokens": limit,
            "temperature": temperature,
            "seed": seed,
        }
        if model == "best_of_n":
            [answer] = best_of_n.choose(backbone, [ids], recipe, **options)
        else:
            [answer] = backbone.generate([ids], role, **options)
        row: dict[str, Any] = {
            "model": model,
            "text": backbone.decode(answer),
            "tokens": len(answer),
        }
        if backbone.has("reward"):
            [row["reward"]] = ensemble.rewards_of(backbone, [(ids, answer)], recipe.reward)
        rows.append(row)
    return rows
