# SPDX-License-Identifier: Apache-2.0
"""Output of `lora-rlhf plan`: phases, GPUs, and planned against measured bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from lora_rlhf.errors import UsageError
from lora_rlhf.recipe.loader import check_recipe
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.reports.tables import aligned
from lora_rlhf.runtime import quiet

from . import bases, several_gpus
from . import probe as probing
from .gpu_fit import Fit, as_options, capacity, fit
from .memory_budget import CUDA_CONTEXT, FRAGMENTATION, Plan, format_bytes
from .plan import planner_for
from .probe import Probed
from .scale import Network, Scale, model
from .several_gpus import SeveralGpus

GPUS = (8, 12, 16, 24)
"""GPUs of the table, in GB."""


@dataclass(frozen=True)
class Report:
    """A planned recipe.

    Attributes:
        plan: Plan for the named GPU, or for the device of this machine.
        gpus: The named GPU, or the GPUs of the table.
        named: Whether the user named a GPU.
        probed: Planned and measured bytes, with --probe.
        scale: An update's time on several workers, with --workers.
        several: The recipe on several GPUs, with --gpus.
        shape_of: Base whose shape is from the table of `init`, because its config is not here.
    """

    plan: Plan
    gpus: list[Fit]
    named: bool
    probed: list[Probed]
    scale: Scale | None = None
    several: SeveralGpus | None = None
    shape_of: str | None = None

    @property
    def fits(self) -> bool:
        """True if the recipe fits every GPU, or the several ones, as it is."""
        if self.several is not None:
            return self.several.choice is not None
        return all(fitted.unchanged for fitted in self.gpus)

    def as_json(self) -> str:
        """Return the report for machines; bytes are whole numbers."""
        gpus = [
            {
                "bytes": fitted.capacity,
                "fits": fitted.unchanged,
                "changes": fitted.changes,
                "needed": fitted.plan.needed,
                "largest_micro_batch": fitted.micro_batch,
            }
            for fitted in self.gpus
        ]
        probed = [asdict(phase) for phase in self.probed]
        made = {"plan": self.plan.as_dict(), "cards": gpus, "probe": probed}
        scale = {"scale": self.scale.as_dict()} if self.scale else {}
        several = {"several": self.several.as_dict()} if self.several else {}
        shape = {"shape_from_the_table_of_init": self.shape_of} if self.shape_of else {}
        return json.dumps(made | scale | several | shape, indent=1)

    def as_text(self) -> str:
        """Return the report for people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        plan = self.plan
        parts = {"backbone": plan.backbone, **plan.roles}
        sizes = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items())
        where = plan.device
        if self.several:
            base = "split" if plan is self.several.split else "whole"
            where = f"each of {self.several.count} GPUs, with the base {base},"
        yield f"planned for {where} in {plan.dtype}: {sizes}"
        if self.shape_of:
            yield (
                f"{self.shape_of} is not on this machine: its shape is from the table that `init` "
                "uses; a run needs the base itself"
            )
        moments, gradients = format_bytes(plan.optimizer), format_bytes(plan.optimizer // 2)
        yield (
            f"Adam's moments {moments}; in the activations of an update: gradients {gradients}, "
            f"LM head {format_bytes(plan.logits)}"
        )
        yield ""
        yield from aligned(*_phases(plan))
        yield ""
        if plan.device != "cpu":
            yield (
                f"a peak of {format_bytes(plan.peak)} needs a GPU of {format_bytes(plan.needed)}, "
                f"assuming {100 * FRAGMENTATION:g} % for fragmentation and "
                f"{format_bytes(CUDA_CONTEXT)} for CUDA's context"
            )
        if self.several:
            yield from self.several.lines()
        elif self.named:
            yield from _verdict(self.gpus[0])
        else:
            yield from aligned(*_gpus(self.gpus))
        if self.probed:
            yield ""
            rows = [
                [p.phase, format_bytes(p.planned), format_bytes(p.measured), f"{p.ratio:.3f}"]
                for p in self.probed
            ]
            yield from aligned(["phase", "planned", "measured", "planned/measured"], rows)
        if self.scale:
            yield ""
            yield from self.scale.lines()


@quiet.libraries()
def report(
    recipe: Recipe,
    folder: Path,
    gpu: str | None,
    *,
    gpus: str | None = None,
    given: str = "recipe.yaml",
    probe: bool,
    workers: int | None = None,
    network: tuple[str, str] = ("1Gbit", "0.1ms"),
    runs: Sequence[str | Path] = (),
) -> Report:
    """Plan a recipe for one GPU, or for the device of this machine and a table of GPUs.

    Args:
        folder: Folder of the recipe; a config.json in it is used.
        gpu: Memory of the GPU, such as "16GB".
        gpus: Several equal ones, such as "2x24GB", in place of `gpu`.
        given: The recipe and its options as `run` takes them, for the command that starts a run on
            several GPUs.
        probe: Whether to load the base and measure on this machine.
        workers: Model an update's time on up to so many data-parallel workers.
        network: Speed and latency of each worker's link.
        runs: Runs of the recipe's model, for the seconds of that model.

    Raises:
        BaseModelError: The base has no config, or is not a causal language model.
        UsageError: `gpu` is not a size, `gpus` is not a number of equal GPUs, or there are both.
        RecipeError: The processes on several GPUs cannot share the batches equally.
    """
    if gpus is not None and (gpu is not None or probe):
        raise UsageError(
            f"--gpus and {'--gpu' if gpu is not None else '--probe'} exclude each other",
            remedy="leave one of them out",
        )
    link = Network.parse(*network)
    capacities = [capacity(gpu)] if gpu is not None else [n * 10**9 for n in GPUS]
    check_recipe(recipe)
    config, in_table = bases.config_of(recipe.model, folder)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    several = None
    if gpus is not None:
        several = several_gpus.plan(planner_for(config, "cuda"), recipe, gpus, given)
        capacities = []
    fitted = [fit(planner_for(config, "cuda"), recipe, size) for size in capacities]
    if several is not None:
        plan = several.split if several.choice == "split" and several.split else several.whole
    elif gpu is not None:
        plan = planner_for(config, "cuda").plan(recipe, capacities[0])
    else:
        plan = planner_for(config, here).plan(recipe)
    probed: list[Probed] = []
    if probe:
        total = torch.cuda.mem_get_info()[1] if here == "cuda" else None
        probed = probing.run(recipe, planner_for(config, here).plan(recipe, total))
    scale = None if workers is None else model(config, recipe, plan, runs, workers, link)
    shape_of = recipe.model.id if in_table else None
    return Report(plan, fitted, gpu is not None, probed, scale, several, shape_of)


def _phases(plan: Plan) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, phase in plan.phases.items():
        parts = (phase.resident, phase.kv_cache, phase.trunk_states, phase.activations)
        mark = "  <- peak" if name == plan.worst else ""
        cells = [format_bytes(part) if part else "-" for part in parts]
        rows.append([name, *cells, format_bytes(phase.total) + mark])
    return ["phase", "resident", "KV cache", "trunk states", "activations", "total"], rows


def _gpus(gpus: list[Fit]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for fitted in gpus:
        recipe, plan = fitted.recipe, fitted.plan
        verdict = "fits" if fitted.unchanged else "fits with" if fitted.changes else "does not fit"
        rows.append(
            [
                f"{fitted.capacity / 10**9:g} GB",
                verdict,
                format_bytes(plan.needed),
                str(plan.micro_batch),
                f"{plan.prompt}+{plan.completion}",
                str(recipe.lora.r),
                "yes" if recipe.model.gradient_checkpointing else "no",
                f"{recipe.lora.top_fraction:g}",
                "yes" if fitted.is_4bit else "no",
                "-" if fitted.micro_batch is None else str(fitted.micro_batch),
            ]
        )
    head = ["GPU", "as it is", "needs", "batch", "prompt+completion", "rank", "checkpointing"]
    return [*head, "adapted", "4-bit", "largest micro-batch"], rows


def _verdict(fitted: Fit) -> Iterator[str]:
    gpu, needed = f"{fitted.capacity / 10**9:g} GB", format_bytes(fitted.plan.needed)
    if fitted.changes is None:
        yield f"does not fit {gpu}, even with every change that is tried: it needs {needed}"
        return
    if fitted.changes:
        yield f"does not fit {gpu} as it is; with these changes it needs {needed}:"
        yield from (f"  {option}" for option in as_options(fitted.changes))
    else:
        yield f"fits {gpu}"
    if fitted.micro_batch is not None:
        yield f"largest per_device_train_batch_size of the policy's updates: {fitted.micro_batch}"
