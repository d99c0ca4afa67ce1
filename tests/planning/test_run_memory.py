# SPDX-License-Identifier: Apache-2.0
"""Memory of a run: the plan at its start, the peak at its end, and runs without a plan."""

import ctypes
from pathlib import Path

import psutil
import pytest
import torch
from recording import RecordingProgress
from reduced_run import recipe

from lora_rlhf import pipeline, tiny
from lora_rlhf.errors import BaseModelError
from lora_rlhf.planning import run_memory
from lora_rlhf.planning.memory_budget import format_bytes
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.runs.record import Record

PLAN = run_memory.before_run


@pytest.fixture(autouse=True)
def _plans(monkeypatch: pytest.MonkeyPatch):
    """Other tests run without."""
    monkeypatch.setattr(run_memory, "before_run", PLAN)


def test_a_run_prints_its_plan_at_the_start_and_its_peak_at_the_end(tmp_path: Path, monkeypatch):
    progress, stages = RecordingProgress(), []
    monkeypatch.setattr(run_memory, "return_freed", lambda: stages.append(len(progress.lines)))
    record = pipeline.run(
        recipe("sft.args.max_steps=1"), tmp_path / "run", until="sft", progress=progress
    )
    planned = Record.read(record.folder).data["plan"]
    assert progress.lines[0].startswith(f"plan: {format_bytes(planned['peak'])} at the peak (")
    assert "with the longest texts allowed" in progress.lines[0], "why less will be measured"
    assert sum(line.startswith("plan: ") for line in progress.lines) == 1
    assert progress.lines[-1].startswith("measured: ")
    # Both lines are of one quantity: on a CPU the whole process.
    whole = progress.lines[0].split("in tensors on the CPU, ")[1].split(" with the ")[0]
    assert f", {whole} planned (highest resident set" in progress.lines[-1]
    assert len(stages) == 1, "before each stage"
    clock = record.data["clock"]
    assert clock["peak_memory_mb"] > 0 and "resident set" in clock["peak_memory_is"]


def test_freed_memory_goes_back_to_the_system():
    """glibc kept 140 MB after SFT, which the next stages' peaks counted."""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("only glibc has it")
    process = psutil.Process()
    blocks = [torch.ones(15_000) for _ in range(2_000)]  # 120 MB, each too small for a map
    kept = blocks[::50]
    del blocks
    before = process.memory_info().rss
    run_memory.return_freed()
    assert before - process.memory_info().rss > 6e7 and len(kept) == 40


def test_an_error_in_planning_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_memory.bases, "config_of", lambda *_: 1 / 0)
    planned, line = run_memory.before_run(load_recipe(tiny.recipe()))
    assert planned is None and line.startswith("plan: none (ZeroDivisionError")


def test_an_error_in_planning_is_printed_after_the_base_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(run_memory.bases, "config_of", lambda *_: 1 / 0)
    progress = RecordingProgress()
    pipeline.run(recipe("sft.args.max_steps=1"), tmp_path / "run", until="sft", progress=progress)
    assert [line for line in progress.lines if line.startswith("plan: ")] == [
        "plan: none (ZeroDivisionError: division by zero)"
    ]


@pytest.mark.parametrize("there_is_none", ["./nothing", "nobody/nothing"])
def test_a_missing_base_is_reported_once(tmp_path, there_is_none):
    """By the error of loading it, which says what to do; not by the plan as well."""
    progress = RecordingProgress()
    with pytest.raises(BaseModelError, match=r"nothing(.*\n)+.*check model.id"):
        pipeline.run(recipe(f"model.id={there_is_none}"), tmp_path / "run", progress=progress)
    assert progress.lines == []
