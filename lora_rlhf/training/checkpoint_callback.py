# SPDX-License-Identifier: Apache-2.0
"""Exact resume: when a checkpoint is due, what is in it, and whether it is of this run.

The hooks by which a trainer comes here are in resumable.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_rlhf.errors import CheckpointError
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import CheckpointSection, Recipe
from lora_rlhf.recipe.stage_keys import READS, fingerprints, keys_read
from lora_rlhf.runs import checkpoint
from lora_rlhf.runs.checkpoint import Checkpoint
from lora_rlhf.runs.disk import sync
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import interrupts

from .nonfinite_guard import NonFiniteGuard

_OF_TRAINER = (
    "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step",
)  # fmt: skip
"""Set to 0 when the training loop begins, so put back after that."""


class Result(NamedTuple):
    """Of a training that is over, in this process or in an earlier one."""

    global_step: int
    training_loss: float


class CheckpointCallback(TrainerCallback):
    """Saves and restores one training: when, what, and whether it is still the same run.

    Args:
        name: Of the training: the stage's, or the role's in the reward stage.
        stage: That it belongs to.
        unit: Optimizer steps of what the log calls a step.

    Attributes:
        paused: It stopped for a signal or its minutes, and is not done.
    """

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        record: Record,
        progress: Progress,
        stage: str,
        name: str | None = None,
        unit: int = 1,
    ) -> None:
        self.section: CheckpointSection = recipe.checkpoint
        self.backbone, self.record, self.progress = backbone, record, progress
        self.stage, self.name, self.unit = stage, name or stage, unit
        self.folder: Path = record.checkpoints(self.name)
        self.found: Checkpoint | None = None
        self.run = identity(recipe, backbone, record, stage)
        self.paused = self._looked = False
        self._old: list[Path] = []  # checkpoints from before a warm start
        self._epoch: dict[str, Any] = {}
        self._saved = self._started = time.monotonic()
        self._spent = 0.0

    # ---------------------------------------------------------------- the training

    def train(self, trainer: Any) -> Result:
        """Train to the end, from the newest checkpoint where there is one.

        Raises:
            CheckpointError: There are checkpoints, and none is complete, or of this run.
            Interrupted, OutOfTime: What was done is saved.
        """
        trainer.checkpoints, trainer.backoff = self, self.backbone.halving
        trainer.guard = NonFiniteGuard(
            trainer, self.backbone, self.record, self.progress, self.name, self.unit
        )
        if self.record.warm_start and self.record.in_flight(self.stage):
            self._start_warm(trainer)
            return self._train(trainer)
        self.found, skipped = checkpoint.newest(self.folder)
        for name, why in skipped:
            self.progress.say(f"{self.name}: checkpoint {name} is not used: {why}")
        if self.found is not None and not self.record.truncate_log(
            self.name, self.found.notes["lines"]
        ):
            raise checkpoint.lacking(self.found.folder, "metrics.jsonl has fewer lines than then")
        if self.found is None:
            self.record.truncate_log(self.name)
        else:
            self._check_same(self.found)
            self._spent = float(self.found.notes["seconds"])
            self._note_resumed(self.found)
            if "finished" in self.found.notes:
                self.load(trainer)
                trainer.state = TrainerState.load_from_json(
                    str(self.found.folder / checkpoint.TRAINER_STATE)
                )
                return Result(*self.found.notes["finished"])
        return self._train(trainer)

    def _train(self, trainer: Any) -> Result:
        trainer.add_callback(self)
        trainer.add_callback(trainer.guard)
        with interrupts.at_boundaries(self.progress.say):
            out = trainer.train(resume_from_checkpoint=self.found and str(self.found.folder))
            loss = trainer.guard.mean_loss(out.training_loss)
            result = Result(out.global_step, loss)
            if not self.paused:
                self.save(trainer, {"finished": list(result)})
        return result

    def _start_warm(self, trainer: Any) -> None:
        """Only the adapters of the newest checkpoint that has them; all else begins anew.

        Raises:
            CheckpointError: No checkpoint has them.
        """
        self.record.truncate_log(self.name)
        self._old = checkpoint.folders(self.folder)
        if not self._old:
            return  # another role of the stage: it has not begun
        found = checkpoint.newest_adapters(self.folder)
        if found is None:
            raise CheckpointError(
                f"{self.folder}: no checkpoint holds its adapters whole",
                remedy=f"deleting {self.folder} begins the stage from its start",
            )
        if found.run.get("base") != self.run["base"]:
            raise checkpoint.changed(found.folder, _differences(found.run, self.run, ["base"]))
        self._load_roles(found)
        trainer.warm_started = True
        note = {
            "from_step": found.step,
            "adapters_sha256": found.notes["roles.safetensors"],
            "changed": _differences(found.run, self.run),
        }
        self.record.data.setdefault("warm_starts", {})[self.name] = note
        self.record.save()
        self.progress.say(f"{self.name}: begins again from the adapters of {found.folder.name}")

    def _note_resumed(self, found: Checkpoint) -> None:
        self.progress.say(f"{self.name}: going on from {found.folder.name}")
        clock = self.record.data["clock"]
        line = {"training": self.name, "from": found.folder.name}
        clock["resumed"] = [*clock.get("resumed", []), line]
        clock.setdefault("before", {})[self.name] = self._spent
        self.record.save()

    def _check_same(self, found: Checkpoint) -> None:
        """Refuse to go on as if nothing had changed where something has.

        Raises:
            CheckpointError: With a table of the differences.
        """
        if rows := _differences(found.run, self.run):
            raise checkpoint.changed(found.folder, rows)

    # -------------------------------------------------------------------- when

    def on_epoch_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
        """Note from where this epoch's order is drawn; on the way back, draw it from there."""
        if self.found is not None and not self._epoch:
            saved = self.found.part("random")
            _set_random(saved["epoch"], train_dataloader)
        self._epoch = _random(train_dataloader)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint where one is due; the end of the training saves one of its own."""
        if state.global_step >= state.max_steps:
            return
        every, minutes = self.section.every_steps, self.section.every_minutes
        due = every is not None and state.global_step % every == 0
        # In the middle of a rollout its buffer has to be saved too: time can wait for its end.
        if minutes is not None and state.global_step % self.unit == 0:
            due = due or time.monotonic() - self._saved >= 60 * minutes
        if due or interrupts.wanted():
            control.should_save = True

    # -------------------------------------------------------------------- what

    def save(self, trainer: Any, notes: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of this moment."""
        loader = trainer.callback_handler.train_dataloader
        roles = sorted(self.backbone.trained_roles)
        random_now = _random(loader)
        whole = float(trainer.state.epoch).is_integer()
        parts = {
            "roles": {role: dict(self.backbone.role_parameters(role)) for role in roles},
            "optimizer": {
                "optimizer": trainer.optimizer.state_dict(),
                "scheduler": trainer.lr_scheduler.state_dict(),
            },
            # At the end of an epoch the next one's order is drawn from here.
            "random": {"now": random_now, "epoch": random_now if whole else self._epoch},
            "trainer": {
                "kept": trainer.state_dict(),
                "loop": {name: getattr(trainer, name) for name in _OF_TRAINER},
            },
        }
        if not self._looked:
            checkpoint.check_room(self.record.folder, parts)
            self._looked = True
        state = dataclasses.asdict(dataclasses.replace(trainer.state, log_history=[]))
        state["stateful_callbacks"] = {}
        sync(self.record.folder / "metrics.jsonl")  # its lines are counted below
        checkpoint.write(
            self.folder,
            trainer.state.global_step,
            parts,
            {checkpoint.TRAINER_STATE: json.dumps(state, indent=1)},
            self.run,
            {
                "lines": len(self.record.metrics(self.name)),
                "seconds": round(self._spent + time.monotonic() - self._started, 3),
                **(notes or {}),
            },
        )
        for path in self._old:
            shutil.rmtree(path, ignore_errors=True)
        self._old = []
        checkpoint.prune(self.folder, self.section.keep)
        self._saved = time.monotonic()
        self.record.on_saved(False)

    @torch.no_grad()
    def _load_roles(self, found: Checkpoint) -> None:
        roles = found.part("roles")
        for role in sorted(self.backbone.trained_roles):
            wanted, there = dict(self.backbone.role_parameters(role)), roles.get(role, {})
            for name, parameter in wanted.items():
                tensor = there.get(name)
                if tensor is None or tensor.shape != parameter.shape:
                    raise checkpoint.lacking(found.folder, f"it lacks {name} of {role}")
                parameter.copy_(tensor)

    def load(self, trainer: Any) -> None:
        """Put back adapters, heads and what the trainer keeps.

        Raises:
            CheckpointError: Something is missing, or a tensor is of another shape.
        """
        assert self.found is not None
        self._load_roles(self.found)
        found = self.found.part("trainer")["kept"]
        for name in trainer.state_dict():
            if name not in found:
                raise checkpoint.lacking(self.found.folder, f"it lacks the trainer's {name}")
        trainer.load_state_dict(found)

    def load_optimizer(self, trainer: Any) -> None:
        """Put back the optimizer's moments and the place in the schedule."""
        assert self.found is not None
        saved = self.found.part("optimizer")
        try:
            trainer.optimizer.load_state_dict(saved["optimizer"])
            trainer.lr_scheduler.load_state_dict(saved["scheduler"])
        except (KeyError, ValueError) as error:
            raise checkpoint.lacking(self.found.folder, f"its optimizer: {error}") from None

    def load_random(self, trainer: Any) -> None:
        """Put back random states and what the loop counts; the last thing before it goes on."""
        assert self.found is not None
        _set_random(self.found.part("random")["now"], None)
        loop = send_to_device(self.found.part("trainer")["loop"], trainer.args.device)
        for name in _OF_TRAINER:
            setattr(trainer, name, loop[name])


