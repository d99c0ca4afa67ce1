# SPDX-License-Identifier: Apache-2.0
"""What a trainer logs: equal lines for equal runs, and the progress line."""

from types import SimpleNamespace

import pytest
from recording import StoppedClock

from lora_rlhf.recipe.schema import ModelSection, Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.training import stage_log
from lora_rlhf.training.stage_log import StageLog


@pytest.fixture
def clock(monkeypatch):
    stopped = StoppedClock()
    monkeypatch.setattr(stage_log, "time", stopped)
    return stopped


@pytest.fixture
def record(tmp_path):
    return Record.open(tmp_path / "run", Recipe(name="little", model=ModelSection(id="tiny")))


def state(step):
    return SimpleNamespace(global_step=step)


def test_numbers_that_depend_on_the_clock_are_logged_apart(clock, record):
    progress = Progress(quiet=True)
    progress.begin("ppo", 3)
    log = StageLog(record, "ppo", progress, steps_per_unit=4)
    clock.now += 2.5
    log.on_log(
        None,
        state(8),
        None,
        logs={
            "loss": 1.5,
            "epoch": 0.3,
            "step_time": 9.0,
            "reward/score": 2.0,
            "x_per_second": 1.0,
        },
    )
    log.on_log(None, state(12), None, logs={"train_runtime": 3.0, "train_loss": 1.0})
    log.on_log(None, state(12), None, logs=None)
    first, last = record.metrics()
    assert first == {
        "stage": "ppo",
        "step": 2,
        "loss": 1.5,
        "reward/score": 2.0,
        "clock": {"step_time": 9.0, "x_per_second": 1.0, "seconds": 2.5},
    }
    assert last == {"stage": "ppo", "step": 3, "clock": {"seconds": 0.0}}
    assert progress.step_count == 3 and "score 2" in progress._line().plain


@pytest.mark.parametrize(("steps", "per_unit", "total"), [(7, 1, 7), (12, 4, 3), (13, 4, 4)])
def test_the_total_comes_from_the_trainer(clock, record, steps, per_unit, total):
    """Epochs may be halves, and a last window of gradients may be short."""
    progress = Progress(quiet=True)
    log = StageLog(record, "sft", progress, steps_per_unit=per_unit)
    log.on_train_begin(None, SimpleNamespace(max_steps=steps, global_step=0), None)
    assert progress.total == total


def test_nan_is_logged_and_not_shown(clock, record):
    progress = Progress(quiet=True)
    progress.begin("ppo", 1)
    StageLog(record, "ppo", progress).on_log(
        None, state(1), None, logs={"reward/score": None, "kl/sequence": float("nan")}
    )
    [line] = record.metrics()
    assert line["reward/score"] is None and line["kl/sequence"] == "nan"
    assert "reward/score" not in progress._line().plain
