# SPDX-License-Identifier: Apache-2.0
"""Signals and a budget of minutes: saved at the next boundary, the right exit code, equal bits."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed
import pytest
import typer
from hub_run import make_finished
from hub_server import HubServer, hub_env

from lora_rlhf import pipeline
from lora_rlhf.algorithms.ppo import ppo_trainer
from lora_rlhf.cli import shell
from lora_rlhf.runs import checkpoint
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import interrupts


@pytest.fixture
def whole(runs: killed.Runs) -> Path:
    """The run that nobody disturbed."""
    return runs.after("ppo")


def unsaved_recipe(runs: killed.Runs, *sets: str):
    """A recipe without regular checkpoints: those on disk come from the signal."""
    return runs.recipe("ppo", "checkpoint.every_steps=null", *sets)


def run(recipe, out: Path, prepare=None) -> int:
    """As the command line runs it; the exit code."""
    if prepare is not None:
        prepare()
    try:
        with shell.errors_as_text(False), shell.signals_raise():
            pipeline.run(recipe, out, until="ppo", progress=Progress(quiet=True))
    except typer.Exit as error:
        return error.exit_code
    return 0


def at(owner, name: str, number: int, times: int = 1, call: int = 1):
    """Send this process a signal when something is called for the n-th time."""

    def prepare() -> None:
        real, seen = getattr(owner, name), [0]

        def instead(*args, **kwargs):
            seen[0] += 1
            if seen[0] == call:
                for _ in range(times):
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)  # a handler runs between two instructions
            return real(*args, **kwargs)

        setattr(owner, name, instead)

    return prepare


PHASES = {
    "load": (pipeline.Backbone, "load", 1, None),
    "rollout": (ppo_trainer.PPOTrainer, "_generate", 2, 5),
    "score": (ppo_trainer.PPOTrainer, "_calculate_rewards", 2, 5),
    "update": (ppo_trainer.PPOTrainer, "training_step", 6, 6),
    "save": (checkpoint, "write", 3, None),
}
"""Phase -> what is called, the how-manieth time, and the step of PPO that is then saved."""


@pytest.mark.parametrize(
    ("phase", "name"),
    [("rollout", "SIGTERM")]
    + [
        pytest.param(phase, name, marks=pytest.mark.slow)
        for phase, name in [*((p, "SIGINT") for p in PHASES), ("load", "SIGTERM"),
                            ("save", "SIGTERM"), ("score", "SIGTERM"), ("update", "SIGTERM")]
    ],
)  # fmt: skip
def test_a_signal_saves_at_the_next_boundary(
    runs: killed.Runs, whole: Path, tmp_path: Path, phase: str, name: str
):
    owner, function, call, step = PHASES[phase]
    number, out = getattr(signal, name), runs.copy("ppo", tmp_path / "run")
    recipe = unsaved_recipe(runs, *(["checkpoint.every_steps=1"] if phase == "save" else []))
    child = killed.start(run, recipe, out, at(owner, function, number, call=call))
    assert killed.wait(child) == 128 + number
    if step is not None:
        newest, skipped = checkpoint.newest(out / "checkpoints" / "ppo")
        assert newest is not None and (newest.step, skipped) == (step, {})
    assert killed.wait(killed.start(run, recipe, out)) == 0
    assert killed.bits(out) == killed.bits(whole)


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_second_signal_is_immediate(runs: killed.Runs, whole: Path, tmp_path: Path, name: str):
    number = getattr(signal, name)
    second = at(ppo_trainer.PPOTrainer, "_generate", number, times=2)
    out = runs.copy("ppo", tmp_path / "run")
    assert killed.wait(killed.start(run, unsaved_recipe(runs), out, second)) == -number
    assert killed.wait(killed.start(run, unsaved_recipe(runs), out)) == 0
    assert killed.bits(out) == killed.bits(whole)


def test_time_budget_stops_a_run_that_then_continues(
    runs: killed.Runs, whole: Path, tmp_path: Path
):
    def out_at_fifth_look() -> None:
        looks = iter(range(99))
        interrupts.out_of_time = lambda: next(looks) >= 5

    out = runs.copy("ppo", tmp_path / "run")
    assert killed.wait(killed.start(run, unsaved_recipe(runs), out, out_at_fifth_look)) == 0
    assert Record.read(out).in_flight("ppo") and not Record.read(out).done("ppo")
    assert killed.wait(killed.start(run, unsaved_recipe(runs), out)) == 0
    assert killed.bits(out) == killed.bits(whole)


@pytest.mark.slow
def test_shortest_time_budget_finishes_after_many_runs(
    runs: killed.Runs, whole: Path, tmp_path: Path
):
    """The shortest there is: every session gets at least to its next boundary, and exits with 0."""
    out, sessions = tmp_path / "run", 0
    recipe = unsaved_recipe(runs, "checkpoint.max_minutes=0.0001")
    while not (out / "record.json").exists() or not Record.read(out).done("ppo"):
        assert killed.wait(killed.start(run, recipe, out)) == 0
        sessions += 1
        assert sessions < 60
    assert sessions > 20
    assert killed.bits(out) == killed.bits(whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_at_random_moments(runs: killed.Runs, whole: Path, tmp_path: Path, name: str):
    number, rng, wanted = getattr(signal, name), random.Random(), killed.bits(whole)
    for turn in range(20):
        out = tmp_path / str(turn)
        child = killed.start(run, unsaved_recipe(runs), out)
        time.sleep(rng.uniform(0.3, 4))
        os.kill(child, number)
        assert killed.wait(child) in (128 + number, 0)
        assert killed.wait(killed.start(run, unsaved_recipe(runs), out)) == 0
        assert killed.bits(out) == wanted


@pytest.mark.hub
@pytest.mark.parametrize("name", [pytest.param("SIGTERM", marks=pytest.mark.slow), "SIGINT"])
def test_signal_during_a_push_leaves_no_partial_repository(tmp_path: Path, name: str):
    """The Hub is busy, the client waits to try again; then the user has had enough."""
    number = getattr(signal, name)
    folder = make_finished(tmp_path)
    record = Record.read(folder)
    record.data["model"] |= {"hub_id": "acme/base"}
    record.save()
    command = [sys.executable, "-m", "lora_rlhf", "push", str(folder), "--policy", "acme/little"]
    with HubServer(user="tester", token="hf_test", orgs=("acme",)) as server:
        server.add_repo("acme/base", {"config.json": b"{}"}, private=True)
        server.fail_next("PUT", r"^/_lfs/", 503, times=999)
        process = subprocess.Popen(
            command,
            env=hub_env(server, tmp_path),
            stderr=subprocess.PIPE,
            # A shell starts its background jobs with SIGINT ignored, and so would the tests.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        deadline = time.monotonic() + 120
        while not any(r.method == "PUT" for r in server.requests) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=180)
        assert process.returncode == 128 + number, stderr
        assert b"Traceback" not in stderr and b"same command" in stderr
        repo = server.repos.get("acme/little")
        assert repo is None or set(repo.files) <= {".gitattributes"}, "a repository without a card"
        server._faults.clear()
        done = subprocess.run(command, env=hub_env(server, tmp_path), capture_output=True)
        assert done.returncode == 0, done.stderr
        files = server.repos["acme/little"].files
        assert "README.md" in files and "adapter_model.safetensors" in files


# --- without a run -------------------------------------------------------------------------------


def test_outside_of_a_training_a_signal_raises_at_once():
    with pytest.raises(interrupts.Interrupted, match="SIGTERM"):
        interrupts.receive("SIGTERM")
    # Raised in a callback, it would have been dropped: whoever waits for the Hub looks again.
    with pytest.raises(interrupts.Interrupted, match="SIGTERM"):
        interrupts.sleep(0)
    interrupts.sleep(0)


def test_deferred_signal_is_raised_at_the_end():
    lines = []
    with pytest.raises(interrupts.Interrupted, match="SIGINT"):
        with interrupts.deferred(lines.append):
            assert interrupts._state.waiting is None
            interrupts.receive("SIGINT")
            assert interrupts._state.waiting == "SIGINT"
    assert lines == [
        "Ctrl-C: finishing this step, then saving. Press again to quit without saving."
    ]
    assert interrupts._state.waiting is None


def test_an_error_inside_is_not_hidden_by_a_signal():
    with pytest.raises(ValueError, match="first"):
        with interrupts.deferred():
            interrupts.receive("SIGINT")
            raise ValueError("first")
    interrupts._state.waiting = None


def test_a_budget_ends_with_its_run():
    with interrupts.time_budget(1e-9):
        assert interrupts.out_of_time()
        with pytest.raises(interrupts.OutOfTime):
            interrupts.stop_if_requested()
        with interrupts.time_budget(None):
            assert not interrupts.out_of_time()
    assert not interrupts.out_of_time()


def test_a_launcher_that_ends_the_others_adds_no_line_to_the_error():
    """torchrun sends SIGTERM to the rest when a process dies, which said "Send SIGTERM again"."""
    for alone, signals in ((True, ["SIGTERM", "SIGINT"]), (False, ["SIGINT"])):
        said = []
        with interrupts.time_budget(None, alone=alone), contextlib.ExitStack() as stack:
            stack.enter_context(pytest.raises(interrupts.Interrupted))
            stack.enter_context(interrupts.deferred(said.append))
            interrupts.receive("SIGTERM")
            interrupts.receive("SIGINT")
        assert len(said) == len(signals) and ("SIGTERM" in said[0]) == alone
