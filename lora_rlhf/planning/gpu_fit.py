# SPDX-License-Identifier: Apache-2.0
"""Check whether a recipe fits a GPU, and find the fewest changes with which it does."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lora_rlhf.errors import UsageError
from lora_rlhf.recipe.schema import Recipe

from . import meta_backbone
from .memory_budget import Plan, largest_peak
from .plan import ONE_CARD, Cards, Estimate, Planner

_UNITS = {"": 10**9, "G": 10**9, "GB": 10**9, "GIB": 2**30, "M": 10**6, "MB": 10**6, "MIB": 2**20}
_SHORTEST, _LOWEST_RANK, _LEAST = 32, 4, 0.25
"""Limits of the remedies: tokens of a prompt or completion, rank, share of adapted layers."""

Changes = dict[str, Any]
Remedy = Callable[[Planner, Recipe, Plan], Changes]


def capacity(text: str, option: str = "--gpu") -> int:
    """Parse the memory of a GPU: "16GB" and "16" are 16e9 bytes, "16GiB" is 16 * 2**30.

    Args:
        option: The option that gave it, for the error.

    Raises:
        UsageError: `text` is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise UsageError(
            f"{option} {text!r} is not a size",
            expected="such as 16GB, 16GiB or 16",
            remedy="give the memory of the GPU",
        )
    return int(float(match[1]) * unit)


@dataclass(frozen=True)
class Fit:
    """A recipe on one GPU.

    Attributes:
        capacity: Bytes of the GPU.
        changes: Recipe keys and values with which it fits, in the order of the remedies; empty if
            it fits as it is, None if no remedy makes it fit.
        recipe: The recipe with the changes.
        plan: Its plan.
        micro_batch: Largest per_device_train_batch_size of the policy's updates that fits; None
            for several GPUs.
    """

    capacity: int
    changes: Changes | None
    recipe: Recipe
    plan: Plan
    micro_batch: int | None = None
    is_4bit: bool = False

    @property
    def unchanged(self) -> bool:
        """True if the recipe fits as it is."""
        return self.changes == {}


def fit(planner: Planner, recipe: Recipe, gpu: int, cards: Cards = ONE_CARD) -> Fit:
    """Change a recipe until it fits a GPU of `gpu` bytes, or several of that size.

    The remedies, in this order: checkpointing, smaller micro-batches with accumulation (these two
    leave the result the same), lengths, rank, share of adapted layers, 4-bit. 4-bit comes first if
    the frozen base alone takes half of the GPU.
    """
    plan = planner.plan(recipe, gpu, cards)
    fewer_rows = functools.partial(micro_batches, processes=cards.processes)
    steps: list[Remedy] = [checkpointing, fewer_rows, lengths, rank, fraction, four_bit]
    if plan.needed > gpu and plan.backbone > gpu / 2:
        steps.insert(0, steps.pop())
    if largest_peak(gpu) == 0:
        steps = []  # less than CUDA takes for itself
    changes: list[Changes] = [{} for _ in steps]
    now = recipe
    for step, group in zip(steps, changes, strict=True):
        while plan.needed > gpu and (more := step(planner, now, plan)):
            group |= more
            now = changed(recipe, *changes)
            plan = planner.plan(now, gpu, cards)
    quantised = meta_backbone.is_4bit(now.model, planner.config)
    if plan.needed > gpu:
        return Fit(gpu, None, now, plan, is_4bit=quantised)
    for step in (rank, fraction, lengths):  # a later change may have made an earlier one needless
        index = steps.index(step)
        if changes[index]:
            fewer = [*changes[:index], {}, *changes[index + 1 :]]
            other = changed(recipe, *fewer)
            other_plan = planner.plan(other, gpu, cards)
            if other_plan.needed <= gpu:
                changes, now, plan = fewer, other, other_plan
    merged = {key: value for group in changes for key, value in group.items()}
    largest = largest_micro_batch(planner, now, gpu) if cards == ONE_CARD else None
    return Fit(gpu, merged, now, plan, largest, quantised)


