# SPDX-License-Identifier: Apache-2.0
"""A recipe on several equal GPUs, one process on each: the base whole on each, or split.

Bytes per pass are those of the layers' weights that a GPU receives, and sends, when a pass goes
through all layers once. Gradients go around a ring: 2 (N - 1) / N of their bytes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rlhf.algorithms import trainer_configs
from lora_rlhf.errors import RecipeError, UsageError
from lora_rlhf.models.sharded_layers import why_not
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import stage_names
from lora_rlhf.reports.tables import aligned
from lora_rlhf.training import trl_config

from .gpu_fit import Fit, as_options, capacity, fit
from .memory_budget import Plan, format_bytes
from .plan import Cards, Estimate, Planner

MOST = 1024
"""Most GPUs that are planned for."""


@dataclass(frozen=True)
class SeveralGpus:
    """A recipe on `count` GPUs of `capacity` bytes each.

    Attributes:
        whole: Plan of a process with the whole base.
        split: Plan of a process with a part of it; None if the base cannot be split.
        why_not: The reason.
        per_step: Bytes that each GPU sends and receives per optimizer step of the policy.
        per_pass: Bytes that each sends and receives per pass through a split base.
        start: The command that starts the recipe as it is.
        splits: Whether the recipe itself splits the base.
        remedy: The least changes with which it fits, and the way; None if it fits without, or if
            none are found.
    """

    count: int
    capacity: int
    whole: Plan
    split: Plan | None
    why_not: str
    per_step: int
    per_pass: int
    start: str
    splits: bool
    remedy: tuple[str, Fit] | None = None

    @property
    def command(self) -> str:
        """The command that starts the chosen run."""
        way = self.remedy[0] if self.choice is None and self.remedy else self.choice
        options = as_options(self.remedy[1].changes or {}) if self.remedy else []
        if way == "split" or self.splits:
            options.append(f"--set model.shard={str(way == 'split').lower()}")
        return " ".join([self.start, *options])

    @property
    def choice(self) -> str | None:
        """Return `whole` if that fits, else `split` if that does, else None."""
        if self.whole.needed <= self.capacity:
            return "whole"
        fits = self.split is not None and self.split.needed <= self.capacity
        return "split" if fits else None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON; bytes are whole numbers."""
        return {
            "gpus": self.count,
            "bytes": self.capacity,
            "choice": self.choice,
            "whole": self.whole.as_dict(),
            "split": self.split and self.split.as_dict(),
            "why_not_split": self.why_not or None,
            "exchanged_per_step": self.per_step,
            "exchanged_per_pass": self.per_pass,
            "changes": self.remedy[1].changes if self.remedy else None,
            "command": self.command if self.choice or self.remedy else None,
        }

    def lines(self) -> Iterator[str]:
        """Yield the plan for people."""
        size = f"{self.capacity / 10**9:g} GB"
        rows_each = f"{self.whole.micro_batch} row{'s' * (self.whole.micro_batch > 1)}"
        yield f"{self.count} GPUs of {size}, each with {rows_each} of a micro-batch"
        step, once = format_bytes(self.per_step), format_bytes(self.per_pass)
        rows = [self._row("whole on each", self.whole, f"{step} per optimizer step")]
        if self.split is not None:
            exchanged = f"that, and {once} per pass through the base"
            rows.append(self._row("split between them", self.split, exchanged))
        head = ["base", "held of it", "peak", "needs", "fits", "sent and received by each GPU"]
        yield from aligned(head, rows)
        if self.why_not:
            yield self.why_not
        yield ""
        if self.choice is None:
            yield from self._remedies(f"{self.count} GPUs of {size}")
            return
        if self.choice == "split":
            yield (
                "split the base. A pass is a forward or a backward; sampling makes one for "
                "every token of the longest answer"
            )
        else:
            yield "keep the whole base on each GPU: none of it has to be sent"
        yield f"  {self.command}"

    def _remedies(self, gpus: str) -> Iterator[str]:
        ways = "in either way" if self.split is not None else "with the whole base on each"
        if self.remedy is None:
            yield f"does not fit {gpus} {ways}, even with every change that is tried"
            return
        way, fitted = self.remedy
        base = "whole on each" if way == "whole" else "split between them"
        needs = format_bytes(fitted.plan.needed)
        yield f"does not fit {gpus} {ways}"
        yield f"changed like this, with the base {base}, it needs {needs}:"
        yield f"  {self.command}"

    def _row(self, name: str, plan: Plan, exchanged: str) -> list[str]:
        fits = "yes" if plan.needed <= self.capacity else "no"
        sizes = [format_bytes(count) for count in (plan.backbone, plan.peak, plan.needed)]
        return [name, *sizes, fits, exchanged]


