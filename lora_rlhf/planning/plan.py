# SPDX-License-Identifier: Apache-2.0
"""Plan the memory of a recipe from the base's config alone; no weights are loaded.

    resident      backbone (4-bit or not), LoRA and heads of each role, Adam's two moments
    KV cache      keys and values of every layer for the rows that are sampled at once
    trunk states  hidden states that leave the frozen layers, of one rollout
    activations   what a forward and backward hold besides: counted by dry_run.py

All in bytes. The peak of a phase is the sum at its worst moment; the plan's peak is the highest of
all phases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from lora_rlhf.algorithms import rollout, trainer_configs
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.models import sharded_layers
from lora_rlhf.models.backbone import MEMBERS
from lora_rlhf.models.memory import held_tensors, tensor_bytes
from lora_rlhf.recipe.schema import LoraSection, Recipe
from lora_rlhf.recipe.stage_keys import has_reward_model, stage_names
from lora_rlhf.runtime.devices import pick_dtype

from . import dry_run, meta_backbone
from .dry_run import Batch
from .memory_budget import CUDA_CONTEXT, Phase, Plan

_SCORED = 32
"""Episodes that a reward model scores at once (scoring.scores)."""

_TRUNK_COPIES = 2
"""Copies of a rollout's trunk states: parts and whole in sampling, single episodes and the whole in
scoring, the rollout and its shuffled copy in updates."""

_MOST_LAYERS = 4
"""Adapted layers that are run; the bytes per layer are extrapolated, and are the same from two on.

