# SPDX-License-Identifier: Apache-2.0
"""What `lora-rlhf plan` says: the phases, the cards, and planned against measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from lora_rlhf.models.loading import find_config
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.reports.tables import aligned

from . import probe as probing
from .gpu_fit import Fit, as_yaml, capacity, fit, planner, size
from .memory_budget import CUDA_CONTEXT, FRAGMENTATION, Plan
from .probe import Probed

GPUS = (8, 12, 16, 24)
"""Cards of the table, in GB."""


@dataclass(frozen=True)
class Report:
    """What `lora-rlhf plan` says.

    Attributes:
        plan: For the card, or for the device that is here.
        cards: The card that was asked about, or those of the table.
        asked: Whether one was.
        probed: Planned against measured, where that was asked for.
    """

    plan: Plan
    cards: list[Fit]
    asked: bool
    probed: list[Probed]

    @property
    def fits(self) -> bool:
        """Whether the recipe fits every card as it is."""
        return all(card.changes == {} for card in self.cards)

    def as_json(self) -> str:
        """For machines; bytes are whole numbers."""
        told = {
            "plan": self.plan.as_dict(),
            "cards": [
                {
                    "bytes": c.capacity,
                    "fits": c.changes == {},
                    "changes": c.changes,
                    "needed": c.plan.needed,
                    "largest_micro_batch": c.micro_batch,
                }
                for c in self.cards
            ],
            "probe": [
                {"phase": p.phase, "planned": p.planned, "measured": p.measured}
                for p in self.probed
            ],
        }
        return json.dumps(told, indent=1)

    def as_text(self) -> str:
        """For people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        plan = self.plan
        parts = [f"backbone {size(plan.backbone)}"]
        parts += [f"{role} {size(count)}" for role, count in plan.roles.items()]
        yield f"planned for {plan.device} in {plan.dtype}: {', '.join(parts)}"
        yield (
            f"Adam's moments {size(plan.optimizer)}, gradients {size(plan.optimizer // 2)} and "
            f"the LM head {size(plan.logits)} among the activations of an update"
        )
        yield ""
        yield from aligned(*_phases(plan))
        yield ""
        if plan.device != "cpu":
            yield (
                f"{size(plan.peak)} at the peak take a card of {size(plan.needed)}: "
                f"{100 * FRAGMENTATION:g} % for fragmentation and {size(CUDA_CONTEXT)} for CUDA's "
                "context are assumed"
            )
        if self.asked:
            yield from _verdict(self.cards[0])
        else:
            yield from aligned(*_cards(self.cards))
        if self.probed:
            yield ""
            yield from aligned(
                ["phase", "planned", "measured", "planned/measured"],
                [
                    [p.phase, size(p.planned), size(p.measured), f"{1 + p.error:.3f}"]
                    for p in self.probed
                ],
            )


def report(recipe: Recipe, folder: Path, gpu: str | None, *, probe: bool) -> Report:
    """Plan a recipe: for one card, or for the device that is here and a table of cards.

    Args:
        recipe: Any algorithm.
        folder: The recipe's own.
        gpu: Memory of the card.
        probe: Whether to load the base and measure, on the device that is here.

    Raises:
        BaseModelError: The base's config is not to be found, or it is no causal language model.
        UsageError: `gpu` is no size.
    """
    sizes = [capacity(gpu)] if gpu is not None else [n * 10**9 for n in GPUS]
    config = find_config(recipe.model, folder)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    cards = [fit(planner(config, "cuda"), recipe, one) for one in sizes]
    device = "cuda" if gpu is not None else here
    plan = planner(config, device).plan(recipe, sizes[0] if gpu is not None else None)
    probed: list[Probed] = []
    if probe:
        room = torch.cuda.mem_get_info()[1] if here == "cuda" else None
        probed = probing.run(recipe, planner(config, here).plan(recipe, room))
    return Report(plan, cards, gpu is not None, probed)


def _phases(plan: Plan) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, phase in plan.phases.items():
        parts = (phase.resident, phase.kv_cache, phase.trunk, phase.activations)
        mark = "  <- peak" if name == plan.worst else ""
        rows.append(
            [name, *(size(part) if part else "-" for part in parts), size(phase.total) + mark]
        )
    return ["phase", "resident", "KV cache", "trunk states", "activations", "total"], rows


def _cards(found: list[Fit]) -> tuple[list[str], list[list[str]]]:
    header = [
        "GPU",
        "as it is",
        "needs",
        "batch",
        "prompt+completion",
        "rank",
        "checkpointing",
        "adapted",
        "4-bit",
        "largest micro-batch",
    ]
    rows = []
    for one in found:
        recipe, plan = one.recipe, one.plan
        name = f"{one.capacity / 10**9:g} GB"
        settings = [
            str(plan.micro_batch),
            f"{plan.prompt}+{plan.completion}",
            str(recipe.lora.r),
            "yes" if recipe.model.gradient_checkpointing else "no",
            f"{recipe.lora.top_fraction:g}",
            "yes" if recipe.model.load_in_4bit else "no",
            "-" if one.micro_batch is None else str(one.micro_batch),
        ]
        told = "fits" if one.changes == {} else "fits with" if one.changes else "does not fit"
        rows.append([name, told, size(plan.needed), *settings])
    return header, rows


def _verdict(one: Fit) -> Iterator[str]:
    """Whether a recipe fits a card, and what to change where it does not."""
    card = f"{one.capacity / 10**9:g} GB"
    if one.changes is None:
        yield f"does not fit {card}, not even as far as it could be cut: {size(one.plan.needed)}"
        return
    if one.changes:
        yield f"does not fit {card} as it is; with these changes it takes {size(one.plan.needed)}:"
        yield from (f"  --set {key}={as_yaml(value)}" for key, value in one.changes.items())
    else:
        yield f"fits {card}"
    if one.micro_batch is not None:
        yield f"largest per_device_train_batch_size of the policy's updates: {one.micro_batch}"
