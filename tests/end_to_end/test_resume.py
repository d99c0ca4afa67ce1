# SPDX-License-Identifier: Apache-2.0
"""Killed for real at random moments, a run ends with the bits of one that was left alone."""

import os
import random
import shutil
import signal
from pathlib import Path

import killed
import pytest
from killed import STAGES, Runs

from lora_rlhf import pipeline
from lora_rlhf.evaluation.answers import AnswerCache
from lora_rlhf.runs.record import Record

QUICK = ("sft",)
"""Stages that are killed at random by default; the others share its code and are slow."""


@pytest.mark.parametrize(
    "stage", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in STAGES]
)
def test_killed_at_random_moments(runs: Runs, stage: str, tmp_path: Path):
    """One run, killed again and again wherever it has got to: each update is logged once."""
    wanted, recipe = killed.bits(runs.after(stage)), runs.recipe(stage)
    rng, hit = random.Random(os.environ.get("KILL_SEED")), []
    for attempt in range(8):  # a machine that is faster than when it was timed is over too soon
        out = runs.copy(stage, tmp_path / str(attempt))
        moments = [rng.uniform(0.1, 0.6) * 0.7**attempt * runs.seconds(stage) for _ in range(2)]
        hit = [killed.kill(recipe, out, stage, after) for after in moments]
        killed.finish(recipe, out, stage)
        assert killed.bits(out) == wanted, f"killed after {moments} s"
        assert not list((out / "checkpoints").glob("*/step-*")), "a finished stage needs none"
        if any(hit):
            return
    pytest.fail("every run was over before it was killed")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_twenty_moments(runs: Runs, stage: str, tmp_path: Path):
    """Every one of them a run of its own, so that none hides behind another."""
    wanted, recipe = killed.bits(runs.after(stage)), runs.recipe(stage)
    # Timed again: files are warm now, and moments after the end would hit nothing.
    seconds = killed.finish(recipe, runs.copy(stage, tmp_path / "timed"), stage)
    assert killed.bits(tmp_path / "timed") == wanted
    rng, hits, gone_on, tries = random.Random(os.environ.get("KILL_SEED")), 0, 0, 0
    while hits < 22:
        tries += 1
        out = runs.copy(stage, tmp_path / str(tries))
        after = rng.uniform(0.2, 0.95) * seconds
        killed_it = killed.kill(recipe, out, stage, after)
        killed.finish(recipe, out, stage)
        assert killed.bits(out) == wanted, f"killed after {after} s"
        hits += killed_it
        gone_on += killed_it and "resumed" in Record.read(out).data["clock"]
        shutil.rmtree(out)
    print(f"\n{stage}: {hits} of {tries} killed, {gone_on} went on from a checkpoint")
    assert gone_on or stage == "evaluate"


def test_killed_between_a_stage_and_its_record(runs: Runs, tmp_path: Path, monkeypatch):
    """The record's `lora` counts the value, which nothing loads again once PPO is done."""
    out, real = runs.copy("ppo", tmp_path / "run"), Record._drop_checkpoints

    def die(self, stage):
        real(self, stage)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Record, "_drop_checkpoints", die)
    recipe = runs.recipe("ppo")
    assert killed.wait(killed.start(killed.go, recipe, out, "ppo")) == -signal.SIGKILL
    monkeypatch.undo()
    killed.finish(recipe, out, "ppo")
    assert killed.bits(out) == killed.bits(runs.after("ppo"))
    assert "value" in Record.read(out).data["lora"]["parameters_per_role"]


@pytest.mark.parametrize("model", [pytest.param("base", marks=pytest.mark.slow), "sft"])
def test_killed_between_two_models_of_the_evaluation(runs: Runs, tmp_path: Path, model: str):
    """What is done is not done again, whether or not the value is still in memory."""
    whole = runs.after("evaluate")
    out, recipe = runs.copy("evaluate", tmp_path / "run"), runs.recipe("evaluate")

    def die(recipe, out: Path) -> None:
        real = AnswerCache.put

        def put(self, name, answers):
            real(self, name, answers)
            if name == model:
                os.kill(os.getpid(), signal.SIGKILL)

        AnswerCache.put = put
        pipeline.run(recipe, out, until="evaluate")

    assert killed.wait(killed.start(die, recipe, out)) == -signal.SIGKILL
    done = ["base.json", "sft.json"][: 1 + (model == "sft")]
    assert sorted(p.name for p in (out / "checkpoints" / "evaluate").iterdir()) == done
    killed.finish(recipe, out, "evaluate")
    assert killed.bits(out) == killed.bits(whole)
    resumed = Record.read(out).data["clock"]["resumed"]
    assert [line["from"] for line in resumed if line["training"] == "evaluate"] == done
    assert not list((out / "checkpoints").glob("*/*"))
