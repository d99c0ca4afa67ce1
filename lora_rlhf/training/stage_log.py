# SPDX-License-Identifier: Apache-2.0
"""Callback that writes a trainer's log to `metrics.jsonl` and to the progress line."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerState

from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record

_CLOCK = ("runtime", "per_second", "step_time", "total_flos", "preparation_time")


class StageLog(TrainerCallback):
    """Log of one training, with all timings under `clock`, so that equal runs log equal lines."""

    def __init__(
        self, record: Record, stage: str, progress: Progress, steps_per_unit: int = 1
    ) -> None:
        self.record, self.stage, self.progress = record, stage, progress
        self.steps_per_unit = steps_per_unit
        self._last = time.perf_counter()

    def on_train_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        """Open the progress line, now that the number of steps is known."""
        unit = self.steps_per_unit
        self.progress.begin(self.stage, -(-state.max_steps // unit), state.global_step // unit)

    def on_log(
        self, _: Any, state: TrainerState, *__: Any, logs: dict[str, Any] | None = None, **___: Any
    ) -> None:
        """Write one line; skip Trainer's closing summary."""
        logs = dict(logs or {})
        if "train_runtime" in logs:
            return
        now = time.perf_counter()
        clock = {k: v for k, v in logs.items() if any(word in k for word in _CLOCK)}
        clock["seconds"] = round(now - self._last, 4)
        self._last = now
        if laps := self.progress.laps():
            clock["phases"] = laps
        metrics = {k: v for k, v in logs.items() if k not in clock and k != "epoch"}
        step = state.global_step // self.steps_per_unit
        self.record.log(self.stage, step, metrics, clock)
        self.progress.step(step, metrics)
