# SPDX-License-Identifier: Apache-2.0
"""Progress of a stage: a line on the terminal, and reproducible lines in the record."""

import io
from types import SimpleNamespace

import pytest
from recording import StoppedClock
from rich.console import Console

from lora_rlhf.recipe.schema import ModelSection, Recipe
from lora_rlhf.runs import progress as module
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime.oom import BatchSizeBackoff
from lora_rlhf.training import stage_log
from lora_rlhf.training.stage_log import StageLog


@pytest.fixture
def clock(monkeypatch):
    fake = StoppedClock()
    monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(stage_log, "time", fake)
    return fake


@pytest.fixture
def record(tmp_path):
    return Record.open(tmp_path / "run", Recipe(name="little", model=ModelSection(id="tiny")))


def screen(*, terminal=False, quiet=False):
    progress = Progress(quiet=quiet)
    progress.console = Console(file=io.StringIO(), force_terminal=terminal, width=60)
    return progress, progress.console.file


def test_without_a_terminal_lines_are_printed_at_intervals_and_at_the_end(clock):
    progress, out = screen()
    progress.begin("ppo", 10)
    for step in range(1, 10):
        clock.now += 4
        progress.step(step, {"reward/score": 0.5 * step, "kl/sequence": 1.0, "other": 9.0})
    clock.now += 4
    progress.step(10, {"reward/score": 5.0})
    progress.end()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["4/10", "8/10", "10/10"]
    assert lines[0] == "ppo 4/10  4.00 s/step  0:24 left  score 2  kl 1"
    assert "score 5" in lines[2] and "0:00 left" in lines[2]


def test_without_a_terminal_a_step_that_is_logged_twice_is_printed_once(clock, record):
    """SFT's held-out loss is logged at the last step, after that step itself."""
    progress, out = screen()
    for stage in ("sft", "reward"):  # the next stage may end at the same step
        progress.begin(stage, 10)
        log = StageLog(record, stage, progress)
        log.on_log(None, state(10), None, logs={"loss": 1.5})
        clock.now += 60
        log.on_log(None, state(10), None, logs={"eval_loss": 1.25})
        progress.end()
    assert [line.split()[:2] for line in out.getvalue().splitlines()] == [
        ["sft", "10/10"],
        ["reward", "10/10"],
    ]
    assert len(record.metrics()) == 4, "the record keeps both"


def test_a_line_is_never_wrapped_or_read_as_markup(clock):
    progress, out = screen()
    progress.say("warning: [red]adapters/x[/red] " + "long " * 30)
    progress.begin("ppo", 1)
    metrics = dict.fromkeys(
        ("reward/score", "rewards/gold", "kl/sequence", "completions/length"), 1.0
    )
    progress.step(1, metrics)
    lasting, line = out.getvalue().split("ppo ", 1)
    assert "[red]adapters/x[/red]" in lasting
    assert len(line.splitlines()) == 1 and "length 1" in line


def test_a_line_fits_80_columns(clock):
    """The most important metrics stay."""
    progress, out = screen()
    progress.plan(("sft", "reward", "ppo", "evaluate", "card"), {"ppo": 1.0, "evaluate": 3.0})
    progress.begin("ppo", 10_000)
    clock.now += 30_000
    names = ("reward/score", "rewards/gold", "kl/sequence", "completions/length")
    progress.step(1_000, dict.fromkeys(names, -0.12))
    [line] = out.getvalue().splitlines()
    assert line.startswith("3/5 ppo 1000/10000  30.00 s/step  ~75:00:00 left (run ~325:00:00)")
    assert len(line) <= 80 and line.endswith("score -0.12")


def test_the_time_left_of_the_run_goes_by_the_work_of_each_training(clock):
    progress, _ = screen()
    progress.plan(("sft", "reward", "ppo"), {"sft": 10, "reward": 20, "held_out": 20, "ppo": 50})
    progress.begin("sft", 5)
    clock.now += 10
    progress.step(5, {})
    assert "(run 1:30)" in progress._line().plain, "90 of work at 1 a second"
    progress.begin("reward", 4)
    clock.now += 10
    progress.step(1, {})
    assert progress._line().plain.startswith("2/3 reward 1/4  10.00 s/step  ~0:30 left (run ")
    # 10 + 5 of work in 20 s: 30 s here, and 70 of work at that speed.
    assert "(run 2:03)" in progress._line().plain
    clock.now += 10
    progress.begin("held_out", 2)
    clock.now += 1
    progress.step(1, {})
    assert progress._line().plain.startswith("2/3 held_out 1/2")
    assert len(progress._work) == 2


def test_the_first_slow_steps_do_not_count_once_there_are_others(clock):
    progress, _ = screen()
    progress.plan(("sft", "ppo"), {"sft": 10, "ppo": 190})
    progress.begin("sft", 10)
    clock.now += 30  # libraries compile and caches fill
    progress.step(1, {})
    assert "  ~4:30 left (run ~" in progress._line().plain
    clock.now += 2
    progress.step(3, {})
    assert progress._line().plain.startswith("1/2 sft 3/10  1.00 steps/s  0:07 left (run ~")


def test_a_resumed_training_counts_its_own_steps_only(clock):
    progress, _ = screen()
    progress.begin("ppo", 100, first=90)
    clock.now += 20
    progress.step(95, {})
    assert progress._line().plain == "ppo 95/100  4.00 s/step  ~0:20 left"


def test_rows_that_are_sampled_and_scored_are_steps(clock):
    progress, out = screen()
    backoff = BatchSizeBackoff()
    seen = []
    with progress.counting(backoff, "evaluate", 8):
        backoff.for_each_batch("generation", range(6), 4, seen.append)
        assert progress._line().plain == "evaluate 6/8"
        clock.now += 40
        backoff.for_each_batch("scoring", range(2), 4, seen.append)
    assert out.getvalue() == "evaluate 8/8  10.00 s/step  0:00 left\n"
    backoff.for_each_batch("scoring", range(2), 4, seen.append)
    assert len(seen) == 4


def test_a_terminal_shows_stage_phase_and_metrics_and_leaves_nothing(clock):
    progress, out = screen(terminal=True)
    progress.begin("ppo", 4)
    progress.phase("rollout")
    clock.now += 2
    progress.step(1, {"reward/score": 0.123456})
    assert progress._line().plain == "ppo 1/4 rollout  2.00 s/step  ~0:06 left  score 0.123"
    progress.end()
    progress.end()
    progress.phase("after the end")
    assert progress._live is None
    assert "\x1b[2K" in out.getvalue(), "the live line stays on the screen"


def test_no_rate_is_shown_before_the_first_step(clock):
    progress, _ = screen()
    progress.begin("sft", 5)
    assert progress._line().plain == "sft 0/5"
    clock.now += 10
    assert "left" not in progress._line().plain


def test_a_new_stage_drops_the_metrics_of_the_last_one(clock):
    progress, _ = screen()
    progress.begin("sft", 1)
    progress.phase("update")
    progress.step(1, {"loss": 2.0})
    progress.begin("reward", 3)
    assert progress._line().plain == "reward 0/3"


def test_quiet_prints_nothing(clock):
    progress, out = screen(terminal=True, quiet=True)
    progress.say("something")
    progress.begin("sft", 1)
    progress.phase("update")
    progress.step(1, {"loss": 1.0})
    progress.end()
    assert out.getvalue() == ""


def state(step):
    return SimpleNamespace(global_step=step)
