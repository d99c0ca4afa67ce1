# SPDX-License-Identifier: Apache-2.0
"""Does a recipe fit a GPU, what to change where it does not; and the line before a run."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lora_rlhf.errors import MemoryLimitError, UsageError, first_line
from lora_rlhf.models.loading import find_config
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runtime.oom import is_out_of_memory

from .memory_budget import Plan, largest
from .plan import Planner, Work

_UNITS = {"": 10**9, "G": 10**9, "GB": 10**9, "GIB": 2**30, "M": 10**6, "MB": 10**6, "MIB": 2**20}
_SHORTEST, _LOWEST_RANK, _LEAST = 32, 4, 0.25
"""Below these a change is no remedy: tokens of a part, rank, share of the layers."""

Changes = dict[str, Any]


def capacity(text: str) -> int:
    """Bytes of a card: "16GB" and "16" are 16e9, about what a card sold by that name shows.

    Raises:
        UsageError: It is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) == 0:
        raise UsageError(
            f"--gpu {text!r} is no size",
            expected="such as 16GB, 16GiB or 16",
            remedy="give the memory of the card",
        )
    return int(float(found[1]) * unit)


@dataclass(frozen=True)
class Fit:
    """A recipe on one card.

    Attributes:
        capacity: Bytes of the card.
        changes: Keys of the recipe and values with which it fits, in the order of the remedies;
            empty where it fits as it is, None where nothing here makes it fit.
        recipe: With the changes.
        plan: Of that recipe.
        micro_batch: Largest per_device_train_batch_size of the policy's updates that fits.
    """

    capacity: int
    changes: Changes | None
    recipe: Recipe
    plan: Plan
    micro_batch: int | None = None


def fit(planner: Planner, recipe: Recipe, card: int) -> Fit:
    """The recipe on a card, changed as little as it takes.

    The remedies in their order: checkpointing, smaller micro-batches with accumulation (nothing of
    what is learned changes by these two), lengths, rank, share of adapted layers, 4-bit. The first
    of all is 4-bit where the frozen base alone takes half of the card.
    """
    plan = planner.plan(recipe, card)
    groups: list[Changes] = []
    steps = [_checkpointing, _micro_batches, _lengths, _rank, _fraction, _four_bit]
    dear = (_rank, _fraction, _lengths)
    if plan.needed > card and plan.backbone > card / 2:
        steps.insert(0, steps.pop())
    now = recipe
    for step in steps:
        group: Changes = {}
        while plan.needed > card and (more := step(planner, now, plan)):
            group |= more
            now = changed(recipe, _merged([*groups, group]))
            plan = planner.plan(now, card)
        groups.append(group)
    if plan.needed > card:
        return Fit(card, None, now, plan)
    for index in map(steps.index, dear):  # what proved needless, the dearest first
        without = [*groups[:index], {}, *groups[index + 1 :]]
        if groups[index]:
            other = changed(recipe, _merged(without))
            tried = planner.plan(other, card)
            if tried.needed <= card:
                groups, now, plan = without, other, tried
    return Fit(card, _merged(groups), now, plan, micro_batch(planner, now, card))


