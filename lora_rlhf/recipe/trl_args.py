# SPDX-License-Identifier: Apache-2.0
"""The `args:` of a stage: which names it may have, and which values cannot be meant.

No torch and no TRL: the fields of TRL's configs are read from their source, so that `--dry-run`
tells a misspelt key in a second. stages.py makes the configs themselves.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import math
from pathlib import Path
from typing import Any

from lora_rlhf.errors import RecipeError

from .schema import Recipe

OWNED = {
    "output_dir": "the run directory", "seed": "seed", "report_to": "report_to",
    "bf16": "model.dtype", "fp16": "model.dtype", "push_to_hub": "hub",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "activation_checkpointing": "model.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "model.gradient_checkpointing",
    "activation_checkpointing_kwargs": "model.gradient_checkpointing",
    "use_cpu": "the device found",
    "max_length": "data.max_tokens", "reward_weights": "ppo.reward",
    "resume_from_checkpoint": "--out", "save_strategy": "--out", "save_steps": "--out",
    "load_best_model_at_end": "ppo.watch", "eval_strategy": "evaluate",
    "trust_remote_code": "nothing: remote code is never run", "hub_token": "the environment",
}  # fmt: skip
"""Keys of TRL's configs that have their home elsewhere in the recipe."""

OWNED_BETA = {"ppo": "ppo.kl_coef", "grpo": "grpo.kl_coef", "rloo": "rloo.kl_coef",
              "dpo": "dpo.beta"}  # fmt: skip
"""The home of `beta`, which means something else in every stage and nothing in the others."""

UNREAD = {
    **dict.fromkeys(("eos_token", "pad_token", "chat_template_path"),
                    "the tokenizer is shared by every role and settled when the base is loaded"),
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "dataset_num_proc",
                     "completion_only_loss", "assistant_only_loss"),
                    "rows come tokenised, and the loss is on completion tokens only"),
    **dict.fromkeys(("auto_find_batch_size", "deepspeed", "fsdp", "fsdp_config",
                     "model_init_kwargs", "use_liger_kernel", "torch_compile",
                     "activation_offloading"),
                    "it would change the one backbone that all roles share"),
    **dict.fromkeys(("eval_steps", "eval_on_start", "eval_delay", "do_eval", "do_train"),
                    "a stage is evaluated once, when it is over"),
    "disable_dropout": "dropout is off everywhere",
}  # fmt: skip
"""Keys that would do nothing, or harm, and why."""

_FILES = {"sft": "sft", "reward": "reward", "ppo": "grpo", "grpo": "grpo", "rloo": "rloo",
          "dpo": "dpo"}  # fmt: skip
"""Section of the recipe -> the TRL config that its `args:` are for."""

_COUNTS = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "steps_per_generation", "num_iterations", "num_generations", "max_completion_length",
}  # fmt: skip
_ABOVE_0 = {"learning_rate", "num_train_epochs", "temperature", "epsilon", "logging_steps"}
_FROM_0 = {"weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"}
_SHARES = {"adam_beta1", "adam_beta2"}


def section(stage: str) -> str:
    """The section of the recipe that a stage's `args:` stand in; every reward model has one."""
    return stage if stage in _FILES else "reward"


def check(recipe: Recipe) -> None:
    """Refuse `args:` that no stage of the recipe's algorithm could take, as far as names tell.

    Raises:
        RecipeError: Naming the key, and what to do.
    """
    for stage in dict.fromkeys(("sft", "reward", "ppo", recipe.algorithm)):
        given = getattr(getattr(recipe, stage), "args", {})
        refuse(stage, given)
        check_values(stage, given)
        known = fields(stage) if given else frozenset()
        for key in given if known else ():
            if key not in known:
                raise unknown(stage, key, known)


def refuse(stage: str, given: dict[str, Any]) -> None:
    """Refuse keys that have their home elsewhere, or that nothing would read.

    Raises:
        RecipeError: Naming the key and its home.
    """
    homes = OWNED | ({"beta": OWNED_BETA[stage]} if stage in OWNED_BETA else {})
    for key in given:
        at = f"{section(stage)}.args.{key}"
        if key in homes:
            raise RecipeError(f"{at} is not set there", remedy=f"use {homes[key]}")
        if key in UNREAD and stage != "ppo":  # PPO says itself what it reads
            raise RecipeError(f"{at} cannot be set: {UNREAD[key]}", remedy="leave it out")


def check_values(stage: str, given: dict[str, Any]) -> None:
    """Refuse numbers with which a stage would fail late, or end well and train nothing.

    Raises:
        RecipeError: Naming the key, its value and its range.
    """
    for key, value in given.items():
        if wanted := _wanted(key, value):
            raise RecipeError(f"{section(stage)}.args.{key}: {value!r:.80}", expected=wanted)


def _wanted(key: str, value: Any) -> str:
    """What the value of `key` should have been; empty where nothing speaks against it."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = whole or (isinstance(value, float) and math.isfinite(value))
    if key in _COUNTS and not (whole and value >= 1):
        return "a whole number from 1"
    if key == "max_steps" and not (whole and (value >= 1 or value == -1)):
        return "a whole number from 1, or -1 for num_train_epochs"
    if key in _ABOVE_0 and not (number and value > 0):
        return "a number above 0"
    if key in _FROM_0 and not (number and value >= 0):
        return "a number from 0"
    if key in _SHARES and not (number and 0 <= value < 1):
        return "a number from 0 and below 1"
    return ""


def unknown(stage: str, key: str, known: frozenset[str]) -> RecipeError:
    """The error for a key that TRL's config does not have."""
    kind = {"sft": "SFT", "reward": "Reward"}.get(_FILES[section(stage)])
    name = f"{kind or _FILES[section(stage)].upper()}Config"
    close = difflib.get_close_matches(key, sorted(known), n=1)
    return RecipeError(
        f"{section(stage)}.args.{key}: TRL's {name} has no such field",
        remedy=f"did you mean {close[0]!r}?" if close else "leave it out",
    )


@functools.cache
def fields(stage: str) -> frozenset[str]:
    """The names that a stage's TRL config takes; empty where its source is not to be found."""
    trl, transformers = (importlib.util.find_spec(name) for name in ("trl", "transformers"))
    if trl is None or transformers is None or not (trl.origin and transformers.origin):
        return frozenset()
    trainer = Path(trl.origin).parent / "trainer"
    found: set[str] = set()
    for path in (
        trainer / f"{_FILES[section(stage)]}_config.py",
        trainer / "base_config.py",
        Path(transformers.origin).parent / "training_args.py",
    ):
        if not path.is_file():  # another layout than today's: then the config itself complains
            return frozenset()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.update(_fields_of(node))
    return frozenset(found)


def _fields_of(node: ast.ClassDef) -> set[str]:
    """The annotated names of a dataclass that its `__init__` takes."""
    found = set()
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            options = line.value.keywords if isinstance(line.value, ast.Call) else []
            fixed = [o for o in options if o.arg == "init" and ast.unparse(o.value) == "False"]
            if not fixed and "ClassVar" not in ast.unparse(line.annotation):
                found.add(line.target.id)
    return found
