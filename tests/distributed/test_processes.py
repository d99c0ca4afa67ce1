# SPDX-License-Identifier: Apache-2.0
"""Processes that cannot work together, are slow, or end: one error by one of them."""

import os
import signal
import socket
import tempfile
import time
from pathlib import Path

import killed
import pytest
import several

from lora_rlhf import pipeline
from lora_rlhf.distributed import launch, replica
from lora_rlhf.distributed.heartbeat import Heartbeat
from lora_rlhf.distributed.world import World
from lora_rlhf.errors import SetupError
from lora_rlhf.models import sampler
from lora_rlhf.recipe.loader import dump_recipe

SETS = ("sft.args.num_train_epochs=4",)


class Store(dict):
    """A store of one process."""

    set = dict.__setitem__

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()


def one_reports(log: Path, size: int, text: str) -> str:
    """The error, which exactly one process printed."""
    said = several.said(log, size)
    errors = [one for one in said if text in one]
    assert len(errors) == 1 and errors[0].count(text) == 1, "\n---\n".join(said)
    assert "Traceback" not in "".join(said)
    return errors[0]


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def command(tmp_path, runs):
    """The arguments of a little run that ends with SFT."""
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(runs.recipe("sft", *SETS)))
    return ["sft", str(path), "--out", str(tmp_path / "out")]


# ------------------------------------------------------------------------- in one process


def test_rows_are_shared_once():
    worlds = [World(rank, 3) for rank in range(3)]
    for count in (0, 1, 2, 3, 7, 12):
        assert sorted(i for world in worlds for i in world.own(count)) == list(range(count))
        blocks = [world.block(count) for world in worlds]
        assert [i for start, stop in blocks for i in range(start, stop)] == list(range(count))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"MASTER_ADDR": ""}, "WORLD_SIZE=2 is set, and MASTER_ADDR is not"),
        ({"RANK": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"MASTER_PORT": "x"}, "not a whole number"),
    ],
)
def test_a_launch_with_a_wrong_variable_is_refused(monkeypatch, given, message):
    right = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (right | given).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=message):
        launch.read()


def test_what_is_for_one_process_is_refused_in_several(monkeypatch):
    launch.refuse("a sweep")
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "silent", False)
    with pytest.raises(SetupError, match="a sweep is for one process, and this launch has 2"):
        launch.refuse("a sweep")
    assert launch.silent  # the first process says it


@pytest.mark.parametrize(
    ("limit", "first", "second", "last"),
    [("SILENCE", "5", "end", "end"), ("FAILED", "failed", "7", "failed")],
)
def test_a_process_that_is_silent_or_failed_is_gone(monkeypatch, limit, first, second, last):
    """One that ended is not gone, and one that failed is sooner than a silent one."""
    monkeypatch.setattr("lora_rlhf.distributed.heartbeat.SECONDS", 0.01)
    monkeypatch.setattr(f"lora_rlhf.distributed.heartbeat.{limit}", 0.05)
    store, gone = Store({"beat/1": first, "beat/2": second}), []
    beat = Heartbeat(store, 0, 3, gone.append)
    beat.start()
    until(lambda: gone, 30)
    beat.stop(last)
    assert gone == [1] and store["beat/0"] == last


# ------------------------------------------------------------------------- in several


def test_a_batch_that_does_not_divide_is_one_error(tmp_path, command):
    children = several.command(3, command, tmp_path / "log")
    assert [killed.wait(child) for child in children] == [2, 2, 2]
    error = one_reports(tmp_path / "log", 3, "4 rows cannot be shared equally by 3 processes")
    assert "a multiple of 3" in error and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_with_different_recipes_are_one_error(tmp_path, command):
    def other(rank: int) -> list[str]:
        return [*command, "--set", f"sft.args.learning_rate={rank + 1}e-3"]

    port = several.free_port()
    children = [several.command(2, other(r), tmp_path / "log", only=r, port=port) for r in (0, 1)]
    assert [killed.wait(child) for [child] in children] == [4, 4]
    error = one_reports(tmp_path / "log", 2, "different recipes, packages or devices")
    assert "sft.args.learning_rate: 0.001 in process 0, 0.002 in process 1" in error


