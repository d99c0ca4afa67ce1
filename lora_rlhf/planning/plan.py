# SPDX-License-Identifier: Apache-2.0
"""What a recipe takes in memory, from the base's config alone: nothing is downloaded or loaded.

    resident      backbone (4-bit or not), LoRA and heads of each role, Adam's two moments
    KV cache      keys and values of every layer for the rows that are sampled at once
    trunk states  what leaves the frozen layers, of one rollout
    activations   what a forward and backward hold beside these: rehearsal.py counts it

All in bytes. A phase's peak is the sum at its worst moment; the plan's is that of its worst phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from lora_rlhf.algorithms import rollout, trainer_configs
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.models.backbone import MEMBERS
from lora_rlhf.models.memory import held_tensors, tensor_bytes
from lora_rlhf.recipe.schema import LoraSection, Recipe
from lora_rlhf.recipe.stage_keys import has_reward_model
from lora_rlhf.runtime.devices import pick_dtype

from . import dry_run, meta_backbone
from .dry_run import Batch
from .memory_budget import CUDA_CONTEXT, Phase, Plan

_SCORED = 32
"""Episodes that a reward scores at once (heads.scores)."""

_TRUNK_COPIES = 2
"""Of a rollout's trunk states: while sampling, parts and whole; later the rollout and its shuffle
or, while scoring, each episode's own."""

_WHOLE = 6
"""Up to this many layers all are rehearsed; of more, some, and what each adds is carried on."""


@dataclass
class Planner:
    """Plans recipes on one base; what recipes have in common is counted once.

    Attributes:
        config: Of the base.
        device: cpu or cuda.
    """

    config: Any
    device: str
    _backbones: dict[Any, meta_backbone.MetaBackbone] = field(default_factory=dict)
    _counts: dict[Any, int] = field(default_factory=dict)

    def plan(self, recipe: Recipe, capacity: int | None = None) -> Plan:
        """The plan of a recipe.

        Args:
            recipe: Any algorithm.
            capacity: Bytes of the GPU, by which a rollout is sampled in parts; None: at once.

        Raises:
            RecipeError: `args:` of a stage cannot be what they say.
        """
        return Work(self, recipe, capacity).plan()

    def dtype(self, recipe: Recipe) -> torch.dtype:
        """What the recipe's weights are computed in on this device."""
        name = recipe.model.dtype
        if name == "auto":
            return torch.float32 if self.device == "cpu" else torch.bfloat16
        return pick_dtype(name)

    def backbone(self, recipe: Recipe, layers: int, adapted: int) -> meta_backbone.MetaBackbone:
        """The base with this many layers, of which the upper ones carry adapters; all roles."""
        model, dtype = recipe.model, self.dtype(recipe)
        # Half a layer less: rounded up, it is `adapted` whatever the division loses.
        lora = recipe.lora.model_copy(update={"top_fraction": (adapted - 0.5) / layers})
        key = (layers, adapted, lora.r, str(lora.target_modules), model.load_in_4bit, dtype)
        if key not in self._backbones:
            config = meta_backbone.with_layers(self.config, layers)
            made = meta_backbone.backbone(config, model, lora, dtype)
            for role in ("policy", "reward", "value"):
                made.add_role(role)
            self._backbones[key] = made
        return self._backbones[key]

    def count(
        self, recipe: Recipe, phase: dry_run.Phase, batch: Batch, trained: tuple[str, ...] = ()
    ) -> int:
        """Bytes that a phase holds beside all that is resident, at the depth of the recipe."""
        total = int(self.config.get_text_config().num_hidden_layers)
        adapted = math.ceil(total * recipe.lora.top_fraction)
        below = min(total - adapted, 1)
        if not trained or adapted <= _WHOLE:
            # Without gradients no layer leaves anything behind for the next: two tell as much.
            shown = adapted if trained else min(adapted, 2)
            return self._count(recipe, phase, batch, trained, below, shown)
        few, more = (
            self._count(recipe, phase, batch, trained, below, n) for n in (_WHOLE - 2, _WHOLE)
        )
        return more + (more - few) * (adapted - _WHOLE) // 2

    def _count(
        self,
        recipe: Recipe,
        phase: dry_run.Phase,
        batch: Batch,
        trained: tuple[str, ...],
        below: int,
        adapted: int,
    ) -> int:
        made = self.backbone(recipe, below + adapted, adapted)
        checkpointing = bool(trained) and recipe.model.gradient_checkpointing
        key = (id(made), phase, batch, trained, checkpointing)
        if key not in self._counts:
            held = self.kv_cache(made.causal.config, batch, made.causal.dtype, phase)
            with dry_run.stage(made, trained, checkpointing=checkpointing):
                self._counts[key] = dry_run.count(made, self.device, batch, phase) - held
        return self._counts[key]

    @staticmethod
    def kv_cache(config: Any, batch: Batch, dtype: torch.dtype, phase: Any) -> int:
        """Bytes of keys and values once a phase of sampling is through; 0 for other phases."""
        tokens = {dry_run.prefill: batch.prompt, dry_run.decode: batch.tokens}.get(phase, 0)
        one = 2 * dry_run.kv_heads(config) * dry_run.head_width(config) * dtype.itemsize
        layers = DynamicCache(config=config).layers or [None] * config.num_hidden_layers
        windows = (getattr(layer, "sliding_window", None) for layer in layers)
        return sum(batch.rows * one * min(tokens, w or tokens) for w in windows)


