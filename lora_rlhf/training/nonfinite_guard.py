# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity: the update is skipped and its prompts are written down; three in a row stop.

Nothing that is no number reaches a weight: gradients of a bad step are dropped, and adapters that
hold NaN, whoever put it there, are set back to what they were after the last good step. And after
every update the roles that do not train are what they were, or the run stops.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_rlhf.errors import IdentityError, NonFiniteError
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.redaction import safe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record

MOST = 3
"""Bad updates in a row that stop a training: one is an accident, three are the state it is in."""

_PROMPTS = 8
"""Prompts of a bad update that are written down."""


class NonFiniteGuard(TrainerCallback):
    """Watches one training; stands last among its callbacks.

    Args:
        name: Of the training.
        unit: Optimizer steps of one update.

    Attributes:
        skipped: Whether this optimizer step is one that moves nothing.
    """

    def __init__(
        self,
        trainer: Any,
        backbone: Backbone,
        record: Record,
        progress: Progress,
        name: str,
        unit: int,
    ) -> None:
        self.trainer, self.backbone, self.record, self.progress = (
            trainer,
            backbone,
            record,
            progress,
        )
        self.name, self.unit = name, unit
        self.skipped = False
        self._why: str | None = None  # of this optimizer step
        self._rollout: str | None = None  # of all steps of this rollout
        self._last, self._row = -2, 0
        self._good: dict[str, dict[str, Tensor]] = {}
        self._frozen: dict[str, Tensor] = {}
        self._sum, self._logged = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: what was bad, so that a resume counts on."""
        names = ("_rollout", "_last", "_row", "_sum", "_logged")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name, value in found.items():
            setattr(self, name, value)

    def note(self, error: NonFiniteError, *, rollout: bool = False) -> None:
        """Something is no number: this step, or every step of this rollout, moves nothing."""
        self._why = self._why or error.given
        if rollout:
            self._rollout = self._rollout or error.given

    # ------------------------------------------------------------- called by the trainer

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before anything is computed with the adapters, they are numbers."""
        if not self._good:
            self._keep()
            self._frozen = self._checksums()
        elif bad := self._bad_role():
            self._put_back()
            self.note(NonFiniteError(f"the adapter of the {bad} held NaN or infinity"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drop the gradients of a bad step: an optimizer passes over what has none.

        Raises:
            NonFiniteError: It was the last of three bad updates in a row.
        """
        gradients = [found[-1].grad for found in self._parameters() if found[-1].grad is not None]
        if not _finite(gradients):
            self.note(NonFiniteError("a gradient is no number"))
        why, self._why = self._why or self._rollout, None
        self.skipped = why is not None
        if why is not None:
            for found in self._parameters():
                found[-1].grad = None
            self._count(state.global_step, why)

    def on_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """A step that was good becomes the state to go back to."""
        if self.skipped:
            return
        if bad := self._bad_role():
            self._put_back()
            for value in (v for moments in optimizer.state.values() for v in moments.values()):
                if isinstance(value, Tensor) and not _finite([value]):
                    value.zero_()
            self.note(NonFiniteError(f"the step made NaN or infinity of the {bad}"))
        else:
            self._keep()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A rollout that was bad is over; who does not train has not moved.

        Raises:
            IdentityError: Naming the role that did.
        """
        if state.global_step % self.unit == 0:
            self._rollout = None
            now = self._checksums()
            for role in [r for r in now if not torch.equal(now[r], self._frozen[r])]:
                raise IdentityError(
                    f"{self.name}: in update {state.global_step // self.unit} the {role} moved",
                    expected=f"only {', '.join(sorted(self.backbone.trained_roles))} to move",
                    remedy=f"stage at fault: {self.name}. Something writes to frozen tensors; the "
                    "checkpoints of this stage are not to be trusted: delete them",
                )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A line whose loss is NaN says so, and is left out of the mean loss of the training."""
        if math.isfinite(self.trainer._total_loss_scalar):
            self._sum = self.trainer._total_loss_scalar
        else:
            self.trainer._total_loss_scalar = self._sum
            self.trainer._initial_global_step += state.global_step - self._logged
            self.trainer._tr_loss.zero_()  # Trainer takes it off itself: NaN would stay NaN
        self._logged = state.global_step

    def mean_loss(self, loss: float) -> float:
        """The mean loss of the training, over the lines of the log that have one."""
        counted = self._logged - self.trainer._initial_global_step
        return self._sum / counted if not math.isfinite(loss) and counted > 0 else loss

    # ----------------------------------------------------------------------- inside

    def _parameters(self) -> list[tuple[str, str, torch.nn.Parameter]]:
        roles = sorted(self.backbone.trained_roles)
        return [(r, n, p) for r in roles for n, p in self.backbone.role_parameters(r)]

    def _checksums(self) -> dict[str, Tensor]:
        """Sums of the bits of each frozen role's tensors: exact, on the device, no copy."""
        return {
            role: torch.stack(
                [
                    p.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)
                    for _, p in self.backbone.role_parameters(role)
                ]
            )
            for role in sorted(self.backbone.views.keys() - self.backbone.trained_roles)
        }

    def _bad_role(self) -> str | None:
        for role in sorted(self.backbone.trained_roles):
            if not _finite([p for _, p in self.backbone.role_parameters(role)]):
                return role
        return None

    def _keep(self) -> None:
        for role, name, parameter in self._parameters():
            kept = self._good.setdefault(role, {})
            if name in kept:
                kept[name].copy_(parameter.detach())
            else:
                kept[name] = parameter.detach().clone()

    @torch.no_grad()
    def _put_back(self) -> None:
        for role, name, parameter in self._parameters():
            parameter.copy_(self._good[role][name])

    def _count(self, step: int, why: str) -> None:
        update = step // self.unit
        if update == self._last:
            return  # another step of the same bad update
        self._row = self._row + 1 if update == self._last + 1 else 1
        self._last = update
        line: dict[str, Any] = {
            "training": self.name,
            "update": update,
            "why": why,
            "prompts": self._prompts(),
        }
        path = self.record.folder / "skipped.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(safe(line)) + "\n")
        known = self.record.data.setdefault("skipped", {}).setdefault(self.name, {})
        known[str(update)] = why  # by number: an update that is done again is one update
        self.record.save()
        self.progress.say(f"{self.name}: update {update} is skipped, {why} ({path.name})")
        if self._row >= MOST:
            raise NonFiniteError(
                f"{self.name}: {MOST} updates in a row were skipped, the last because {why}",
                expected="finite rewards, log-probs and gradients",
                remedy=f"their prompts are in {path}; a lower learning rate, or a reward function "
                "that returns numbers; adapters are as after the last good update",
            )

    def _prompts(self) -> list[str]:
        """What the bad step was computed on, as text."""
        seen = self.trainer.seen
        if isinstance(seen, list):
            return [str(row.get("prompt"))[:500] for row in seen[:_PROMPTS]]
        rows = seen.get("input_ids", [])[:_PROMPTS] if isinstance(seen, dict) else []
        pad = self.backbone.tokenizer.pad_token_id
        return [self.backbone.decode([i for i in row.tolist() if i != pad])[:500] for row in rows]


def _finite(tensors: list[Any]) -> bool:
    """Whether all numbers are; one look at the device for all of them."""
    if not tensors:
        return True
    return bool(torch.stack([torch.isfinite(t.detach()).all() for t in tensors]).all())
