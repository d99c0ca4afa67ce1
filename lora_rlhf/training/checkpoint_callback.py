# SPDX-License-Identifier: Apache-2.0
"""Callback that saves and resumes one training; `resumable_trainer` calls it."""

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
from transformers import TrainerCallback, TrainerControl, TrainerState

from lora_rlhf.distributed.world import world
from lora_rlhf.errors import CheckpointError
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.stage_keys import READS, fingerprints, keys_read
from lora_rlhf.runs import checkpoint
from lora_rlhf.runs.checkpoint import Checkpoint
from lora_rlhf.runs.disk import sha256, sync
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import interrupts

from .nonfinite_guard import NonFiniteGuard
from .stage_context import StageContext

_LOOP_STATE = (
    "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step",
)  # fmt: skip
"""Attributes that Trainer resets when its loop begins, so they are restored after that."""


class Result(NamedTuple):
    """Result of a training that finished in this process or in an earlier one."""

    global_step: int
    training_loss: float


class CheckpointCallback(TrainerCallback):
    """Saves and resumes the training of a stage, or of one role in the reward stage.

    Attributes:
        resumed: The checkpoint that training continues from.
        paused: Whether training stopped early, for a signal or its time budget.
    """

    def __init__(self, context: StageContext, stage: str, name: str, unit: int = 1) -> None:
        recipe, self.backbone, self.record, self.progress = self.context = context
        self.section = recipe.checkpoint
        self.stage, self.name, self.unit = stage, name, unit
        self.folder = self.record.checkpoints(name)
        self.resumed: Checkpoint | None = None
        self.run = identity(self.backbone, self.record, stage)
        self.paused = self._room_checked = False
        self._replaced = list[Any]()  # checkpoints from before a warm start
        self._epoch: dict[str, Any] = {}  # random states at the start of this epoch
        self._saved = self._started = time.monotonic()
        self._seconds = 0.0  # of earlier processes

    def train(self, trainer: Any) -> Result:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            CheckpointError: No checkpoint is complete, or it is of another run.
            Interrupted, OutOfTime: After saving.
        """
        trainer.checkpoints, trainer.backoff = self, self.backbone.backoff
        trainer.guard = NonFiniteGuard(trainer, self.context, self.name, self.unit)
        if self.record.warm_start and self.record.in_flight(self.stage):
            self._start_warm(trainer)
            return self._train(trainer)
        self.resumed, skipped = checkpoint.newest(self.folder)
        for name, why in skipped.items():
            self.progress.say(f"{self.name}: checkpoint {name} is not used: {why}")
        if self.resumed is None:
            self.record.truncate_log(self.name)
            return self._train(trainer)
        notes, folder = self.resumed.notes, self.resumed.folder
        self.record.truncate_log(self.name, notes["log"]["lines"])
        if self._log_state() != notes["log"]:
            raise checkpoint.lacking(folder, "metrics.jsonl has other lines than then")
        if rows := _differences(self.resumed.run, self.run):
            raise checkpoint.changed(folder, rows)
        self._seconds = float(notes["seconds"])
        self.progress.say(f"{self.name}: continuing from {folder.name}")
        clock = self.record.data["clock"]
        clock.setdefault("resumed", []).append({"training": self.name, "from": folder.name})
        clock.setdefault("before", {})[self.name] = self._seconds
        self.record.save()
        if "finished" in notes:
            self.load(trainer)
            trainer.state = TrainerState.load_from_json(str(folder / checkpoint.TRAINER_STATE))
            # Nothing is trained, but the closing evaluation is logged.
            steps = -(-trainer.state.max_steps // self.unit)
            self.progress.begin(self.name, steps, steps)
            return Result(*notes["finished"])
        return self._train(trainer)

    def _train(self, trainer: Any) -> Result:
        trainer.add_callback(self)
        trainer.add_callback(trainer.guard)
        with interrupts.deferred(self.progress.say):
            out = trainer.train(resume_from_checkpoint=self.resumed and str(self.resumed.folder))
            result = Result(out.global_step, trainer.guard.mean_loss(out.training_loss))
            if not self.paused:
                self.save(trainer, {"finished": list(result)})
        return result

    def _start_warm(self, trainer: Any) -> None:
        """Load only the adapters of the newest checkpoint that has them."""
        self.record.truncate_log(self.name)
        self._replaced = checkpoint.folders(self.folder)
        if not self._replaced:
            return  # a later role of the stage, not begun yet
        start = checkpoint.newest_adapters(self.folder)
        if start is None:
            raise CheckpointError(
                f"{self.folder}: no checkpoint holds its adapters whole",
                remedy=f"delete {self.folder} to restart the stage from the beginning",
            )
        if start.run.get("base") != self.run["base"]:
            raise checkpoint.changed(start.folder, _differences(start.run, self.run, ["base"]))
        self._load_roles(start)
        trainer.warm_started = True
        self.record.data.setdefault("warm_starts", {})[self.name] = {
            "from_step": start.step,
            "adapters_sha256": start.notes["roles.safetensors"],
            "changed": _differences(start.run, self.run),
        }
        self.record.save()
        self.progress.say(f"{self.name}: restarting from the adapters of {start.folder.name}")

    def on_epoch_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
        """Save the random states that determine this epoch's order; restore them on resume."""
        if self.resumed is not None and not self._epoch:
            _set_random_states(self.resumed.part("random")["epoch"], train_dataloader)
        self._epoch = _random_states(train_dataloader)

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        """Request a checkpoint if one is due; at the end of training `_train` saves one.

        With several processes, if one is due in any.
        """
        stop = interrupts.agree(world().gathered)
        if state.global_step >= state.max_steps:
            return
        every, minutes = self.section.every_steps, self.section.every_minutes
        due = every is not None and state.global_step % every == 0
        # A checkpoint by time waits for the end of a rollout, whose buffer is then not saved.
        if minutes is not None and state.global_step % self.unit == 0:
            late = time.monotonic() - self._saved >= 60 * minutes
            due = any(world().gathered(late)) or due
        if due or stop:
            control.should_save = True

    def save(self, trainer: Any, notes: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of the current state, in the first process.

        Raises:
            SetupError: The processes have different adapters.
        """
        self.context.check_equal(sorted(self.backbone.trained_roles))
        if not world().first:
            self._saved = time.monotonic()
            return
        random_now = _random_states(trainer.callback_handler.train_dataloader)
        epoch_ends = float(trainer.state.epoch).is_integer()
        parts = {
            "roles": {
                role: dict(self.backbone.role_parameters(role))
                for role in sorted(self.backbone.trained_roles)
            },
            "optimizer": {
                "optimizer": trainer.optimizer.state_dict(),
                "scheduler": trainer.lr_scheduler.state_dict(),
            },
            # At the end of an epoch, the current state determines the next one's order.
            "random": {"now": random_now, "epoch": random_now if epoch_ends else self._epoch},
            "trainer": {
                "kept": trainer.state_dict(),
                "loop": {name: getattr(trainer, name) for name in _LOOP_STATE},
            },
        }
        if not self._room_checked:
            checkpoint.check_room(self.record.folder, parts)
            self._room_checked = True
        state = dataclasses.asdict(dataclasses.replace(trainer.state, log_history=[]))
        state["stateful_callbacks"] = {}
        self.record.check_place()
        sync(self.record.folder / "metrics.jsonl")  # its lines are counted below
        checkpoint.write(
            self.folder,
            trainer.state.global_step,
            parts,
            {checkpoint.TRAINER_STATE: json.dumps(state, indent=1)},
            self.run,
            {
                "log": self._log_state(),
                "seconds": round(self._seconds + time.monotonic() - self._started, 3),
                **(notes or {}),
            },
        )
        for path in self._replaced:
            shutil.rmtree(path, ignore_errors=True)
        self._replaced = []
        checkpoint.prune(self.folder, self.section.keep)
        self._saved = time.monotonic()
        self.record.on_saved(False)

    def _log_state(self) -> dict[str, Any]:
        return self.record.log_states().get(self.name, {"lines": 0})

    @torch.no_grad()
    def _load_roles(self, start: Checkpoint) -> None:
        roles = start.part("roles")
        for role in sorted(self.backbone.trained_roles):
            for name, parameter in self.backbone.role_parameters(role):
                tensor = roles.get(role, {}).get(name)
                if tensor is None or tensor.shape != parameter.shape:
                    raise checkpoint.lacking(start.folder, f"it lacks {name} of {role}")
                parameter.copy_(tensor)

    def load(self, trainer: Any) -> None:
        """Restore adapters, heads and the trainer's state.

        Raises:
            CheckpointError: An entry is missing, or a tensor has another shape.
        """
        assert self.resumed is not None
        self._load_roles(self.resumed)
        state = self.resumed.part("trainer")["kept"]
        for name in trainer.state_dict():
            if name not in state:
                raise checkpoint.lacking(self.resumed.folder, f"it lacks the trainer's {name}")
        trainer.load_state_dict(state)

    def load_optimizer(self, trainer: Any) -> None:
        """Restore the states of optimizer and scheduler."""
        assert self.resumed is not None
        state = self.resumed.part("optimizer")
        try:
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.lr_scheduler.load_state_dict(state["scheduler"])
        except (KeyError, ValueError) as error:
            raise checkpoint.lacking(self.resumed.folder, f"its optimizer: {error}") from None

    def load_random(self, trainer: Any) -> None:
        """Restore random states and the loop's counters, right before training."""
        assert self.resumed is not None
        _set_random_states(self.resumed.part("random")["now"])
        loop = send_to_device(self.resumed.part("trainer")["loop"], trainer.args.device)
        for name in _LOOP_STATE:
            setattr(trainer, name, loop[name])


def identity(backbone: Backbone, record: Record, stage: str) -> dict[str, Any]:
    """Return the flat keys that are equal in two runs that agree up to a stage's end."""
    flat = {k: v for k, v in keys_read(record.recipe(), stage).items() if v is not None}
    tokenizer = backbone.tokenizer
    flat |= {
        "base": backbone.fingerprint,
        "base.dtype": str(backbone.causal.dtype),
        "tokenizer.template": hashlib.sha256(
            str(tokenizer.chat_template or "").encode()
        ).hexdigest(),
        "tokenizer.pad": tokenizer.pad_token_id,
        "tokenizer.eos": list(backbone.eos_ids),
    }
    for name, stages in READS.items():
        if stage in stages and name in record.data["data"]:
            flat[f"data.{name}"] = fingerprints(record.data["data"][name])
    own = record.recipe().ppo.function
    if own and stage not in ("sft", "reward"):
        path = Path(own[0])
        flat |= {"ppo.reward": f"{path.name}:{own[1]}", "ppo.reward.sha256": sha256(path)}
    frozen = backbone.views.keys() - backbone.trained_roles
    if stage == "evaluate":  # it does not use the value, which exists only right after PPO
        frozen -= {"value"}
    return flat | {f"adapter.{role}": backbone.state_hash(role) for role in sorted(frozen)}


def _differences(
    before: dict[str, Any], now: dict[str, Any], keys: list[str] | None = None
) -> list[str]:
    """List `  key: before -> now` of every key that differs; hashes stand for moved files."""
    return [
        f"  {key}: {before.get(key)!r:.80} -> {now.get(key)!r:.80}"
        for key in keys or sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key != "model.id"
        and not key.endswith((".path", ".from"))
    ]


def _generator(loader: Any) -> Any:
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return getattr(sampler, "generator", None)


def _random_states(loader: Any) -> dict[str, Any]:
    """Return every random state that training uses, as plain data."""
    kind, keys, *rest = np.random.get_state()
    generator = _generator(loader)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "sampler": None if generator is None else generator.get_state(),
    }


def _set_random_states(states: dict[str, Any], loader: Any = None) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    if (generator := _generator(loader)) is not None and states["sampler"] is not None:
        generator.set_state(states["sampler"])