@pytest.mark.slow
def test_a_port_in_use_is_one_error(tmp_path, command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [child] = several.command(2, command, tmp_path / "log", only=0, port=port)
        assert killed.wait(child) == 4
    text = (tmp_path / "log.0").read_text()
    assert f"127.0.0.1:{port} is in use" in text and "MASTER_PORT" in text


def _without_disk(recipe, out: Path) -> None:
    if os.environ["RANK"] == "1":
        tempfile.tempdir = str(out / "nowhere")
    pipeline.run(recipe, out, until="sft")


@pytest.mark.slow
def test_a_process_without_a_disk_ends_the_run(tmp_path, runs, monkeypatch):
    monkeypatch.setenv("KILLED_LOG", str(tmp_path / "log"))
    children = several.launch(2, _without_disk, runs.recipe("sft", *SETS), tmp_path / "out")
    assert [killed.wait(child) for child in children] == [1, 1]
    assert "process 1 cannot keep its copy of the run" in (tmp_path / "log.1").read_text()
    assert "run the same command to continue" in (tmp_path / "log.0").read_text()


def _slow(recipe, out: Path) -> None:
    real = replica.world().__class__.gathered

    def late(self, mine):
        time.sleep(0.3 if self.rank else 0)
        return real(self, mine)

    World.gathered = late
    pipeline.run(recipe, out, until="sft")


@pytest.mark.slow
def test_a_slow_process_is_waited_for(tmp_path, runs):
    recipe = runs.recipe("sft")
    several.finish(2, _slow, recipe, tmp_path / "out", log=tmp_path / "log")
    assert (tmp_path / "out" / "adapters" / "sft").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_and_the_command_goes_on(tmp_path, runs, command, victim):
    log, saved = tmp_path / "log", tmp_path / "out" / "checkpoints" / "sft"
    children = several.command(2, command, log)
    until(lambda: (saved / "step-00000002").is_dir())
    os.kill(children[victim], signal.SIGKILL)
    started = time.monotonic()
    assert killed.wait(children[1 - victim]) == 4
    assert time.monotonic() - started < 60
    killed.wait(children[victim])
    one_reports(log, 2, "another process of this run ended")
    children = several.command(2, command, log)
    assert [killed.wait(child) for child in children] == [0, 0]
    assert "continuing from step" in several.said(log, 2)[0]
    whole = tmp_path / "whole"
    several.finish(2, killed.go, runs.recipe("sft", *SETS), whole, "sft", log=tmp_path / "error")
    assert killed.bits(whole)["weights"] == killed.bits(tmp_path / "out")["weights"]


def _dies_while_sampling(recipe, out: Path) -> None:
    """Kill process 1 between two tokens, once the first update is saved."""
    real, rank = sampler._Batch._step, os.environ["RANK"]

    def step(self, only_trunk):
        if rank == "1" and list(out.glob("checkpoints/ppo/step-*")):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, only_trunk)

    sampler._Batch._step = step
    pipeline.run(recipe, out, until="ppo")


@pytest.mark.slow
def test_a_process_that_dies_in_a_rollout_ends_all_and_nothing_is_lost(tmp_path, runs, monkeypatch):
    recipe, out = runs.recipe(), runs.copy("ppo", tmp_path / "run")
    monkeypatch.setenv("KILLED_LOG", str(tmp_path / "log"))
    first, second = several.launch(2, _dies_while_sampling, recipe, out)
    assert killed.wait(second) == -signal.SIGKILL
    started = time.monotonic()
    assert killed.wait(first) == 1 and time.monotonic() - started < 60
    assert "another process of this run ended" in (tmp_path / "log.0").read_text()
    several.finish(2, killed.go, recipe, out, "ppo", log=tmp_path / "again")
    whole = runs.copy("ppo", tmp_path / "whole")
    several.finish(2, killed.go, recipe, whole, "ppo", log=tmp_path / "other")
    assert killed.bits(out)["weights"] == killed.bits(whole)["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, runs, before, after):
    """In the middle of a rollout of PPO."""
    recipe, out = runs.recipe(), runs.copy("ppo", tmp_path / "run")
    children = several.launch(before, killed.die_after_save, recipe, out, "ppo", 6)
    codes = [killed.wait(child) for child in children]
    assert codes[0] == -signal.SIGKILL
    several.finish(after, killed.go, recipe, out, "ppo", log=tmp_path / "log")
    several.assert_near(runs.after("ppo"), out)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_in_all(tmp_path, command):
    log, saved = tmp_path / "log", tmp_path / "out" / "checkpoints" / "sft"
    children = several.command(2, command, log)
    until(lambda: (saved / "step-00000002").is_dir())
    os.kill(children[1], signal.SIGTERM)
    assert [killed.wait(child) for child in children] == [143, 143]
    one_reports(log, 2, "Interrupted; run the same command to continue.")


@pytest.mark.slow
def test_the_time_budget_ends_all(tmp_path, command):
    """Clocks differ between processes, so they agree after each step that time is up."""
    log = tmp_path / "log"
    children = several.command(2, [*command, "--set", "checkpoint.max_minutes=0.01"], log)
    assert [killed.wait(child) for child in children] == [0, 0]
    one_reports(log, 2, "Time budget reached; run the same command to continue.")
