# SPDX-License-Identifier: Apache-2.0
"""`lora-rlhf plan RECIPE --probe`: run the longest batches for real, and compare with the plan.

PPO runs two updates of the real trainer on prompts and completions of the longest length, because
Adam's moments exist from the second update on. SFT and reward model run one step each.

On a GPU, `torch.cuda.max_memory_allocated` is read after each phase. On a CPU, the bytes of live
tensors are added up from the allocator's events in torch's profiler, which include scratch space
inside kernels. Resident set size is not comparable: it includes Python and released memory, and
omits pages never touched.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from .memory_budget import Plan
from .plan import Estimate, Planner


@dataclass(frozen=True)
class Probed:
    """Bytes of one phase, planned and measured."""

    phase: str
    planned: int
    measured: int

    @property
    def ratio(self) -> float:
        """Planned over measured bytes."""
        return self.planned / self.measured


class Meter:
    """Measures the peak of tensor bytes, lap by lap."""

    def __init__(self, device: torch.device, resident: int) -> None:
        self.device, self.now = device, resident
        self._profile: Any = None

    def start(self) -> None:
        """Start a lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()

    def lap(self) -> int:
        """End the lap and return its peak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return int(torch.cuda.max_memory_allocated(self.device))
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()
        memory = [event for event in events if event.name() == "[memory]"]
        peak = self.now
        for event in sorted(memory, key=lambda event: event.start_ns()):
            self.now += event.nbytes()
            peak = max(peak, self.now)
        self._profile = None
        return peak


class _Laps(Progress):
    """Measures each phase that a trainer announces as a lap."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(quiet=True)
        self.meter, self.peaks = meter, dict[str, int]()
        self._open = ""

    def phase(self, name: str) -> None:
        """Start a phase: rollout, score or update; an empty name ends the last one."""
        if self._open:
            self.peaks[self._open] = max(self.peaks.get(self._open, 0), self.meter.lap())
        self._open = name
        if name:
            self.meter.start()


class _Endless(Backbone):
    """Backbone without end-of-sequence tokens, so that all completions have the full length."""

    @property
    def eos_ids(self) -> list[int]:
        """End-of-sequence tokens: none."""
        return []


class _Trainer(PPOTrainer):
    """PPO trainer that replaces every prompt by one of the full length."""

    longest = 0

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        token = self.backbone.tokenizer.eos_token_id
        # One prompt is a token shorter, so that batches have padding, as in a real run.
        rows = [[token] * max(1, self.longest - (i == 0)) for i in range(len(prompts))]
        return rows, None, {}


def run(recipe: Recipe, planned: Plan) -> list[Probed]:
    """Load the base, run each phase, and compare with `planned`, the plan for this machine.

    Raises:
        UsageError: The recipe's algorithm is not PPO.
        BaseModelError: The base cannot be loaded.
    """
    if recipe.algorithm != "ppo":
        raise UsageError(
            f"--probe cannot measure a recipe whose algorithm is {recipe.algorithm}",
            expected="algorithm: ppo",
            remedy="add --set algorithm=ppo",
        )
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    backbone = _Endless.load(recipe.model, recipe.lora)
    backbone.add_role("policy")
    meter = Meter(backbone.device, backbone.memory_report()["total"])
    measured = {}
    planner = Planner(backbone.causal.config, planned.device)
    batches = Estimate(planner, recipe, None)
    measured["sft"] = _step(recipe, backbone, meter, dry_run.language_model, batches.sft_batch)
    backbone.copy_role("policy", "reference")
    for role in [r for r in planned.roles if r in MEMBERS or r == "held_out"]:
        backbone.add_role(role, copy_from="reference")
    meter.now = backbone.memory_report()["total"]
    if "reward" in planned.phases:
        measured["reward"] = _step(recipe, backbone, meter, dry_run.ranking, batches.reward_batch)
    ppo_stage.start_roles(backbone, recipe)
    meter.now = backbone.memory_report()["total"]
    peaks = _updates(recipe, backbone, meter)
    measured |= {"ppo sampling": peaks["rollout"], "ppo scoring": peaks["score"]}
    measured |= {"ppo update": peaks["update"]}
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
    """Run forward and backward of one batch, with Adam's moments allocated."""
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
    """Run two PPO updates, start-up identities included; return the peak of each phase."""
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
            trainer = _Trainer(
                backbone,
                args=args,
                ppo=section,
                reward_funcs=functions,
                train_dataset=prompts,
                progress=laps,
            )
            trainer.longest = recipe.data.max_prompt_tokens
            with fused_layers.layers(backbone):
                trainer.train()
            laps.phase("")
    return laps.peaks
