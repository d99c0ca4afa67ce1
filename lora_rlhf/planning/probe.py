# SPDX-License-Identifier: Apache-2.0
"""`lora-rlhf plan RECIPE --probe`: the longest batches, once, for real: measured against planned.

PPO's phases are two updates of the real trainer on prompts and completions of the longest length:
two, since Adam's moments, half of what is trained twice over, are there from the second on. SFT and
reward model are one step each.

What is measured. On a GPU `torch.cuda.max_memory_allocated`, phase by phase. On a CPU the bytes of
live tensors, from the allocator's own events as torch's profiler reports them: each allocation and
each release with its size, scratch space inside kernels included, which counting tensors in Python
would miss. Resident set size is no measure of it: it holds Python, pages never touched are left
out, and what is released stays in it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile

from lora_rlhf.algorithms import reward_functions
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.algorithms.ppo.ppo_trainer import PPOTrainer
from lora_rlhf.errors import UsageError
from lora_rlhf.models import fused_layers
from lora_rlhf.models.backbone import MEMBERS, Backbone
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.training import microbatch_splitting

from . import dry_run
from . import plan as planning
from .memory_budget import Plan


@dataclass(frozen=True)
class Probed:
    """One phase, planned and measured, in bytes."""

    phase: str
    planned: int
    measured: int

    @property
    def error(self) -> float:
        """Planned over measured, less 1."""
        return self.planned / self.measured - 1


class Meter:
    """The highest number of tensor bytes between two laps."""

    def __init__(self, device: torch.device, resident: int) -> None:
        self.device, self.now = device, resident
        self._profile: Any = None

    def start(self) -> None:
        """Begin a lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()

    def lap(self) -> int:
        """End the lap; its peak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return int(torch.cuda.max_memory_allocated(self.device))
        self._profile.stop()
        found = self._profile.profiler.kineto_results.events()
        events = sorted((e for e in found if e.name() == "[memory]"), key=lambda e: e.start_ns())
        peak = self.now
        for event in events:
            self.now += event.nbytes()
            peak = max(peak, self.now)
        self._profile = None
        return peak


class _Laps(Progress):
    """Turns the phases that a trainer announces into laps of the meter."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(quiet=True)
        self.meter, self.peaks = meter, dict[str, int]()
        self._open = ""

    def phase(self, name: str) -> None:
        """The trainer begins rollout, score or update; an empty name ends the last."""
        if self._open:
            self.peaks[self._open] = max(self.peaks.get(self._open, 0), self.meter.lap())
        self._open = name
        if name:
            self.meter.start()


class _Endless(Backbone):
    """A backbone whose completions end at the longest only."""

    @property
    def eos_ids(self) -> list[int]:
        """None."""
        return []


class _Trainer(PPOTrainer):
    """PPO on prompts of the longest length, whatever their text."""

    longest = 0

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        token = self.backbone.tokenizer.eos_token_id
        # One is a token shorter: batches have padding, as real ones have.
        rows = [[token] * max(1, self.longest - (i == 0)) for i in range(len(prompts))]
        return rows, None, {}


def run(recipe: Recipe, planned: Plan) -> list[Probed]:
    """Load the base, add the roles, and go through the phases once.

    Args:
        recipe: One of PPO.
        planned: Its plan for the device that is here.

    Raises:
        UsageError: The recipe's algorithm is another.
        BaseModelError: The base cannot be loaded.
    """
    if recipe.algorithm != "ppo":
        raise UsageError(
            f"--probe of a recipe whose algorithm is {recipe.algorithm}",
            expected="ppo",
            remedy="--set algorithm=ppo",
        )
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    backbone = _Endless.load(recipe.model, recipe.lora)
    backbone.add_role("policy")
    meter = Meter(backbone.device, backbone.memory_report()["total"])
    measured = {}
    work = planning.Work(planning.Planner(backbone.causal.config, planned.device), recipe, None)
    measured["sft"] = _step(recipe, backbone, meter, dry_run.language_model, work.sft_batch)
    backbone.copy_role("policy", "reference")
    for role in [r for r in planned.roles if r in MEMBERS or r == "held_out"]:
        backbone.add_role(role, copy_from="reference")
    meter.now = backbone.memory_report()["total"]
    if "reward" in planned.phases:
        measured["reward"] = _step(recipe, backbone, meter, dry_run.ranking, work.reward_batch)
    ppo_stage.start_roles(backbone, recipe)
    meter.now = backbone.memory_report()["total"]
    peaks = _updates(recipe, backbone, meter)
    measured |= {
        f"ppo {name}": peaks[phase]
        for name, phase in (("sampling", "rollout"), ("scoring", "score"), ("update", "update"))
    }
    return [
        Probed(name, phase.total, measured[name])
        for name, phase in planned.phases.items()
        if name in measured
    ]


def _step(
    recipe: Recipe,
    backbone: Backbone,
    meter: Meter,
    phase: dry_run.Phase,
    batch: dry_run.Batch,
) -> int:
    """Forward and backward of one batch, Adam's moments being there."""
    role = "reward" if phase is dry_run.ranking else "policy"
    checkpointing = recipe.model.gradient_checkpointing
    with (
        _moments(backbone, role, meter),
        dry_run.stage(backbone, (role,), checkpointing=checkpointing),
    ):
        meter.start()
        with microbatch_splitting.in_one_block(dry_run.trained(backbone)):
            phase(backbone, batch)
        return meter.lap()


@contextlib.contextmanager
def _moments(backbone: Backbone, role: str, meter: Meter) -> Iterator[None]:
    held = [torch.zeros_like(p) for _, p in backbone.role_parameters(role) for _ in range(2)]
    meter.now += sum(t.nbytes for t in held)
    yield
    held.clear()


def _updates(recipe: Recipe, backbone: Backbone, meter: Meter) -> dict[str, int]:
    """The peaks of two PPO updates by phase; every start-up identity is checked on the way."""
    section = recipe.ppo.model_copy(
        update={"updates": 2, "value_warmup_updates": 0, "watch": "off", "kl_budget": None}
    )
    section.args["num_iterations"] = 1
    recipe = recipe.model_copy(update={"ppo": section})
    with tempfile.TemporaryDirectory(prefix="lora-rlhf-probe-") as folder:
        args = ppo_stage.arguments(recipe, Path(folder))
        prompts = Dataset.from_list([{"prompt": f"{i}"} for i in range(args.generation_batch_size)])
        functions, args.reward_weights = reward_functions.of_recipe(recipe, backbone, prompts)
        laps = _Laps(meter)
        with backbone.training("policy", "value"):
            trainer = _Trainer(backbone, args, section, functions, prompts, cast(Progress, laps))
            trainer.longest = recipe.data.max_prompt_tokens
            with fused_layers.layers(backbone):
                trainer.train()
            laps.phase("")
    return laps.peaks
