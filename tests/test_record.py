# SPDX-License-Identifier: Apache-2.0
"""The run directory: continued only where finished stages would have been the same."""

import json
from pathlib import Path

import pytest

from lora_rlhf.config import parse_recipe
from lora_rlhf.errors import UsageError
from lora_rlhf.record import Record, finite

TEXT = "name: x\nmodel: {id: tiny}\ndata: {prompts: [{task: closed-world}]}\n"


def recipe(*sets: str):
    return parse_recipe(TEXT, "r.yaml", list(sets))


def with_done(folder: Path, *stages: str) -> Record:
    record = Record.open(folder, recipe())
    for stage in stages:
        with record.stage(stage):
            pass
    return record


@pytest.mark.parametrize("change", ["hub.policy=a/b", "threads=2", "reward.gate=warn"])
def test_keys_that_change_no_result_may_change(tmp_path, change):
    with_done(tmp_path / "run", "sft", "reward", "ppo", "evaluate")
    Record.open(tmp_path / "run", recipe(change))


@pytest.mark.parametrize(
    ("done", "change", "refused"),
    [
        (("sft",), "ppo.kl_coef=0.1", False),
        (("sft", "reward"), "ppo.updates=7", False),
        (("sft", "reward", "ppo"), "ppo.updates=7", True),
        (("sft",), "sft.args.learning_rate=1e-3", True),
        (("sft",), "seed=1", True),
        (("sft",), "data.prompts.0.n=9", True),
        (("sft",), "reward.args.learning_rate=1e-3", False),
        (("sft", "reward"), "ppo.args.max_completion_length=9", True),
        (("sft", "reward", "ppo"), "evaluate.n=9", False),
    ],
)
def test_a_change_is_refused_once_a_stage_that_read_it_is_done(tmp_path, done, change, refused):
    with_done(tmp_path / "run", *done)
    if not refused:
        Record.open(tmp_path / "run", recipe(change))
        return
    with pytest.raises(UsageError) as caught:
        Record.open(tmp_path / "run", recipe(change))
    key, value = change.split("=")
    assert key in str(caught.value) and caught.value.exit_code == 2
    assert json.loads((tmp_path / "run" / "record.json").read_text())["name"] == "x"
    Record.open(tmp_path / "run", recipe())  # the old recipe still goes on


def test_an_interrupted_stage_keeps_no_result(tmp_path):
    record = Record.open(tmp_path / "run", recipe())
    with pytest.raises(KeyboardInterrupt), record.stage("sft") as entry:
        entry["loss"] = 1.0
        raise KeyboardInterrupt
    again = Record.read(tmp_path / "run")
    assert again.data["stages"]["sft"] == {"status": "interrupted"} and not again.done("sft")


def test_metrics_of_an_interrupted_try_are_forgotten(tmp_path):
    record = Record.open(tmp_path / "run", recipe())
    record.log("sft", 1, {"loss": 1.0})
    record.log("ppo", 1, {"loss": 2.0})
    record.restart_metrics("ppo")
    assert [line["stage"] for line in record.metrics()] == ["sft"]


def test_a_number_that_is_not_finite_stays_visible(tmp_path):
    record = Record.open(tmp_path / "run", recipe())
    record.log("ppo", 1, {"loss": float("nan"), "x": float("inf")})
    assert record.metrics()[0]["loss"] == "nan" and record.metrics()[0]["x"] == "inf"
    assert finite({"a": [float("-inf")]}) == {"a": ["-inf"]}


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a run"):
        Record.open(tmp_path, recipe())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="not a run directory"):
        Record.read(tmp_path)
