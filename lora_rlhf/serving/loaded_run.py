# SPDX-License-Identifier: Apache-2.0
"""Load a finished run and generate with each of its models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from lora_rlhf.algorithms import best_of_n
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.data.filters import breaker
from lora_rlhf.errors import UsageError, check_unicode
from lora_rlhf.models import adapters
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import SEEDS
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import quiet
from lora_rlhf.training import sft
from lora_rlhf.training.reward import ensemble, reward_stage


@quiet.libraries()
def load(folder: str | Path) -> tuple[Backbone, Record]:
    """Load the backbone of a run with the roles of all finished stages.

    Raises:
        UsageError: The folder is not a run, or has no finished stage.
    """
    record = Record.read(folder)
    if not record.done("sft"):
        raise UsageError(f"{folder} has no finished stage", remedy="continue with `lora-rlhf run`")
    recipe = record.recipe()
    backbone = Backbone.load(record.model_section(recipe), recipe.lora)
    for stage in ("sft", "reward", record.algorithm):
        if record.done(stage):
            load_stage(stage, backbone, record)
    return backbone, record


def load_stage(stage: str, backbone: Backbone, record: Record) -> None:
    """Load the roles that a finished stage trained."""
    if stage == "sft":
        sft.load(backbone, record)
    elif stage == "reward":
        reward_stage.load(backbone, record)
    elif stage not in ("best_of_n", "evaluate"):
        adapters.load_role(backbone, "policy", record.verified("adapters/policy"))


def _check(text: Any, temperature: Any, seed: int, max_new_tokens: int | None) -> None:
    """Refuse what no answer can be sampled with."""
    if not 0 <= seed < SEEDS:
        raise UsageError(f"seed {seed}", expected=f"0 to {SEEDS - 1}")
    if not (isinstance(temperature, int | float) and 0 <= temperature < math.inf):
        raise UsageError(f"temperature {temperature!r}", expected="a number from 0 (greedy)")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"max_new_tokens {max_new_tokens}", expected="1 or more")
    if not isinstance(text, str):
        raise UsageError(
            f"the prompt is of the type {type(text).__name__}: {text!r:.60}",
            expected="one prompt of text",
            remedy="call it for each prompt; for messages there is `lora_rlhf.chat`",
        )
    if not text.strip():
        raise UsageError("the prompt is empty", expected="a prompt with some text")
    check_unicode(text, "the prompt")


@quiet.libraries()
def generate(
    folder: str | Path,
    text: str,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Answer one prompt with base, SFT and policy (or best of n), with the reward of each answer.

    Returns:
        For each model of the run a dict with `model`, `text`, `tokens`, and `reward` if there is a
        reward model.

    Raises:
        UsageError: The folder is no run, or the text or the seed cannot be used.
    """
    _check(text, temperature, seed, max_new_tokens)
    backbone, record = load(folder)
    recipe = record.recipe()
    text = breaker(backbone.tokenizer)(text)  # the user's text must hold no control tokens
    prompt: Any = [{"role": "user", "content": text}] if backbone.tokenizer.chat_template else text
    ids = backbone.encode_prompt(prompt)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens or ppo_stage.completion_limit(recipe, recipe.algorithm),
        "temperature": temperature,
        "seed": seed,
    }
    answers = {
        "base": backbone.generate([ids], None, **options),
        "sft": backbone.generate([ids], "reference", **options),
    }
    if record.done(recipe.algorithm):
        if recipe.algorithm != "best_of_n":
            answers["policy"] = backbone.generate([ids], "policy", **options)
        elif temperature > 0:  # greedy answers are all the same
            answers["best_of_n"] = best_of_n.choose(
                backbone, [ids], recipe, given=[{"prompt": prompt}], **options
            )
    rows: list[dict[str, Any]] = []
    for model, [answer] in answers.items():
        rows.append({"model": model, "text": backbone.decode(answer), "tokens": len(answer)})
        if backbone.has("reward"):
            [rows[-1]["reward"]] = ensemble.scores(backbone, [(ids, answer)], recipe.reward).rewards
    return rows
