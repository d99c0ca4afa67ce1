# SPDX-License-Identifier: Apache-2.0
"""Recipes for GPUs of 8 to 24 GB: data and stages on tiny bases of the same kind, and the plans."""

import importlib.util
import json
import re
from pathlib import Path

import datasets
import gpu_bases
import pytest
from typer.testing import CliRunner

from lora_rlhf import pipeline
from lora_rlhf.cli.app import app
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.recipe.loader import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "google/gemma-3-1b-it": 999_885_952,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
}
"""Published number of parameters, tied ones once."""

PADS = {"smollm2": "<|endoftext|>", "qwen3": "<|endoftext|>", "llama": "<|finetune_right_pad_id|>",
        "gemma": "<pad>", "mistral": "<unk>"}  # fmt: skip
SMALL = [
    "data.max_tokens=256", "data.max_prompt_tokens=160", "sft.args.max_steps=2",
    "reward.args.max_steps=2", "reward.gate=warn", "ppo.updates=2", "ppo.value_warmup_updates=1",
    "ppo.args.per_device_train_batch_size=4", "ppo.args.steps_per_generation=2",
    "ppo.args.max_completion_length=8", "evaluate.n=4", "evaluate.batch_size=4",
]  # fmt: skip


def _make_plans():
    spec = importlib.util.spec_from_file_location("make_plans", ROOT / "docs" / "make_plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE_PLANS = _make_plans()
ALL = MAKE_PLANS.all_recipes()
each = pytest.mark.parametrize("one", ALL, ids=lambda one: one.folder.name)


@pytest.fixture
def on_tiny(tmp_path, monkeypatch):
    """Load a recipe on a tiny base of its kind, and the Hub's datasets as rows of ours."""
    monkeypatch.setattr(datasets, "load_dataset", gpu_bases.load_dataset)

    def load(one, *sets):
        base = gpu_bases.make(one.folder, tmp_path / "base")
        return load_recipe(one.folder, [f"model.id={base}", "data.held_out=0.4", *sets])

    return load


def test_every_size_and_base_has_its_recipe():
    assert {one.gpu for one in ALL} == {8, 12, 16, 24}
    assert {one.recipe.model.id for one in ALL} == set(PARAMETERS)
    table = (ROOT / "recipes" / "README.md").read_text()
    for one in ALL:
        page = (one.folder / "README.md").read_text()
        needed = re.search(r"needs \*\*([\d.]+) GB\*\* of (\d+) GB", page)
        assert float(needed[1]) <= one.gpu == int(needed[2])
        row = next(line for line in table.split("\n") if f"]({one.folder.name})" in line)
        assert row.endswith(f"| {needed[1]} |") and one.recipe.model.id in row
        assert f"{PARAMETERS[one.recipe.model.id]:,} parameters" in page
        assert "never run on a GPU" in page and "Minutes: not measured." in page
        written = json.loads((one.folder / "config.json").read_text())
        assert written["_name_or_path"] == one.recipe.model.id


@each
def test_the_data_of_a_recipe_are_built_for_its_tokenizer(one, on_tiny, tmp_path):
    """By the check of `run --dry-run`, without its plan."""
    recipe = on_tiny(one)
    pad = BaseModel.load(recipe.model, recipe.lora).tokenizer.pad_token
    assert pad == PADS[re.match("[a-z]+[23]?", one.folder.name)[0]]
    assert [str(error) for error in pipeline.check(recipe, tmp_path / "run")] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@each
def test_the_stages_of_a_recipe_run(one, on_tiny, tmp_path):
    record = pipeline.run(on_tiny(one, *SMALL), tmp_path / "run", until="ppo")
    stages = record.data["stages"]
    assert {"sft", "reward", "ppo"} <= stages.keys()
    assert stages["ppo"]["identities"]["kl_at_start"] == 0
    assert record.data["model"]["load_in_4bit"] == one.recipe.model.load_in_4bit


@pytest.mark.slow
@pytest.mark.timeout(600)
@each
def test_the_plan_of_a_recipe_fits_its_gpu(one):
    ended = CliRunner().invoke(app, ["plan", str(one.folder), "--gpu", f"{one.gpu}GB"])
    assert ended.exit_code == 0, ended.output
    needed = re.search(r"needs \*\*(.*?)\*\*", (one.folder / "README.md").read_text())[1]
    assert f"needs a GPU of {needed}, assuming" in ended.output, "run `make docs`"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_pages_of_plans_are_up_to_date():
    for page, text in MAKE_PLANS.render().items():
        assert page.read_text() == text, "run `make docs`"