def largest_micro_batch(planner: Planner, recipe: Recipe, gpu: int) -> int | None:
    """Find the largest micro-batch of the policy's updates that fits; None without updates."""
    if recipe.algorithm == "best_of_n":
        return None
    estimate, room = Estimate(planner, recipe, gpu), largest_peak(gpu)
    # A batch of one row has no padding, so no mask, and would not be on the line. That of the plan
    # is counted already.
    few, more = 2, max(4, int(estimate.policy.per_device_train_batch_size))
    low, high = (estimate.update(rows).total for rows in (few, more))
    rows = few + max(0, (room - low) * (more - few) // max(1, high - low))
    if estimate.update(rows).total <= room:
        return rows
    fits = 1
    while rows - fits > 1:
        middle = (fits + rows) // 2
        fits, rows = (middle, rows) if estimate.update(middle).total <= room else (fits, middle)
    return fits


def changed(recipe: Recipe, *changes: Changes) -> Recipe:
    """Return the recipe with dotted keys replaced."""
    for key, value in (pair for group in changes for pair in group.items()):
        first, _, rest = key.partition(".")
        section = getattr(recipe, first)
        if rest.startswith("args."):
            update = {"args": {**section.args, rest.removeprefix("args."): value}}
        else:
            update = {rest: value}
        recipe = recipe.model_copy(update={first: section.model_copy(update=update)})
    return recipe


def as_options(changes: Changes) -> list[str]:
    """Write changes as command-line options: `--set model.load_in_4bit=true`."""
    return [
        f"--set {key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in changes.items()
    ]


# --- remedies: each returns recipe keys and values, empty if it cannot help ----------------------


def checkpointing(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    """Turn gradient checkpointing on, if memory peaks in training."""
    trains = plan.worst.endswith(("sft", "reward", "update"))
    if recipe.model.gradient_checkpointing or not trains:
        return {}
    return {"model.gradient_checkpointing": True}


def micro_batches(planner: Planner, recipe: Recipe, plan: Plan, *, processes: int = 1) -> Changes:
    """Halve the rows of the worst phase; the batch of an optimizer step stays the same.

    Args:
        processes: Each has an equal number of a micro-batch's rows.
    """
    if plan.worst == "evaluate":
        rows = recipe.evaluate.batch_size
        return {"evaluate.batch_size": rows // 2} if rows > 1 else {}
    if plan.worst == "load" or plan.worst.endswith("sampling"):
        return {}
    estimate = Estimate(planner, recipe, None)
    trains_policy = plan.worst not in ("sft", "reward")
    args: Any = estimate.policy if trains_policy else getattr(estimate, plan.worst)
    rows = args.per_device_train_batch_size
    if rows % (2 * processes):
        return {}
    section = f"{'ppo' if trains_policy else plan.worst}.args"  # all algorithms read `ppo.args`
    changes = {
        f"{section}.per_device_train_batch_size": rows // 2,
        f"{section}.gradient_accumulation_steps": 2 * args.gradient_accumulation_steps,
    }
    if trains_policy and hasattr(args, "steps_per_generation"):
        changes[f"{section}.steps_per_generation"] = 2 * args.steps_per_generation
    return changes


def one_row(planner: Planner, recipe: Recipe, total: int | None) -> Changes:
    """Halve the rows of the worst phase again and again, until none can be halved."""
    changes: Changes = {}
    while True:
        now = changed(recipe, changes)
        more = micro_batches(planner, now, planner.plan(now, total))
        if not more:
            return changes
        changes |= more


def trunk_on_cpu(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    """Keep the trunk states of a rollout in the host's memory."""
    kept = recipe.algorithm == "ppo" and recipe.ppo.trunk_states == "device"
    movable = kept and recipe.lora.top_fraction < 1 and torch.cuda.is_available()
    return {"ppo.trunk_states": "cpu"} if movable else {}


def lengths(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    """Halve every length."""
    data, completion = recipe.data, Estimate(planner, recipe, None).completion
    if min(data.max_prompt_tokens, completion) < 2 * _SHORTEST:
        return {}
    return {
        "data.max_tokens": data.max_tokens // 2,
        "data.max_prompt_tokens": data.max_prompt_tokens // 2,
        "ppo.args.max_completion_length": completion // 2,
    }


def rank(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    """Halve rank and alpha, so that the scale alpha / r stays."""
    lora = recipe.lora
    if lora.r < 2 * _LOWEST_RANK or lora.alpha % 2:
        return {}
    return {"lora.r": lora.r // 2, "lora.alpha": lora.alpha // 2}


def fraction(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    """Halve the share of adapted layers."""
    half = recipe.lora.top_fraction / 2
    return {"lora.top_fraction": half} if half >= _LEAST else {}


def four_bit(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    """Quantise the base to 4 bits."""
    quantised = meta_backbone.is_4bit(recipe.model, planner.config)
    return {} if quantised else {"model.load_in_4bit": True}
