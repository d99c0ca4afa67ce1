# SPDX-License-Identifier: Apache-2.0
"""Check the names and values in a stage's `args:`.

The fields of TRL's configs are read from their source, without loading torch or TRL, so that
`--dry-run` reports a misspelt key in a second. `training.trl_config` builds the configs.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lora_rlhf.errors import RecipeError

from . import suggestions
from .schema import Recipe

OWNED = {
    "output_dir": "--out", "seed": "seed", "report_to": "report_to",
    "bf16": "model.dtype", "fp16": "model.dtype", "push_to_hub": "hub",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "activation_checkpointing": "model.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "model.gradient_checkpointing",
    "activation_checkpointing_kwargs": "model.gradient_checkpointing",
    "use_cpu": "CUDA_VISIBLE_DEVICES: a GPU is used if there is one",
    "max_length": "data.max_tokens", "reward_weights": "ppo.reward",
    "resume_from_checkpoint": "--out", "save_strategy": "--out", "save_steps": "--out",
    "load_best_model_at_end": "ppo.watch", "eval_strategy": "evaluate",
    "trust_remote_code": "a model whose code is in transformers: remote code is never run",
    "hub_token": "HF_TOKEN in the environment, or `hf auth login`",
}  # fmt: skip
"""Keys of TRL's configs -> their replacement, mostly another key of the recipe."""

OWNED_BETA = {"ppo": "ppo.kl_coef", "grpo": "grpo.kl_coef", "rloo": "rloo.kl_coef",
              "dpo": "dpo.beta"}  # fmt: skip
"""Key to use instead of `beta`, by stage; SFT and reward model have none."""

_REFERENCE = "leave it out: the reference is the frozen SFT adapter"
_GROUPS = {
    "num_generations": "use {}.num_generations", "max_steps": "use {}.updates",
    "num_train_epochs": "use {}.updates", "logging_steps": "leave it out: every update is logged",
    "generation_batch_size": "use per_device_train_batch_size and steps_per_generation",
    "sync_ref_model": _REFERENCE,
    **dict.fromkeys(("top_k", "top_p", "min_p", "repetition_penalty", "generation_kwargs"),
                    "leave it out: all algorithms sample from the whole distribution"),
}  # fmt: skip
OWNED_BY_STAGE: dict[str, dict[str, str]] = {
    "grpo": _GROUPS, "rloo": _GROUPS,
    "dpo": {"sync_ref_model": _REFERENCE, "max_prompt_length": "use data.max_prompt_tokens",
            "precompute_ref_log_probs": "leave it out: the reference costs no memory"},
}  # fmt: skip
"""Stage -> its refused keys -> the remedy, in which `{}` is the stage."""

UNREAD = {
    **dict.fromkeys(("eos_token", "pad_token", "chat_template_path"),
                    "all roles share one tokenizer, which is fixed when the base is loaded"),
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "dataset_num_proc",
                     "completion_only_loss", "assistant_only_loss"),
                    "rows are already tokenised, and the loss is on completion tokens only"),
    **dict.fromkeys(("auto_find_batch_size", "deepspeed", "fsdp", "fsdp_config",
                     "model_init_kwargs", "use_liger_kernel", "torch_compile",
                     "activation_offloading"),
                    "it would change the backbone that all roles share"),
    **dict.fromkeys(("eval_steps", "eval_on_start", "eval_delay", "do_eval", "do_train"),
                    "a stage is evaluated once, at its end"),
    "disable_dropout": "dropout is off everywhere",
    "eval_packing": "held-out rows would see each other",
    "ignore_data_skip": "a run that goes on would train on other rows",
}  # fmt: skip
"""Keys that would be ignored or harmful -> the reason."""

_FILES = {"sft": "sft", "reward": "reward", "ppo": "grpo", "grpo": "grpo", "rloo": "rloo",
          "dpo": "dpo"}  # fmt: skip
"""Section of the recipe -> the TRL config that takes its `args:`."""

_COUNTS = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "steps_per_generation", "num_iterations", "num_generations", "max_completion_length",
}  # fmt: skip
_ABOVE_0 = {"learning_rate", "num_train_epochs", "temperature", "epsilon", "logging_steps"}
_FROM_0 = {"weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"}
_NAMED = {"loss_type", "f_divergence_type", "importance_sampling_level", "scale_rewards",
          "multi_objective_aggregation"}  # fmt: skip
"""Keys whose values are names, which TRL checks only in the middle of its training."""

_SHARES = {"adam_beta1", "adam_beta2"}


def section(stage: str) -> str:
    """Return the recipe section with a stage's `args:`; all reward models share `reward`."""
    return stage if stage in _FILES else "reward"


def check(recipe: Recipe, stages: Collection[str] = ()) -> None:
    """Refuse unknown, unusable and out-of-range `args:` of these stages, by default of all.

    Raises:
        RecipeError: With the key and a remedy.
    """
    trained = dict.fromkeys(("sft", "reward", "ppo", recipe.algorithm))
    # Every other algorithm takes what its own section does not set from PPO's.
    read = {*stages, "ppo"} if recipe.algorithm in stages else {*stages}
    for stage in (s for s in trained if s in read or not stages):
        given = getattr(getattr(recipe, stage), "args", {})
        refuse(stage, given)
        known = fields(stage) if given else frozenset()
        for key in given if known else ():
            if key not in known:
                raise unknown(stage, key)


