# SPDX-License-Identifier: Apache-2.0
"""Callback that skips non-finite updates; three in a row stop the training.

Gradients of a non-finite step are dropped, and adapters that hold NaN or infinity are restored to
the last good step. After every update the frozen roles are checked to be unchanged.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from lora_rlhf.distributed.world import world
from lora_rlhf.errors import IdentityError, NonFiniteError
from lora_rlhf.redaction import safe
from lora_rlhf.runs.disk import append

from .stage_context import StageContext

MAX_SKIPPED = 3
"""Skipped updates in a row that stop a training."""

_PROMPTS = 8
"""Prompts of a skipped update that are written to `skipped.jsonl`."""

_STATE = ("_rollout", "_last", "_row", "_sum", "_logged")


class NonFiniteGuard(TrainerCallback):
    """Guards one training; the last of its callbacks.

    Attributes:
        skipped: Whether the current optimizer step changes nothing.
    """

    def __init__(self, trainer: Any, context: StageContext, name: str, unit: int) -> None:
        self.trainer = trainer
        _, self.backbone, self.record, self.progress = context
        self.name, self.unit = name, unit
        self.skipped = False
        self._why: str | None = None  # of this optimizer step
        self._rollout: str | None = None  # of all steps of this rollout
        self._last, self._row = -2, 0  # the last skipped update; how many in a row
        self._good: dict[tuple[str, str], Tensor] = {}  # adapters after the last good step
        self._frozen: dict[str, Tensor] = {}
        self._sum, self._logged = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters that a resumed training continues."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.__dict__.update(state)

    def note(self, error: NonFiniteError, *, rollout: bool = False) -> None:
        """Mark this step, or all steps of this rollout, as non-finite, to be skipped."""
        self._why = self._why or error.given
        if rollout:
            self._rollout = self._rollout or error.given

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Restore adapters that hold NaN or infinity before they are used."""
        if not self._good:
            self._copy()
            self._frozen = self._checksums()
        elif bad := self._bad_role():
            self._set_back()
            self.note(NonFiniteError(f"the adapter of the {bad} held NaN or infinity"))

    def on_pre_optimizer_step(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        """Drop the gradients of a non-finite step: optimizers ignore parameters without one.

        Raises:
            NonFiniteError: This is the third skipped update in a row.
        """
        parameters = [entry[-1] for entry in self._parameters()]
        if not _finite([p.grad for p in parameters if p.grad is not None]):
            self.note(NonFiniteError("a gradient is not finite"))
        why, self._why = self._why or self._rollout, None
        why = next(filter(None, world().gathered(why)), None)
        self.skipped = why is not None
        if why is not None:
            for parameter in parameters:
                parameter.grad = None
            self._count(state.global_step, why)

    def on_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Copy the adapters after a finite step; restore them after a non-finite one."""
        if self.skipped:
            return
        if bad := self._bad_role():
            self._set_back()
            for value in (v for moments in optimizer.state.values() for v in moments.values()):
                if isinstance(value, Tensor) and not _finite([value]):
                    value.zero_()
            self.note(NonFiniteError(f"the step made NaN or infinity of the {bad}"))
        else:
            self._copy()

    def on_step_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        """Check at the end of an update that no frozen role moved.

        Raises:
            IdentityError: A frozen role moved.
        """
        if state.global_step % self.unit == 0:
            self._rollout = None
            now = self._checksums()
            for role in [r for r in now if not torch.equal(now[r], self._frozen[r])]:
                raise IdentityError(
                    f"{self.name}: in update {state.global_step // self.unit} the {role} moved",
                    expected=f"only {', '.join(sorted(self.backbone.trained_roles))} to move",
                    remedy=f"stage at fault: {self.name}. Something writes to frozen tensors; "
                    "delete the checkpoints of this stage, which may hold them",
                )

    def on_log(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        """Exclude a log line whose loss is not finite from the mean training loss."""
        if math.isfinite(self.trainer._total_loss_scalar):
            self._sum = self.trainer._total_loss_scalar
        else:
            self.trainer._total_loss_scalar = self._sum
            self.trainer._initial_global_step += state.global_step - self._logged
            self.trainer._tr_loss.zero_()  # Trainer subtracts it from itself: NaN would stay NaN
        self._logged = state.global_step

    def mean_loss(self, loss: float) -> float:
        """Return the mean training loss, over the log lines with a finite one."""
        counted = self._logged - self.trainer._initial_global_step
        return self._sum / counted if not math.isfinite(loss) and counted > 0 else loss

    def _parameters(self) -> list[tuple[str, str, torch.nn.Parameter]]:
        roles = sorted(self.backbone.trained_roles)
        return [(r, n, p) for r in roles for n, p in self.backbone.role_parameters(r)]

    def _checksums(self) -> dict[str, Tensor]:
        """Sum the bits of each frozen role's tensors on the device."""
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
        """Return the first trained role that holds NaN or infinity."""
        for role in sorted(self.backbone.trained_roles):
            if not _finite([p for _, p in self.backbone.role_parameters(role)]):
                return role
        return None

    @torch.no_grad()
    def _copy(self) -> None:
        for role, name, parameter in self._parameters():
            self._good.setdefault((role, name), torch.empty_like(parameter)).copy_(parameter)

    @torch.no_grad()
    def _set_back(self) -> None:
        for role, name, parameter in self._parameters():
            parameter.copy_(self._good[role, name])

    def _count(self, step: int, why: str) -> None:
        update = step // self.unit
        if update == self._last:
            return  # another step of the same update
        self._row = self._row + 1 if update == self._last + 1 else 1
        self._last = update
        line: dict[str, Any] = {"training": self.name, "update": update, "why": why}
        line["prompts"] = self._prompts()
        path = self.record.folder / "skipped.jsonl"
        append(path, json.dumps(safe(line)) + "\n")
        skipped = self.record.data.setdefault("skipped", {}).setdefault(self.name, {})
        skipped[str(update)] = why  # by number, so that a repeated update counts once
        self.record.save()
        self.progress.say(f"{self.name}: update {update} is skipped, {why} ({path.name})")
        if self._row >= MAX_SKIPPED:
            raise NonFiniteError(
                f"{self.name}: {MAX_SKIPPED} updates in a row were skipped, the last because {why}",
                expected="finite rewards, log-probs and gradients",
                remedy="lower the learning rate, or correct the reward function; the prompts are "
                f"in {path}, and the adapters are those of the last good update",
            )

    def _prompts(self) -> list[str]:
        """Decode the inputs of the current step."""
        seen = self.trainer.seen
        if isinstance(seen, list):
            return [str(row.get("prompt"))[:500] for row in seen[:_PROMPTS]]
        rows = seen.get("input_ids", [])[:_PROMPTS] if isinstance(seen, dict) else []
        pad = self.backbone.tokenizer.pad_token_id
        return [self.backbone.decode([i for i in row.tolist() if i != pad])[:500] for row in rows]


def _finite(tensors: list[Any]) -> bool:
    """Check that all numbers are finite, with a single transfer from the device."""
    return not tensors or bool(
        torch.stack([torch.isfinite(t.detach()).all() for t in tensors]).all()
    )