def identity(recipe: Recipe, backbone: Backbone, record: Record, stage: str) -> dict[str, Any]:
    """What must be equal for two runs to be the same up to the end of a stage, as flat keys."""
    found = {k: v for k, v in keys_read(record.recipe(), stage).items() if v is not None}
    tokenizer = backbone.tokenizer
    template = hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
    found |= {
        "base": backbone.fingerprint,
        "base.dtype": str(backbone.causal.dtype),
        "tokenizer.template": template,
        "tokenizer.pad": tokenizer.pad_token_id,
        "tokenizer.eos": list(backbone.eos_ids),
    }
    for name, stages in READS.items():
        if stage in stages and name in record.data["data"]:
            found[f"data.{name}"] = fingerprints(record.data["data"][name])
    frozen = sorted(backbone.views.keys() - backbone.trained_roles)
    if stage == "evaluate":  # the value is there where PPO has just ended only, and is not asked
        frozen = [role for role in frozen if role != "value"]
    return found | {f"adapter.{role}": backbone.state_hash(role) for role in frozen}


def _differences(
    before: dict[str, Any], now: dict[str, Any], keys: list[str] | None = None
) -> list[str]:
    """`  key: before -> now` of everything that is not the same."""
    names = keys or sorted(before.keys() | now.keys())
    return [
        f"  {key}: {before.get(key)!r:.80} -> {now.get(key)!r:.80}"
        for key in names
        if before.get(key) != now.get(key)
    ]


def _random(loader: Any) -> dict[str, Any]:
    """Every random state that a training draws from, as plain data."""
    kind, keys, *rest = np.random.get_state()
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    generator = getattr(sampler, "generator", None)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "sampler": None if generator is None else generator.get_state(),
    }


def _set_random(saved: dict[str, Any], loader: Any) -> None:
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.random.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    generator = getattr(sampler, "generator", None)
    if generator is not None and saved["sampler"] is not None:
        generator.set_state(saved["sampler"])