def parse(text: str) -> tuple[int, int]:
    """Read `2x24GB` as a number of GPUs and the bytes of each.

    Raises:
        UsageError: It is something else, such as GPUs of several sizes.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*([\d.]+\s*[A-Za-z]*)\s*", text)
    count = int(match[1]) if match else 0
    if match is None or not 2 <= count <= MOST:
        raise UsageError(
            f"--gpus {text!r} is not a number of equal GPUs and their memory",
            expected=f"such as 2x24GB, with 2 to {MOST} GPUs: each gets the same share of a batch",
            remedy="for unequal ones give the smallest memory; for one GPU use --gpu",
        )
    return count, capacity(match[2], "--gpus")


def plan(planner: Planner, recipe: Recipe, text: str, given: str) -> SeveralGpus:
    """Plan a recipe for several GPUs.

    Args:
        text: Their number and memory, such as `2x24GB`.
        given: The recipe and its options as `run` takes them, for the command.

    Raises:
        UsageError: `text` is something else.
        RecipeError: They cannot share the recipe's batches equally.
    """
    count, size = parse(text)
    configs = trainer_configs.build(recipe, Path("plan"), stage_names(recipe.algorithm))
    trained = {"sft": configs.sft, **configs.reward}
    if recipe.algorithm != "best_of_n":
        trained[recipe.algorithm] = configs.policy
    _check_rows(trained, count)
    whole = planner.plan(recipe, size, Cards(count))
    reason = why_not(planner.whole(recipe))
    estimate = Estimate(planner, recipe, size, Cards(count, sharded=True))
    split = None if reason else estimate.plan()
    remedy = None
    if min(made.needed for made in (whole, split) if made is not None) > size:
        remedy = _remedy(planner, recipe, size, count, bool(reason))
    gradients = estimate.moments // 2
    given = re.sub(r" --set model\.shard=\S*", "", given)  # the command ends with the chosen one
    return SeveralGpus(
        count=count,
        capacity=size,
        whole=whole,
        split=split,
        why_not=reason,
        per_step=2 * (count - 1) * gradients // count,
        per_pass=(count - 1) * estimate.layers_split // count,
        start=f"torchrun --nproc_per_node {count} -m lora_rlhf run {given} "
        f"--out runs/{shlex.quote(recipe.name)}",
        splits=recipe.model.shard,
        remedy=remedy,
    )


def _check_rows(trained: dict[str, Any], count: int) -> None:
    """Check the micro-batches of all stages, and name all that cannot be shared in one error."""
    wrong: dict[str, RecipeError] = {}  # by its text: two reward models have the same arguments
    for stage, config in trained.items():
        try:
            trl_config.check_rows(stage, config, count)
        except RecipeError as error:
            wrong[str(error)] = error
    if len(wrong) > 1:
        rows = [f"  {one.given}; expected {one.expected}" for one in wrong.values()]
        raise RecipeError(
            f"the rows of {len(wrong)} stages cannot be shared equally:\n" + "\n".join(rows),
            remedy="change them, or the number of GPUs",
        )
    for one in wrong.values():
        raise one


def _remedy(
    planner: Planner, recipe: Recipe, size: int, count: int, only_whole: bool
) -> tuple[str, Fit] | None:
    """Find the way with the fewest changes; with equally many the base stays whole."""
    ways = {"whole": Cards(count)} | ({} if only_whole else {"split": Cards(count, True)})
    fits = [(way, fit(planner, recipe, size, cards)) for way, cards in ways.items()]
    fitting = [(way, fitted) for way, fitted in fits if fitted.changes is not None]
    return min(fitting, key=lambda pair: len(pair[1].changes or {}), default=None)
