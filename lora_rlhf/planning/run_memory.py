# SPDX-License-Identifier: Apache-2.0
"""Memory of a run: its plan before it starts, its measured peak, and remedies when it runs out."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import psutil
import torch

from lora_rlhf.distributed.world import world
from lora_rlhf.errors import MemoryLimitError, first_line
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runtime.oom import is_out_of_memory

from . import bases, gpu_fit
from .memory_budget import LOADED_LATER, Plan, format_bytes
from .plan import Cards, Planner, planner_for

_REMEDY_KEYS = (
    "model.gradient_checkpointing, ppo.trunk_states: cpu, evaluate.batch_size, shorter lengths, "
    "lora.r, lora.top_fraction, model.load_in_4bit"
)


def _planner_here(recipe: Recipe) -> tuple[Planner, int | None]:
    """Return a planner for the device of this machine, and the bytes of its GPU if it has one."""
    config, _ = bases.config_of(recipe.model)
    if not torch.cuda.is_available():
        return planner_for(config, "cpu"), None
    return planner_for(config, "cuda"), torch.cuda.mem_get_info()[1]


def before_run(recipe: Recipe) -> tuple[Plan | None, str]:
    """Plan a run for this machine, with a line about the plan; an error does not stop the run."""
    try:
        planner, total = _planner_here(recipe)
        plan = planner.plan(recipe, total, Cards(world().size, recipe.model.shard))
    except Exception as error:
        return None, f"plan: none ({type(error).__name__}: {first_line(error):.120})"
    peak = f"{format_bytes(plan.peak)} at the peak ({plan.worst}, with the longest texts allowed)"
    if total is None:
        own = psutil.Process().memory_info().rss
        whole = f"{format_bytes(plan.peak + own + LOADED_LATER)} with the {format_bytes(own)}"
        more = f"{whole} held already and {format_bytes(LOADED_LATER)} for what is loaded later"
        return plan, f"plan: {peak} in tensors on the CPU, {more}"
    free = torch.cuda.mem_get_info()[0]
    line = f"plan: {peak}, {format_bytes(plan.needed)} with CUDA's own, {format_bytes(free)} free"
    if plan.needed > free:
        line = f"warning: {line}: it may not fit; `lora-rlhf plan` says what to change"
    return plan, line


class PeakMemory:
    """Peak memory since the object was made, in the quantity that was planned.

    On a GPU that is the tensors; on a CPU the whole process, because torch counts no tensors there.
    """

    def __init__(self, planned: Plan | None = None) -> None:
        self._gpu = torch.cuda.is_available()
        own = 0
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            own = psutil.Process().memory_info().rss + LOADED_LATER
        self.planned = planned and planned.peak + own

    @property
    def quantity(self) -> str:
        """Name of the measured quantity."""
        if self._gpu:
            return "torch.cuda.max_memory_allocated"
        return "highest resident set of the process"

    def read(self) -> int:
        """Return the peak in bytes."""
        if self._gpu:
            return int(torch.cuda.max_memory_allocated())
        return _highest_resident_set()

    def line(self) -> str:
        """Return the measured peak beside the planned one."""
        planned = f", {format_bytes(self.planned)} planned" if self.planned else ""
        return f"measured: {format_bytes(self.read())} at the peak{planned} ({self.quantity})"


def return_freed() -> None:
    """Give memory that is freed back to the system, so that a stage's peak is its own.

    glibc keeps it (140 MB after SFT of the tiny model), and no tensor is there. Other C libraries
    have no such function.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _highest_resident_set() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(highest) * (1 if sys.platform == "darwin" else 1024)


def memory_limit(recipe: Recipe, error: BaseException) -> MemoryLimitError | None:
    """Turn an error for lack of memory into one with remedies; return None for any other error."""
    if isinstance(error, MemoryLimitError):
        given, expected = error.given, error.expected
    elif is_out_of_memory(error):
        given, expected = f"memory ran out: {first_line(error)}", ""
    else:
        return None
    return MemoryLimitError(
        given,
        expected=expected,
        remedy="in a new --out, change one or more of these; what is saved stays\n"
        + remedies(recipe),
    )


def remedies(recipe: Recipe) -> str:
    """Tabulate single recipe changes that save memory, with their planned peaks on this machine."""
    try:
        planner, total = _planner_here(recipe)
        least = gpu_fit.changed(recipe, gpu_fit.one_row(planner, recipe, total))
        plan = planner.plan(least, total)
        rows = [("nothing, one row at once", format_bytes(plan.peak), plan.worst)]
        steps = (gpu_fit.checkpointing, gpu_fit.trunk_on_cpu, gpu_fit.lengths, gpu_fit.rank)
        for step in (*steps, gpu_fit.fraction, gpu_fit.four_bit):
            if changes := step(planner, least, plan):
                other = planner.plan(gpu_fit.changed(least, changes), total)
                options = " ".join(gpu_fit.as_options(changes))
                rows.append((options, format_bytes(other.peak), other.worst))
    except Exception:  # without a plan, the names of the keys still help
        return f"    {_REMEDY_KEYS}"
    width = max(len(options) for options, _, _ in rows)
    lines = [f"    {options:{width}}  {peak:>9}  {phase}" for options, peak, phase in rows]
    return "\n".join([f"    {'change':{width}}  planned peak, in tensors", *lines])
