# SPDX-License-Identifier: Apache-2.0
"""What every trainer of ours has, left of TRL's class: it can be resumed, and can be unwell.

Trainer counts, skips what its loader gave before, and calls the hooks that are overridden here; its
own files (pickles, adapters loaded through `set_adapter`, which breaks the optimizer's groups) are
never written or read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from lora_rlhf._trl import telemetry_asked
from lora_rlhf.errors import NonFiniteError
from lora_rlhf.estimates import UNDEFINED
from lora_rlhf.runtime import interrupts

from .microbatch_splitting import InPieces
from .nonfinite_guard import NonFiniteGuard

_OF_TRL = ("_step", "_buffered_inputs", "_metrics", "_total_train_tokens", "health", "halving")


class Resumable(InPieces):
    """A trainer that can go on from a checkpoint; stands left of TRL's class.

    Attributes:
        kept: Names of attributes, beside TRL's, that decide what follows; an object with
            `state_dict` and `load_state_dict` gives and takes its own.
        health: What skips bad updates; without it they raise.
        seen: The inputs of the last step.
        warm_started: It began from other adapters than the stage's own: it need not equal SFT.
    """

    kept: tuple[str, ...] = ()
    keeper: Any = None  # resume.CheckpointCallback, which also makes `health`
    warm_started = False
    health: NonFiniteGuard | None = None
    seen: Any = None

    def _send_telemetry(self) -> None:
        """TRL's, which tells the Hub of every trainer that is made, only where it was asked for."""
        if telemetry_asked():
            super()._send_telemetry()

    def state_dict(self) -> dict[str, Any]:
        """What decides the steps to come, beside roles, optimizer and random states."""
        found: dict[str, Any] = {}
        for name in (*_OF_TRL, *self.kept):
            if hasattr(self, name):
                value = getattr(self, name)
                found[name] = value.state_dict() if hasattr(value, "state_dict") else value
        if "_step" in found and found["_step"] % _rollout_steps(self) == 0:
            found["_buffered_inputs"] = None  # used up: the next step begins with a rollout
            if "_rollout" in found:
                found["_rollout"] = {}
        return found

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        found = send_to_device(found, self.args.device)
        for name, value in found.items():
            now: Any = getattr(self, name, None)
            if hasattr(now, "load_state_dict"):
                now.load_state_dict(value)
            elif name == "_metrics":
                self._metrics = {mode: defaultdict(list, lists) for mode, lists in value.items()}
            else:
                setattr(self, name, value)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As TRL's; the inputs can be told if something is wrong with them."""
        self.seen = inputs
        return super().training_step(model, inputs, num_items_in_batch)

    @property
    def skipped(self) -> bool:
        """Whether the optimizer step at hand moves nothing."""
        return self.health is not None and self.health.skipped

    def unwell(self, error: NonFiniteError, *, rollout: bool = False) -> None:
        """Skip this step, or all of this rollout; raise where nobody keeps count."""
        if self.health is None:
            raise error
        self.health.note(error, rollout=rollout)

    def well(self, what: str, *tensors: Tensor, rollout: bool = False) -> bool:
        """Whether all are numbers; if not, `unwell`."""
        fine = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
        if not fine:
            self.unwell(NonFiniteError(f"{what} are no numbers"), rollout=rollout)
        return fine

    def checked_norm(self, stage: str, norm: float, role: str = "policy") -> float:
        """The norm of a gradient; `unwell` where it is no number."""
        if not math.isfinite(norm):
            self.unwell(
                NonFiniteError(
                    f"{stage}, optimizer step {self.state.global_step}: the gradient of the {role} "
                    f"is {norm}",
                    expected="a finite number",
                    remedy=f"lower {stage}.args.learning_rate; nothing of this stage was saved",
                )
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, but for its averages over what is left without the NaN: one NaN is a NaN."""
        lists = self._metrics["train" if self.model.training else "eval"]
        for name in [n for n, found in lists.items() if any(x != x for x in found)]:
            if name not in UNDEFINED and not name.startswith("rewards/"):
                del lists[name]
                logs[name] = math.nan
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Asked once: a signal that comes while this is written waits for the next boundary.
        stop = interrupts.wanted() and not self.control.should_training_stop
        self.keeper.save(self)
        self.control.should_save = False  # Trainer asks again at the end of an epoch
        if stop:
            self.keeper.paused = self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.keeper.load(self)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.keeper.load_optimizer(self)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.keeper.load_random(self)


def _rollout_steps(trainer: Any) -> int:
    """Micro-batches that one rollout is used for."""
    return int(trainer.args.steps_per_generation * trainer.num_iterations)
