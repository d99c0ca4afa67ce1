# SPDX-License-Identifier: Apache-2.0
"""Variables that would change a run's results are refused by name, or ignored and recorded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_rlhf.errors import SetupError
from lora_rlhf.evaluation.evaluate_targets import check_judge
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.runtime import environment


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "4"), ("PMI_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1"),
     ("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_USE_FSDP", "1"),
     ("ACCELERATE_USE_MEGATRON_LM", "yes")],
)  # fmt: skip
def test_another_engine_is_refused_by_the_name_of_its_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=f"{name}={value} is set"):
        environment.settle()
    for harmless in ("", "0", "false") if name != "WORLD_SIZE" else ("", "0", "1"):
        monkeypatch.setenv(name, harmless)
        environment.settle()


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_TORCH_DEVICE", "meta"),
     ("ACCELERATE_DYNAMO_BACKEND", "inductor"), ("LOCAL_RANK", "0"),
     ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7"), ("NVIDIA_TF32_OVERRIDE", "1")],
)  # fmt: skip
def test_what_the_recipe_decides_is_ignored_and_recorded(monkeypatch, name, value):
    monkeypatch.setattr(environment, "ignored", {})
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment.settle()
    assert name not in os.environ and environment.ignored == {name: value}
    recorded = environment.result_variables()
    assert recorded[name] == value and recorded["OMP_NUM_THREADS"] == "3"


def test_every_base_is_loaded_without_them(monkeypatch):
    """So are the models of `generate`, `evaluate` and `judge`."""
    monkeypatch.setattr(environment, "ignored", {})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    BaseModel.load(ModelSection(id="tiny"), LoraSection())
    assert "ACCELERATE_MIXED_PRECISION=bf16" in environment.note()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SetupError, match="LOCAL_RANK=1"):
        check_judge("x", Path("labels"), Path("judge.json"), n=None, seed=0, base=None)


def test_an_interpreter_without_docstrings_is_refused():
    command = [sys.executable, "-OO", "-c", "import lora_rlhf.runtime.optional_packages"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "SetupError: PYTHONOPTIMIZE=2" in result.stderr