Nearly all the time of a plan goes into the operations of these layers, about 0.2 ms each.
"""

_KEPT_PLANNERS = 4
"""Planners in memory; the oldest is dropped."""


class Cards(NamedTuple):
    """Processes that share the rows of every batch; the base's layers may be split between them."""

    processes: int = 1
    sharded: bool = False

    def rows(self, count: int) -> int:
        """Return the most rows of one process."""
        return -(-count // self.processes)


ONE_CARD = Cards()


@dataclass
class Planner:
    """Plans recipes on one base and device; a phase that recipes have in common is counted once."""

    config: Any
    device: str
    _backbones: dict[Any, meta_backbone.MetaBackbone] = field(default_factory=dict)
    _counts: dict[Any, int] = field(default_factory=dict)

    def plan(self, recipe: Recipe, capacity: int | None = None, cards: Cards = ONE_CARD) -> Plan:
        """Plan a recipe.

        Args:
            capacity: Bytes of the GPU, on which a rollout may be sampled in parts; None: unlimited.
            cards: The processes of the run; the plan is that of one of them.

        Raises:
            RecipeError: The `args:` of a stage are not valid.
        """
        return Estimate(self, recipe, capacity, cards).plan()

    def dtype(self, recipe: Recipe) -> torch.dtype:
        """Return the compute dtype of a recipe on this device."""
        name = recipe.model.dtype
        if name == "auto":
            return torch.float32 if self.device == "cpu" else torch.bfloat16
        return pick_dtype(name)

    def backbone(self, recipe: Recipe, layers: int, adapted: int) -> meta_backbone.MetaBackbone:
        """Build the base with this many layers, the upper ones adapted, and all roles."""
        model, dtype = recipe.model, self.dtype(recipe)
        # Half a layer less, which is rounded up to `adapted` in spite of errors of the division.
        lora = recipe.lora.model_copy(update={"top_fraction": (adapted - 0.5) / layers})
        quantised = meta_backbone.is_4bit(model, self.config)
        key = (layers, adapted, lora.r, str(lora.target_modules), quantised, dtype)
        if key not in self._backbones:
            config = meta_backbone.with_layers(self.config, layers)
            made = meta_backbone.backbone(config, model, lora, dtype)
            for role in ("policy", "reward", "value"):
                made.add_role(role)
            self._backbones[key] = made
        return self._backbones[key]

    def whole(self, recipe: Recipe) -> meta_backbone.MetaBackbone:
        """Build the base with all its layers, without a role."""
        quantised = meta_backbone.is_4bit(recipe.model, self.config)
        key = ("whole", quantised, self.dtype(recipe))
        if key not in self._backbones:
            self._backbones[key] = meta_backbone.backbone(
                self.config, recipe.model, LoraSection(), self.dtype(recipe)
            )
        return self._backbones[key]

    def count(
        self, recipe: Recipe, phase: dry_run.Phase, batch: Batch, trained: tuple[str, ...] = ()
    ) -> int:
        """Count the bytes of a phase beyond resident ones and KV cache, at full depth."""
        total = int(self.config.get_text_config().num_hidden_layers)
        adapted = math.ceil(total * recipe.lora.top_fraction)
        below = min(total - adapted, 1)
        checkpointing = bool(trained) and recipe.model.gradient_checkpointing

        def count_with(layers: int) -> int:
            backbone = self.backbone(recipe, below + layers, layers)
            key = (id(backbone), phase, batch, trained, checkpointing)
            if key not in self._counts:
                causal = backbone.causal
                cached = self.kv_cache(causal.config, batch, causal.dtype, phase)
                with dry_run.stage(backbone, trained, checkpointing=checkpointing):
                    count = dry_run.count(backbone, self.device, batch, phase)
                self._counts[key] = count - cached
            return self._counts[key]

        if not trained:
            # Without gradients nothing is saved per layer: two layers peak as high as all.
            return count_with(min(adapted, 2))
        if adapted <= _MOST_LAYERS:
            return count_with(adapted)
        few, more = count_with(_MOST_LAYERS - 2), count_with(_MOST_LAYERS)
        return more + (more - few) * (adapted - _MOST_LAYERS) // 2

    @staticmethod
    def kv_cache(config: Any, batch: Batch, dtype: torch.dtype, phase: Any) -> int:
        """Return the bytes of keys and values after a phase of sampling; 0 for other phases."""
        tokens = {dry_run.prefill: batch.prompt, dry_run.decode: batch.tokens}.get(phase, 0)
        heads, width = dry_run.kv_shape(config)
        layers = DynamicCache(config=config).layers or [None] * config.num_hidden_layers
        windows = (getattr(layer, "sliding_window", None) for layer in layers)
        cached = sum(min(tokens, window or tokens) for window in windows)
        return batch.rows * 2 * heads * width * dtype.itemsize * cached


_PLANNERS: dict[tuple[str, str], Planner] = {}


def planner_for(config: Any, device: str) -> Planner:
    """Return the planner of a base on a device, with its counts for earlier recipes."""
    shape = config.to_dict() | {"_name_or_path": ""}  # a copy of a base has the same plans
    key = repr(shape), device
    planner = _PLANNERS.pop(key, None) or Planner(config, device)
    if len(_PLANNERS) >= _KEPT_PLANNERS:
        _PLANNERS.pop(next(iter(_PLANNERS)))  # the one not used for longest
    _PLANNERS[key] = planner
    return planner


class Estimate:
    """Memory of one recipe, phase by phase.

    Attributes:
        layers_split: Bytes of the layers' weights that are split between processes, in all of them.
    """

    def __init__(
        self, planner: Planner, recipe: Recipe, capacity: int | None, cards: Cards = ONE_CARD
    ) -> None:
        self.planner, self.recipe, self.capacity = planner, recipe, capacity
        self.cards, self.layers_split = cards, 0
        self.dtype = planner.dtype(recipe)
        configs = trainer_configs.build(recipe, Path("plan"), stage_names(recipe.algorithm))
        self.sft, self.policy = configs.sft, configs.policy
        self.reward: Any = configs.reward.get("reward")
        self.prompt = recipe.data.max_prompt_tokens
        self.completion = ppo_stage.completion_limit(recipe, recipe.algorithm)
        text = planner.config.get_text_config()
        self.layers, self.hidden = int(text.num_hidden_layers), int(text.hidden_size)
        self.adapted = math.ceil(self.layers * recipe.lora.top_fraction)
        self._measure_weights()

    def _measure_weights(self) -> None:
        """Count the bytes that are resident: backbone, roles and moments."""
        recipe = self.recipe
        quantised = meta_backbone.is_4bit(recipe.model, self.planner.config)
        whole = self.planner.whole(recipe)
        held = [*whole.causal.parameters(), *whole.causal.buffers()]
        self.backbone = tensor_bytes([t for p in held for t in held_tensors(p)])
        if self.cards.sharded:  # a part of each layer, and one that is put together
            split = [
                tensor_bytes(m.weight.data for m in sharded_layers.matrices(layer))
                for layer in whole.layers
            ]
            self.layers_split = sum(split)
            self.backbone += self.cards.rows(self.layers_split) + max(split) - self.layers_split
        shapes = meta_backbone.adapted_shapes(whole, self.adapted, recipe.lora.target_modules)
        self.adapter = 4 * recipe.lora.r * sum(a + b for a, b in shapes)
        # A weight that is being quantised is in memory in 16 bits too; other loading copies none.
        largest = max(a * b for a, b in shapes) * self.dtype.itemsize
        self.loading = largest if quantised else 0
        # PEFT keeps the initial head beside the trained one.
        self.head = 2 * 4 * self.hidden
        self.roles = self._roles()
        trained = {"ppo": ("policy", "value"), "best_of_n": ()}.get(recipe.algorithm, ("policy",))
        self.moments = 2 * sum(self.roles[role] for role in trained)
        averaged = recipe.algorithm == "ppo" and (recipe.ppo.ema or recipe.ppo.watch == "best")
        self.resident = self.backbone + sum(self.roles.values()) + self.adapter * bool(averaged)

    def _roles(self) -> dict[str, int]:
        """Return the bytes of each role in the last training stage."""
        recipe = self.recipe
        scored = self.adapter + self.head
        roles = dict.fromkeys(("policy", "reference"), self.adapter)
        if has_reward_model(recipe):
            roles |= dict.fromkeys(MEMBERS[: recipe.reward.ensemble or 1], scored)
            if recipe.reward.held_out_model:
                roles["held_out"] = scored
        if recipe.algorithm == "ppo":
            alone = recipe.ppo.value == "head"
            roles["value"] = self.head // 2 + 4 if alone else scored + 8
        return roles

    @property
    def trunk_states(self) -> int:
        """Bytes of one copy of a rollout's trunk states; 0 if none are kept."""
        section = self.recipe.ppo
        off = self.recipe.algorithm != "ppo" or section.trunk_states == "off"
        if off or self.adapted == self.layers:
            return 0
        rows = self.cards.rows(self.policy.generation_batch_size)
        tokens = rows * (self.prompt + self.completion)
        return int(tokens * self.hidden * self.dtype.itemsize)

    @property
    def kept_states(self) -> int:
        """Bytes of trunk states on the device after a rollout is sampled."""
        on_host = self.recipe.ppo.trunk_states == "cpu" and self.planner.device != "cpu"
        return 0 if on_host else _TRUNK_COPIES * self.trunk_states

    @property
    def sft_batch(self) -> Batch:
        """Longest micro-batch of SFT."""
        tokens = self.recipe.data.max_tokens
        return Batch(self.cards.rows(self.sft.per_device_train_batch_size), 1, tokens - 1)

    @property
    def reward_batch(self) -> Batch:
        """Longest micro-batch of the reward model, in completions: two or more per prompt."""
        sources = self.recipe.data.comparisons
        each = max([s.completions if s.task else 2 for s in sources], default=2)
        rows = self.cards.rows(self.reward.per_device_train_batch_size) * each
        return Batch(rows, 1, self.recipe.data.max_tokens - 1)

    def plan(self) -> Plan:
        """Plan all phases."""
        recipe, algorithm = self.recipe, self.recipe.algorithm
        rows = self.cards.rows(int(self.policy.per_device_train_batch_size))
        sft = self._step(dry_run.language_model, self.sft_batch, self.sft, "policy")
        phases = {
            "load": Phase(self.backbone, activations=self.loading),
            "sft": Phase(self.backbone + 3 * self.adapter, activations=sft),
        }
        if has_reward_model(recipe):  # the peak is at the last of them, when all are in memory
            models = sum(count for role, count in self.roles.items() if role != "value")
            moments = 2 * (self.adapter + self.head // 2)
            step = self._step(dry_run.ranking, self.reward_batch, self.reward, "reward")
            phases["reward"] = Phase(self.backbone + models + moments, activations=step)
        sampled = 0
        if algorithm in ("ppo", "grpo", "rloo"):
            sampled = self._sampled_at_once()
            phases |= self._rollouts(sampled)
        if algorithm != "best_of_n":
            phases[f"{algorithm} update"] = self.update(rows)
        section = recipe.evaluate  # the reward stage samples in the same batches
        longest = section.max_new_tokens or self.completion
        own = self.cards.rows(section.n)
        evaluated = Batch(min(section.batch_size, own), self.prompt, longest)
        phases["evaluate"] = self._sampling(self.resident, evaluated)
        head = Batch(rows, self.prompt, self.completion)
        return Plan(
            device=self.planner.device,
            dtype=str(self.dtype).removeprefix("torch."),
            backbone=self.backbone,
            roles=self.roles,
            optimizer=max(self.moments, 2 * self.adapter),
            logits=self.planner.count(recipe, dry_run.lm_head, head, ("policy",)),
            sampled_at_once=sampled,
            micro_batch=rows,
            prompt=self.prompt,
            completion=self.completion,
            phases=phases,
        )

    def update(self, rows: int) -> Phase:
        """Plan a training step of the policy, and of PPO's value, on micro-batches of `rows`."""
        recipe, resident, args = self.recipe, self.resident + self.moments, self.policy
        if recipe.algorithm == "dpo":
            rest = max(1, recipe.data.max_tokens - self.prompt)
            pairs = Batch(2 * rows, self.prompt, rest)
            step = self._step(dry_run.language_model, pairs, args, "policy")
            return Phase(resident, activations=step)
        phase: dry_run.Phase = dry_run.policy_step
        roles = ["policy"]
        if recipe.algorithm == "ppo" and recipe.ppo.value == "adapter":
            phase, roles = dry_run.update, ["policy", "value"]
        step = self._step(phase, self._episodes(rows), args, *roles)
        if recipe.ppo.ptx_coef and recipe.algorithm == "ppo":
            text = Batch(rows, 1, recipe.data.max_tokens - 1, rollout=True)
            step = max(step, self._step(phase, text, args, *roles))
        return Phase(resident, trunk_states=self.kept_states, activations=step)

    def _step(self, phase: dry_run.Phase, batch: Batch, args: Any, *trained: str) -> int:
        """Count activations and gradients of a training step, the second one if it accumulates.

        Several processes then sum their gradients in a bucket, when no activations are left.
        """
        phase = dry_run.twice(phase) if args.gradient_accumulation_steps > 1 else phase
        count = self.planner.count(self.recipe, phase, batch, trained)
        return max(count, 2 * self.gradients(*trained)) if self.cards.processes > 1 else count

    def gradients(self, *trained: str) -> int:
        """Return the bytes of these roles' gradients."""
        return sum(self.adapter + (role != "policy") * self.head // 2 for role in trained)

    def _sampled_at_once(self) -> int:
        """Return the rows sampled at once: the rollout, or as many as the sampler fits on a GPU."""
        rows = self.cards.rows(int(self.policy.generation_batch_size))
        if self.planner.device == "cpu" or self.capacity is None:
            return rows
        row = self._kv(Batch(1, self.prompt, self.completion), dry_run.decode)
        free = max(0, self.capacity - CUDA_CONTEXT - self.resident - self.moments)
        return max(1, min(rows, int(0.8 * free // row)))

    def _kv(self, batch: Batch, phase: dry_run.Phase) -> int:
        return self.planner.kv_cache(self.planner.config, batch, self.dtype, phase)

    def _sampling(self, resident: int, batch: Batch, trunk: int = 0) -> Phase:
        phases = (
            Phase(
                resident,
                self._kv(batch, phase),
                trunk,
                self.planner.count(self.recipe, phase, batch),
            )
            for phase in (dry_run.prefill, dry_run.decode)
        )
        return max(phases, key=lambda phase: phase.total)

    def _episodes(self, rows: int, *, kept: bool | None = None) -> Batch:
        kept = bool(self.trunk_states) if kept is None else kept
        return Batch(rows, self.prompt, self.completion, kept, rollout=True)

    def _rollouts(self, sampled: int) -> dict[str, Phase]:
        """Plan sampling and scoring of a rollout."""
        recipe, count = self.recipe, self.planner.count
        size = self.policy.per_device_train_batch_size
        rows = self.cards.rows(self.policy.generation_batch_size)
        many, trunk = min(rollout.SCORING_FACTOR * size, rows), self.trunk_states
        resident, name = self.resident + self.moments, recipe.algorithm
        scoring = max(
            count(recipe, dry_run.score, self._episodes(many)),
            count(recipe, dry_run.score, self._episodes(min(size, rows), kept=False)),
            count(recipe, dry_run.rewards, self._episodes(min(_SCORED, rows))),
            count(recipe, dry_run.trunk_pass, self._episodes(many, kept=False)) if trunk else 0,
        )
        return {
            f"{name} sampling": self._sampling(
                resident, self._episodes(sampled, kept=False), _TRUNK_COPIES * trunk
            ),
            f"{name} scoring": Phase(resident, trunk_states=self.kept_states, activations=scoring),
        }
