# SPDX-License-Identifier: Apache-2.0
"""Mixin placed before a TRL trainer: exact resume, and skipping of non-finite updates.

Trainer counts steps, skips batches of the resumed epoch, and calls the hooks overridden here. Its
own checkpoint files are not used: they are pickles, and its loading of an adapter through
`set_adapter` breaks the optimizer's groups.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PrinterCallback

from lora_rlhf._trl import telemetry_allowed
from lora_rlhf.distributed.world import world
from lora_rlhf.errors import NonFiniteError
from lora_rlhf.estimates import UNDEFINED
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.runtime import interrupts

from .microbatch_splitting import MicrobatchSplitting
from .nonfinite_guard import NonFiniteGuard

_ENTRIES = {
    **{name: name for name in ("_step", "_buffered_inputs", "_metrics", "_total_train_tokens")},
    "health": "guard",
    "halving": "backoff",
    "privacy": "private",
}


class ResumableTrainer(MicrobatchSplitting):
    """A trainer of one role of a backbone that can be resumed from a checkpoint.

    Attributes:
        entries: Checkpoint entry -> attribute, in addition to the entries of all trainers. The
            names are a file format and stay when an attribute is renamed. An object with
            `state_dict` and `load_state_dict` defines its own entry.
        guard: Skips non-finite updates; without it they raise.
        seen: Inputs of the last step.
        warm_started: Whether only the adapters of a checkpoint were loaded.
    """

    entries: ClassVar[Mapping[str, str]] = {}
    checkpoints: Any = None  # a CheckpointCallback
    warm_started = False
    guard: NonFiniteGuard | None = None
    seen: Any = None

    def __init__(self, backbone: Backbone, role: str, **options: Any) -> None:
        self.backbone = backbone
        with backbone.float32_kept():
            super().__init__(
                model=backbone.views[role], processing_class=backbone.tokenizer, **options
            )
        self.remove_callback(PrinterCallback)

    def before_training(self) -> None:
        """Run checks before the first step."""

    def after_training(self) -> None:
        """Finish a completed training."""

    def _send_telemetry(self) -> None:
        """Send TRL's telemetry to the Hub only if the user asked for it."""
        if telemetry_allowed():
            super()._send_telemetry()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for later steps, without roles, optimizer and random states."""
        state: dict[str, Any] = {}
        for entry, name in (_ENTRIES | dict(self.entries)).items():
            if hasattr(self, name):
                value = getattr(self, name)
                state[entry] = value.state_dict() if hasattr(value, "state_dict") else value
        if (
            "_step" in state
            and state["_step"] % (self.args.steps_per_generation * self.num_iterations) == 0
        ):
            state["_buffered_inputs"] = None  # used up: the next step makes a rollout
            if "_rollout" in state:
                state["_rollout"] = {}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        names = _ENTRIES | dict(self.entries)
        for entry, value in send_to_device(state, self.args.device).items():
            now: Any = getattr(self, names[entry], None)
            if hasattr(now, "load_state_dict"):
                now.load_state_dict(value)
            elif entry == "_metrics":
                self._metrics = {mode: defaultdict(list, lists) for mode, lists in value.items()}
            else:
                setattr(self, names[entry], value)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Add a micro-batch's gradient; at the end of a step sum those of all processes.

        Keeps the inputs for a report on a non-finite update.
        """
        self.seen = inputs
        loss = self.add_gradient(model, inputs, num_items_in_batch)
        if world().size > 1 and self.accelerator.sync_gradients:
            self._pieces = 0
            roles = sorted(self.backbone.trained_roles)
            world().add_gradients(p for r in roles for _, p in self.backbone.role_parameters(r))
        return loss

    def add_gradient(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        """Run TRL's step, forward and backward."""
        return super().training_step(model, inputs, num_items_in_batch)

    @property
    def skipped(self) -> bool:
        """True if the current optimizer step changes nothing."""
        return self.guard is not None and self.guard.skipped

    def skip_update(self, error: NonFiniteError, *, rollout: bool = False) -> None:
        """Skip this step, or all steps of this rollout; raise if there is no guard."""
        if self.guard is None:
            raise error
        self.guard.note(error, rollout=rollout)

    def check_finite(self, what: str, *tensors: Tensor, rollout: bool = False) -> bool:
        """Check that all numbers are finite; skip the update otherwise."""
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
        if not finite:
            self.skip_update(NonFiniteError(f"{what} are not finite"), rollout=rollout)
        return finite

    def checked_norm(self, stage: str, norm: float, role: str = "policy") -> float:
        """Return a gradient's norm; skip the update if it is not finite."""
        if not math.isfinite(norm):
            self.skip_update(
                NonFiniteError(
                    f"{stage}, optimizer step {self.state.global_step}: the gradient of the {role} "
                    f"is {norm}",
                    expected="a finite number",
                    remedy=f"lower {stage}.args.learning_rate; nothing of this stage was saved",
                )
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, but average a list that contains NaN to NaN."""
        lists = self._metrics["train" if self.model.training else "eval"]
        for name in [n for n, values in lists.items() if any(x != x for x in values)]:
            if name not in UNDEFINED and not name.startswith("rewards/"):
                del lists[name]
                logs[name] = math.nan
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Read once: a signal during the write takes effect at the next checkpoint.
        stop = interrupts.agree(world().gathered) and not self.control.should_training_stop
        self.checkpoints.save(self)
        self.control.should_save = False  # else Trainer saves again at the end of an epoch
        if stop:
            self.checkpoints.paused = self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.checkpoints.load(self)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.checkpoints.load_optimizer(self)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.checkpoints.load_random(self)