class Work:
    """One recipe, planned."""

    def __init__(self, planner: Planner, recipe: Recipe, capacity: int | None) -> None:
        self.planner, self.recipe, self.capacity = planner, recipe, capacity
        self.dtype = planner.dtype(recipe)
        configs = trainer_configs.build(recipe, Path("plan"))
        self.sft, self.policy = configs.sft, configs.policy
        self.reward: Any = configs.reward.get("reward")
        self.prompt = recipe.data.max_prompt_tokens
        self.completion = ppo_stage.completion_limit(recipe, recipe.algorithm)
        text = planner.config.get_text_config()
        self.layers, self.hidden = int(text.num_hidden_layers), int(text.hidden_size)
        self.adapted = math.ceil(self.layers * recipe.lora.top_fraction)
        self._weigh()

    def _weigh(self) -> None:
        """The backbone's bytes, and one adapter's, from the whole model on the meta device."""
        recipe = self.recipe
        key = ("whole", recipe.model.load_in_4bit, self.dtype)
        if key not in self.planner._backbones:
            self.planner._backbones[key] = meta_backbone.backbone(
                self.planner.config, recipe.model, LoraSection(), self.dtype
            )
        made = self.planner._backbones[key]
        held = [*made.causal.parameters(), *made.causal.buffers()]
        self.backbone = tensor_bytes([t for p in held for t in held_tensors(p)])
        shapes = meta_backbone.adapted_shapes(made, self.adapted, recipe.lora.target_modules)
        self.adapter = 4 * recipe.lora.r * sum(a + b for a, b in shapes)
        # While one weight is quantised it is there in 16 bits too; other loading copies nothing.
        largest = max(a * b for a, b in shapes) * self.dtype.itemsize
        self.loading = largest if recipe.model.load_in_4bit else 0
        # PEFT keeps each head as it was beside the one that is trained.
        self.head = 2 * 4 * self.hidden
        self.roles = self._roles()
        trained = {"ppo": ("policy", "value"), "best_of_n": ()}.get(recipe.algorithm, ("policy",))
        self.moments = 2 * sum(self.roles[role] for role in trained)
        kept = recipe.algorithm == "ppo" and (recipe.ppo.ema or recipe.ppo.watch == "best")
        self.resident = self.backbone + sum(self.roles.values()) + self.adapter * bool(kept)

    def plan(self) -> Plan:
        """All phases."""
        recipe, algorithm, roles = self.recipe, self.recipe.algorithm, self.roles
        phases = {"load": Phase(self.backbone, activations=self.loading), "sft": self._sft()}
        if has_reward_model(recipe):
            phases["reward"] = self._reward()
        sampled = 0
        if algorithm in ("ppo", "grpo", "rloo"):
            sampled = self._rows()
            phases |= self._rollouts(sampled)
        if algorithm != "best_of_n":
            phases[f"{algorithm} update"] = self.update(self.policy.per_device_train_batch_size)
        phases["evaluate"] = self._evaluate()
        return Plan(
            self.planner.device,
            str(self.dtype).removeprefix("torch."),
            self.backbone,
            roles,
            max(self.moments, 2 * self.adapter),
            self._logits(),
            phases,
            sampled,
            self.policy.per_device_train_batch_size,
            self.prompt,
            self.completion,
        )

    def _roles(self) -> dict[str, int]:
        """Bytes of the roles that the last training stage has, in the order of their making."""
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

    def _step(self, phase: dry_run.Phase, batch: Batch, *trained: str) -> int:
        """Activations and gradients of a training step; of the second, where gradients add up."""
        args: Any = self.policy
        if phase is dry_run.ranking:
            args = self.reward
        elif phase is dry_run.language_model and self.recipe.algorithm != "dpo":
            args = self.sft
        windows = args.gradient_accumulation_steps
        phase = dry_run.twice(phase) if windows > 1 else phase
        return self.planner.count(self.recipe, phase, batch, trained)

    @property
    def sft_batch(self) -> Batch:
        """The longest micro-batch of SFT."""
        tokens = self.recipe.data.max_tokens
        return Batch(self.sft.per_device_train_batch_size, 1, tokens - 1)

    @property
    def reward_batch(self) -> Batch:
        """The longest micro-batch of the reward model, in completions: two of a prompt or more."""
        sources = self.recipe.data.comparisons
        each = max([s.completions if s.task else 2 for s in sources], default=2)
        rows = self.reward.per_device_train_batch_size * each
        return Batch(rows, 1, self.recipe.data.max_tokens - 1)

    def _sft(self) -> Phase:
        return Phase(
            self.backbone + 3 * self.adapter,
            activations=self._step(dry_run.language_model, self.sft_batch, "policy"),
        )

    def _reward(self) -> Phase:
        """The last of the reward models, when all are there."""
        there = sum(size for role, size in self.roles.items() if role != "value")
        return Phase(
            self.backbone + there + 2 * (self.adapter + self.head // 2),
            activations=self._step(dry_run.ranking, self.reward_batch, "reward"),
        )

    def _rows(self) -> int:
        """Rows that are sampled at once: the rollout, or as many as the sampler lets on a GPU."""
        rows = int(self.policy.generation_batch_size)
        if self.planner.device == "cpu" or self.capacity is None:
            return rows
        row = self._kv(Batch(1, self.prompt, self.completion), dry_run.decode)
        free = max(0, self.capacity - CUDA_CONTEXT - self.resident - self.moments)
        return max(1, min(rows, int(0.8 * free // row)))

    def _kv(self, batch: Batch, phase: dry_run.Phase) -> int:
        return self.planner.kv_cache(self.planner.config, batch, self.dtype, phase)

    def _sampling(self, resident: int, batch: Batch, trunk: int = 0) -> Phase:
        return max(
            (
                Phase(
                    resident,
                    self._kv(batch, phase),
                    trunk,
                    self.planner.count(self.recipe, phase, batch),
                )
                for phase in (dry_run.prefill, dry_run.decode)
            ),
            key=lambda phase: phase.total,
        )

    def _trunk(self) -> int:
        """Bytes of one copy of a rollout's trunk states; 0 where none are kept."""
        if self.adapted == self.layers or self.recipe.ppo.trunk_states == "off":
            return 0
        if self.recipe.algorithm != "ppo":
            return 0
        tokens = self.policy.generation_batch_size * (self.prompt + self.completion)
        return int(tokens * self.hidden * self.dtype.itemsize)

    def _batch(self, rows: int, *, kept: bool | None = None) -> Batch:
        kept = bool(self._trunk()) if kept is None else kept
        return Batch(rows, self.prompt, self.completion, kept, rollout=True)

    def _kept(self) -> int:
        """Bytes of trunk states on the device once a rollout is sampled."""
        away = self.recipe.ppo.trunk_states == "cpu" and self.planner.device != "cpu"
        return 0 if away else _TRUNK_COPIES * self._trunk()

    def _rollouts(self, sampled: int) -> dict[str, Phase]:
        """Sampling and scoring."""
        recipe, count = self.recipe, self.planner.count
        size, rows = self.policy.per_device_train_batch_size, self.policy.generation_batch_size
        many, trunk = min(rollout.MORE * size, rows), self._trunk()
        resident, name = self.resident + self.moments, recipe.algorithm
        scoring = max(
            count(recipe, dry_run.score, self._batch(many)),
            count(recipe, dry_run.score, self._batch(size, kept=False)),
            count(recipe, dry_run.rewards, self._batch(min(_SCORED, rows))),
            count(recipe, dry_run.trunk_pass, self._batch(many, kept=False)) if trunk else 0,
        )
        return {
            f"{name} sampling": self._sampling(
                resident, self._batch(sampled, kept=False), _TRUNK_COPIES * trunk
            ),
            f"{name} scoring": Phase(resident, trunk=self._kept(), activations=scoring),
        }

    def update(self, rows: int) -> Phase:
        """A training step of the policy, and of PPO's value, on micro-batches of so many rows."""
        recipe, resident = self.recipe, self.resident + self.moments
        if recipe.algorithm == "dpo":
            rest = max(1, recipe.data.max_tokens - self.prompt)
            pairs = Batch(2 * rows, self.prompt, rest)
            return Phase(resident, activations=self._step(dry_run.language_model, pairs, "policy"))
        step, roles = dry_run.policy_step, ["policy"]
        if recipe.algorithm == "ppo" and recipe.ppo.value == "adapter":
            step, roles = dry_run.update, ["policy", "value"]
        working = self._step(step, self._batch(rows), *roles)
        if recipe.ppo.ptx_coef and recipe.algorithm == "ppo":
            text = Batch(rows, 1, recipe.data.max_tokens - 1, rollout=True)
            working = max(working, self._step(step, text, *roles))
        return Phase(resident, trunk=self._kept(), activations=working)

    def _evaluate(self) -> Phase:
        """Sampling by evaluate.batch_size prompts, as the reward stage does it too."""
        section = self.recipe.evaluate
        longest = section.max_new_tokens or self.completion
        rows = min(section.batch_size, section.n)
        return self._sampling(self.resident, Batch(rows, self.prompt, longest))

    def _logits(self) -> int:
        size = self.policy.per_device_train_batch_size
        batch = Batch(size, self.prompt, self.completion)
        return self.planner.count(self.recipe, dry_run.lm_head, batch, ("policy",))