def micro_batch(planner: Planner, recipe: Recipe, card: int) -> int | None:
    """Largest micro-batch of the policy's updates that the card holds; None without updates."""
    work = Work(planner, recipe, card)
    if recipe.algorithm == "best_of_n":
        return None
    room = largest(card)
    few, more = 2, 4  # a batch of one has no padding, and so no mask
    low, high = (work.update(rows).total for rows in (few, more))
    found = few + max(0, (room - low) * (more - few) // max(1, high - low))
    while found > 1 and work.update(found).total > room:
        found -= 1
    return found


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with dotted keys set anew."""
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        section = getattr(recipe, first)
        if rest.startswith("args."):
            update = {"args": {**section.args, rest.removeprefix("args."): value}}
        else:
            update = {rest: value}
        recipe = recipe.model_copy(update={first: section.model_copy(update=update)})
    return recipe


def _merged(groups: list[Changes]) -> Changes:
    return {key: value for group in groups for key, value in group.items()}


def memory_limit(recipe: Recipe, error: BaseException) -> MemoryLimitError | None:
    """Memory that ran out where nothing could be halved any more, with the remedies; else None."""
    if isinstance(error, MemoryLimitError):
        given, expected = error.given, error.expected
    elif is_out_of_memory(error):
        given, expected = f"memory ran out: {first_line(error)}", ""
    else:
        return None
    return MemoryLimitError(
        given,
        expected=expected,
        remedy=f"in a new --out, one or more of these; what is saved stays\n{remedies(recipe)}",
    )


def remedies(recipe: Recipe) -> str:
    """A table of what to set where memory has run out though one row goes at once.

    Each change by itself, with the planned peak of this recipe on the device that is here.
    """
    gpu = torch.cuda.is_available()
    total = torch.cuda.mem_get_info()[1] if gpu else None
    try:
        made = planner(find_config(recipe.model), "cuda" if gpu else "cpu")
        least = changed(recipe, _rows_at_once(made, recipe, total))  # so far halving has come
        plan = made.plan(least, total)
        rows = [("nothing, one row at once", size(plan.peak), plan.worst)]
        for step in (_checkpointing, _trunk_on_cpu, _lengths, _rank, _fraction, _four_bit):
            if changes := step(made, least, plan):
                other = made.plan(changed(least, changes), total)
                keys = " ".join(f"--set {k}={as_yaml(v)}" for k, v in changes.items())
                rows.append((keys, size(other.peak), other.worst))
    except Exception:  # a plan is a help: without one the keys are still true
        return f"    {_KEYS}"
    width = max(len(row[0]) for row in rows)
    head = f"    {'change':{width}}  planned peak, in tensors"
    told = [f"    {keys:{width}}  {peak:>9}  {phase}" for keys, peak, phase in rows]
    return "\n".join([head, *told])


_KEYS = (
    "model.gradient_checkpointing, ppo.trunk_states: cpu, evaluate.batch_size, shorter lengths, "
    "lora.r, lora.top_fraction, model.load_in_4bit"
)

# ------------------------------------------------------------------------------------- remedies


def _checkpointing(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    trains = plan.worst.endswith(("sft", "reward", "update"))
    if recipe.model.gradient_checkpointing or not trains:
        return {}
    return {"model.gradient_checkpointing": True}


def _micro_batches(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    """Half the rows of the phase that is worst; what an optimizer step learns from is the same."""
    if plan.worst == "evaluate":
        size = recipe.evaluate.batch_size
        return {"evaluate.batch_size": size // 2} if size > 1 else {}
    if plan.worst == "load" or plan.worst.endswith("sampling"):
        return {}
    work = Work(planner, recipe, None)
    stage = {"sft": "sft", "reward": "reward"}.get(plan.worst)
    args = {"sft": work.sft, "reward": work.reward}.get(plan.worst, work.policy)
    size = args.per_device_train_batch_size
    if size % 2:
        return {}
    at = f"{stage or 'ppo'}.args"  # the other algorithms take theirs from PPO
    found = {
        f"{at}.per_device_train_batch_size": size // 2,
        f"{at}.gradient_accumulation_steps": 2 * args.gradient_accumulation_steps,
    }
    if stage is None and hasattr(args, "steps_per_generation"):
        found[f"{at}.steps_per_generation"] = 2 * args.steps_per_generation
    return found


def _rows_at_once(planner: Planner, recipe: Recipe, total: int | None) -> Changes:
    """As few rows in the worst phase as there can be, and so on with the one that is worst then."""
    found: Changes = {}
    while True:
        now = changed(recipe, found)
        more = _micro_batches(planner, now, planner.plan(now, total))
        if not more:
            return found
        found |= more


def _trunk_on_cpu(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    kept = recipe.algorithm == "ppo" and recipe.ppo.trunk_states == "device"
    away = kept and recipe.lora.top_fraction < 1 and torch.cuda.is_available()
    return {"ppo.trunk_states": "cpu"} if away else {}


def _lengths(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    """Half of every length."""
    data, work = recipe.data, Work(planner, recipe, None)
    if min(data.max_prompt_tokens, work.completion) < 2 * _SHORTEST:
        return {}
    return {
        "data.max_tokens": data.max_tokens // 2,
        "data.max_prompt_tokens": data.max_prompt_tokens // 2,
        "ppo.args.max_completion_length": work.completion // 2,
    }


def _rank(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    """Half the rank and alpha, so that their quotient stays."""
    lora = recipe.lora
    if lora.r < 2 * _LOWEST_RANK or lora.alpha % 2:
        return {}
    return {"lora.r": lora.r // 2, "lora.alpha": lora.alpha // 2}


def _fraction(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    half = recipe.lora.top_fraction / 2
    return {"lora.top_fraction": half} if half >= _LEAST else {}


def _four_bit(planner: Planner, recipe: Recipe, plan: Plan) -> Changes:
    return {} if recipe.model.load_in_4bit else {"model.load_in_4bit": True}


# ----------------------------------------------------------------------------------- before a run


@functools.lru_cache(maxsize=4)
def _planner(config: str, model_type: str, device: str) -> Planner:
    given = {k: v for k, v in json.loads(config).items() if k != "model_type"}
    return Planner(AutoConfig.for_model(model_type, **given), device)


def planner(config: Any, device: str) -> Planner:
    """A planner of this base; what it has counted serves the next recipe on it."""
    text = config.to_json_string(use_diff=False)
    return _planner(text, config.model_type, device)


def before_run(recipe: Recipe) -> tuple[Plan | None, str]:
    """The plan of a run on the device that is here, and a line that tells it.

    A plan is a help: whatever keeps it from being made does not keep the run.
    """
    gpu = torch.cuda.is_available()
    try:
        made = planner(find_config(recipe.model), "cuda" if gpu else "cpu")
        total = torch.cuda.mem_get_info()[1] if gpu else None
        plan = made.plan(recipe, total)
    except Exception as error:
        return None, f"plan: none ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    told = f"plan: {size(plan.peak)} at the peak ({plan.worst}, texts as long as the recipe allows)"
    if not gpu:
        return plan, f"{told} in tensors, on the CPU"
    free = torch.cuda.mem_get_info()[0]
    line = f"{told}, {size(plan.needed)} with CUDA's own, of {size(free)} free"
    if plan.needed > free:
        line = f"warning: {line}: it may not fit; `lora-rlhf plan` says what to change"
    return plan, line


class PeakMemory:
    """The memory that a process takes from now on, at its highest; cheap enough for every run."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        self._before = 0
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._before = _resident_now()

    @property
    def what(self) -> str:
        """What it is that was measured."""
        if self._gpu:
            return "torch.cuda.max_memory_allocated"
        return "highest resident set of the process, above that before the model was loaded"

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self._gpu:
            return int(torch.cuda.max_memory_allocated())
        highest = _resident_highest()
        return highest - self._before if highest and self._before else None


def _resident_now() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux: the highest so far is the nearest there is
        return _resident_highest()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _resident_highest() -> int:
    """0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(found) * (1 if sys.platform == "darwin" else 1024)


def as_yaml(value: Any) -> str:
    """A value as it is written in a recipe."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def size(count: int) -> str:
    """Bytes as people read them, in powers of ten."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"
