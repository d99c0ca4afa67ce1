# SPDX-License-Identifier: Apache-2.0
"""Mixins placed before TRL's trainers, shared by all algorithms: log, clipping, identities."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lora_rlhf.errors import IdentityError, NonFiniteError
from lora_rlhf.models.backbone import ADAPTERS, Backbone
from lora_rlhf.runs.progress import Progress
from lora_rlhf.training.resumable_trainer import ResumableTrainer

from . import identities
from .identities import FrozenRolesCheck

CLONE = "ref"
"""Name of the adapter into which TRL clones the policy's, as the reference of its KL."""


class _AfterStep(TrainerCallback):
    """Calls a function between the optimizer's step and the scheduler's."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Call the function."""
        self.act()


class PolicyTrainer(ResumableTrainer):
    """A trainer of the policy; use it inside `backbone.training("policy", ...)`.

    Attributes:
        identities: The number measured by each start-up check, for the record.
        frozen_check: Run after the first step that can move a weight; None once passed.
    """

    entries = {"identities": "identities"}
    optimizer: torch.optim.Optimizer | None

    def __init__(self, backbone: Backbone, **options: Any) -> None:
        self.identities: dict[str, float] = {}
        self.frozen_check: FrozenRolesCheck | None = None
        super().__init__(backbone, "policy", **options)
        self.add_callback(_AfterStep(self.after_optimizer_step))

    def after_optimizer_step(self) -> None:
        """Check after the first update that the trained roles moved and nothing else did."""
        assert self.optimizer is not None
        # With a warm-up from 0 the first step has learning rate 0 and moves nothing.
        moves = self.optimizer.param_groups[0]["lr"] > 0 and not self.skipped
        if self.frozen_check is not None and moves:
            self.identities |= self.frozen_check.check()
            self.frozen_check = None

    def _clip_grad_norm(self, model: Any) -> Tensor:
        self.backbone.assert_trainable()
        norm: Tensor = super()._clip_grad_norm(model)
        self.note({"policy/grad_norm": self.checked_norm(self._name.lower(), float(norm))})
        return norm

    def note(self, numbers: dict[str, float]) -> None:
        """Add numbers to the next log line, which averages them."""
        for name, number in numbers.items():
            self._metrics["train"][name].append(number)

    def renamed(self, metrics: dict[str, list[float]]) -> dict[str, list[float]]:
        """Rename TRL's metrics to ours; a metric that is not returned is not logged."""
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's averages under our names."""
        self._metrics["train"] = defaultdict(list, self.renamed(self._metrics["train"]))
        logs.pop("grad_norm", None)  # logged per role, by `note`
        super().log(logs, start_time)


class TiedReferenceTrainer(PolicyTrainer):
    """A TRL trainer with its own reference adapter, which is tied to the frozen SFT adapter."""

    def __init__(self, backbone: Backbone, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.identities["reference_tensors_tied"] = tie_reference(backbone)
        self.frozen_check = FrozenRolesCheck.take(backbone, self._name.lower(), ("policy",))

    def state_dict(self) -> dict[str, Any]:
        """Add whether the first update was checked."""
        return super().state_dict() | {"untouched": {"done": self.frozen_check is None}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state.pop("untouched")["done"]:
            self.frozen_check = None
        super().load_state_dict(state)


def tie_reference(backbone: Backbone) -> int:
    """Let TRL's clone of the policy share the SFT adapter's tensors; returns their number.

    TRL's trainers clone the policy in `__init__`, when it still equals SFT, as their reference
    (none with a beta of 0). Sharing tensors with the reference role, the clone costs no memory and
    is covered by that role's hash. When TRL switches back from it (`set_adapter`), it activates
    and un-freezes the adapter that PEFT holds as the view's active one, so that is set to the
    policy's.

    Raises:
        IdentityError: The clone is not the SFT adapter.
    """
    view = backbone.views["policy"]
    parameters = dict(view.named_parameters())
    clones = [name for name in parameters if f".{CLONE}." in name]
    for name in clones:
        sft = parameters[name.replace(f".{CLONE}.", f".{ADAPTERS['reference']}.")]
        same = parameters[name].dtype == sft.dtype and torch.equal(parameters[name], sft)
        if not same:
            raise IdentityError(
                f"the reference of the KL penalty is not the SFT adapter: {name} differs",
                expected="a clone of the policy, which starts as SFT",
                remedy="stage at fault: sft. Was another adapter loaded as policy?",
            )
        parameters[name].data = sft.data
    # PEFT's `set_adapter` would also change which parameters are trainable.
    view.active_adapter = view.base_model.active_adapter = ADAPTERS["policy"]
    backbone.activate([ADAPTERS["policy"]])
    backbone.apply_trainable()  # the clone is frozen, and PEFT below 0.21 makes all LoRA trainable
    return len(clones)


class RolloutTrainer(PolicyTrainer):
    """A trainer on sampled completions that reward functions score."""

    progress: Progress

    @property
    def samples_itself(self) -> bool:
        """True if `models.sampler` is used, False if the recipe chose a sampler of transformers."""
        args = self.args
        return not (args.use_transformers_continuous_batching or args.cache_implementation)

    def before_training(self) -> None:
        """Check transformers' sampler against the trainer; ours is checked on a rollout."""
        if not self.samples_itself:
            prompts = self.train_dataset[:4]["prompt"]
            self.identities["sampler_difference"] = identities.sampler_agrees(
                self.backbone,
                [self.backbone.encode_prompt(prompt) for prompt in prompts],
                self.generation_config,
                self.args.temperature,
            )

    def checked_rewards(self, rewards_bf: Tensor, prompts: list[Any]) -> Tensor:
        """Weight rewards (B, F) of F functions; skip a rollout with NaN, which TRL reads as 0."""
        weights_f = self.reward_weights.to(rewards_bf.device)
        used_bf = torch.where(weights_f != 0, rewards_bf * weights_f, 0.0)
        bad = (~torch.isfinite(used_bf.sum(dim=1))).nonzero().flatten().tolist()
        if bad:
            error = NonFiniteError(
                f"the reward of {len(bad)} episodes is not a number; the first prompt is "
                f"{str(prompts[bad[0]])[:200]!r}",
                expected="a finite number per completion",
                remedy="correct the reward function or the reward model",
            )
            self.skip_update(error, rollout=True)
        return used_bf
