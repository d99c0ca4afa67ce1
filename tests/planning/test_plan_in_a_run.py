# SPDX-License-Identifier: Apache-2.0
"""What a run says of its plan: at its start, at its end, and where none can be made."""

from pathlib import Path

import pytest
from recording import RecordingProgress
from reduced_run import recipe

from lora_rlhf import pipeline, tiny
from lora_rlhf.errors import BaseModelError
from lora_rlhf.planning import gpu_fit
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.runs.record import Record


def test_a_run_tells_its_plan_at_the_start_and_its_peak_at_the_end(tmp_path: Path):
    said = RecordingProgress()
    record = pipeline.run(
        recipe("sft.args.max_steps=1"), tmp_path / "run", until="sft", progress=said
    )
    planned = Record.read(record.folder).data["plan"]
    assert said.lines[0].startswith(f"plan: {gpu_fit.size(planned['peak'])} at the peak (")
    assert "texts as long as the recipe allows" in said.lines[0], "why less will be measured"
    assert sum(line.startswith("plan: ") for line in said.lines) == 1
    assert said.lines[-1].startswith("measured: ")
    clock = record.data["clock"]
    assert clock["peak_memory_mb"] > 0 and "resident set" in clock["peak_memory_is"]


def test_a_plan_that_cannot_be_made_keeps_no_run_from_starting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_fit, "find_config", lambda *_: 1 / 0)
    planned, line = gpu_fit.before_run(load_recipe(tiny.recipe()))
    assert planned is None and line.startswith("plan: none (ZeroDivisionError")


def test_a_plan_that_cannot_be_made_is_told_once_the_base_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_fit, "find_config", lambda *_: 1 / 0)
    said = RecordingProgress()
    pipeline.run(recipe(), tmp_path / "run", until="sft", progress=said)
    assert [line for line in said.lines if line.startswith("plan: ")] == [
        "plan: none (ZeroDivisionError: division by zero)"
    ]


@pytest.mark.parametrize("there_is_none", ["./nothing", "nobody/nothing"])
def test_a_base_that_is_not_there_is_told_once(tmp_path, there_is_none):
    """By the error of loading it, which says what to do; not by the plan before that as well."""
    said = RecordingProgress()
    with pytest.raises(BaseModelError, match=r"nothing(.*\n)+.*check model.id"):
        pipeline.run(recipe(f"model.id={there_is_none}"), tmp_path / "run", progress=said)
    assert said.lines == []