def refuse(stage: str, given: dict[str, Any]) -> None:
    """Refuse keys that belong elsewhere, keys that nothing would read, and values out of range.

    With such values a stage would fail late, or end normally without training.

    Raises:
        RecipeError: With the key, and the alternative or the range.
    """
    elsewhere = OWNED | ({"beta": OWNED_BETA[stage]} if stage in OWNED_BETA else {})
    for key, value in given.items():
        at = f"{section(stage)}.args.{key}"
        if key in elsewhere:
            raise RecipeError(f"{at} cannot be set there", remedy=f"use {elsewhere[key]}")
        if remedy := OWNED_BY_STAGE.get(stage, {}).get(key):
            raise RecipeError(f"{at} cannot be set there", remedy=remedy.format(stage))
        if key in UNREAD and stage != "ppo":  # the PPO stage refuses them with reasons of its own
            raise RecipeError(f"{at} cannot be set: {UNREAD[key]}", remedy="leave it out")
        if expected := _expected(key, value) or _of_type(_types(stage).get(key, ""), value):
            raise RecipeError(f"{at}: {value!r:.80}", expected=expected)
        if named := choices(stage, key) if key in _NAMED else None:
            texts = [x for x in (value if isinstance(value, list) else [value]) if str(x) == x]
            if wrong := {*texts} - named:
                expected = f"one of {', '.join(sorted(named))}"
                raise RecipeError(f"{at}: {min(wrong)!r:.80}", expected=expected)


def _expected(key: str, value: Any) -> str:
    """Return the range that the value violates; empty if there is none."""
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


def _of_type(annotation: str, value: Any) -> str:
    """Return what a field of TRL takes, if that is plain and the value is another; else empty.

    `no` is text in YAML 1.2, and any text would count as true.
    """
    kinds = {*annotation.removeprefix("Optional[").removesuffix("]").split(" | ")} - {"None"}
    if value is None and annotation != "".join(kinds):
        return ""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kinds == {"bool"} and not isinstance(value, bool):
        return "true or false"
    if kinds == {"int"} and not whole:
        return "a whole number"
    return "a number" if kinds == {"float"} and not (whole or isinstance(value, float)) else ""


def unknown(stage: str, key: str) -> RecipeError:
    """Create the error for a key that the stage's TRL config does not have."""
    file = _FILES[section(stage)]
    config = {"sft": "SFT", "reward": "Reward"}.get(file, file.upper()) + "Config"
    return RecipeError(
        f"{section(stage)}.args.{key}: TRL's {config} has no such field",
        remedy=suggestions.described((section(stage), "args", key), usable()) or "leave it out",
    )


@functools.cache
def usable() -> dict[str, frozenset[str]]:
    """Return the names that the `args:` of each section may have."""
    stages = dict.fromkeys(map(section, _FILES))
    by_ppo = {key: "" for key in _GROUPS if key != "num_generations"}
    owned = {**OWNED_BY_STAGE, "ppo": by_ppo}
    return {s: fields(s) - {*OWNED, "beta", *UNREAD, *owned.get(s, {})} for s in stages}


@functools.cache
def choices(stage: str, key: str) -> frozenset[str]:
    """Return the texts with which TRL's trainer compares a key; empty if it compares it with none.

    A trainer refuses another one when it computes its first loss, after the stages before it.
    """
    trl = importlib.util.find_spec("trl")
    origin = Path((trl and trl.origin) or "")
    file = origin.parent / "trainer" / f"{_FILES[section(stage)]}_trainer.py"
    if not file.is_file():  # another layout of TRL: the trainer itself will raise
        return frozenset()
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and ast.unparse(node.left).rpartition(".")[2] == key:
            constants = (part for c in node.comparators for part in ast.walk(c))
            names |= {str(c.value) for c in constants if isinstance(c, ast.Constant) and c.value}
    return frozenset(names)


def fields(stage: str) -> frozenset[str]:
    """Return the names that a stage's TRL config takes; empty if its source is not found."""
    return frozenset(_types(stage))


@functools.cache
def _types(stage: str) -> dict[str, str]:
    """Return the fields that a stage's TRL config takes, with their annotations."""
    trl, transformers = (importlib.util.find_spec(name) for name in ("trl", "transformers"))
    if trl is None or transformers is None or not (trl.origin and transformers.origin):
        return {}
    trainer = Path(trl.origin).parent / "trainer"
    names: dict[str, str] = {}
    for path in (
        trainer / f"{_FILES[section(stage)]}_config.py",
        trainer / "base_config.py",
        Path(transformers.origin).parent / "training_args.py",
    ):
        if not path.is_file():  # another layout of TRL: the config itself will raise
            return {}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for line in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    names.setdefault(line.target.id, ast.unparse(line.annotation))
    # Private names are class variables, or fields that `__init__` does not take.
    return {name: kind for name, kind in names.items() if not name.startswith("_")}
