# SPDX-License-Identifier: Apache-2.0
"""`lora-rlhf init`: a recipe that parses, whose data are those that were shown."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lora_rlhf
from lora_rlhf import pipeline, tiny
from lora_rlhf.cli import app
from lora_rlhf.errors import DataError, UsageError
from lora_rlhf.planning import bases
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.starting import first_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
N = 60
PAIRS = [
    {"question": f"What is item {i} made of?", "chosen": f"Of wood and {i} nails.",
     "rejected": "No idea."}
    for i in range(N)
]  # fmt: skip


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def test_a_recipe_of_comparisons(tmp_path, pairs):
    lines, out = [], tmp_path / "recipe.yaml"
    made = lora_rlhf.init([pairs], out=out, model="tiny", say=lines.append)
    assert made == load_recipe(out)
    assert made.data.comparisons[0].columns == {"prompt": "question"}
    assert made.data.comparisons == made.data.demonstrations == made.data.prompts
    text = out.read_text()
    assert "path: pairs.jsonl" in text  # relative to the recipe
    assert "  # no demonstrations of their own: SFT trains on the better answers" in text
    shown = "\n".join(map(str, lines))
    assert "rejected | No idea.<eos>" in shown and "comparisons, row 3 as the model sees" in shown
    with pytest.raises(UsageError, match="exists"):
        lora_rlhf.init([pairs], out=out, model="tiny")
    assert out.read_text() == text
    # the lengths leave room for the longest, and a rollout needs no more prompts than there are
    view = lora_rlhf.show_data(made)
    assert view.runs and "0 (0.0%) over the limit" in str(view)
    args = made.ppo.args
    train = view.sets[2].report["train"]
    assert args["per_device_train_batch_size"] * args["steps_per_generation"] <= train
    assert pipeline.check(made, tmp_path / "run", progress=Progress(quiet=True)) == []


def test_demonstrations_only_end_with_sft(tmp_path):
    path = tmp_path / "faq.csv"
    path.write_text(
        "Frage;Antwort\n" + "".join(f"Was kostet {i}?;Es kostet {i}.\n" for i in range(N))
    )
    lines = []
    made = lora_rlhf.init([path], out=tmp_path, model="tiny", say=lines.append)
    assert (made.data.comparisons, made.name) == ([], "faq")
    assert any("no comparisons, so no reward model" in str(line) for line in lines)
    assert any(str(line).endswith(f"lora-rlhf sft {tmp_path}/recipe.yaml") for line in lines)


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    def load(name, config, split, revision, data_dir):
        assert (name, split) == ("org/pairs", "train")
        return PAIRS

    monkeypatch.setattr(datasets, "load_dataset", load)
    made = lora_rlhf.init(hub="org/pairs", out=tmp_path / "r.yaml", model="tiny")
    assert (made.name, made.data.comparisons[0].hub) == ("pairs", "org/pairs")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a b?", "completion": "c"}], "1 demonstration and 1 prompt"),
        ([{"prompt": f"a {i}?"} for i in range(9)], "there are prompts only"),
    ],
)
def test_too_little_data(tmp_path, rows, message):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        lora_rlhf.init([path], out=tmp_path / "r.yaml", model="tiny")
    assert not (tmp_path / "r.yaml").exists()


def test_paths_are_those_of_the_recipe(tmp_path, pairs, monkeypatch):
    (tmp_path / "base").symlink_to(tiny.path())
    made = lora_rlhf.init([pairs], out=tmp_path / "r.yaml", model=str(tmp_path / "base"))
    assert "  id: ./base\n" in (tmp_path / "r.yaml").read_text()
    assert made.model.id == str(tmp_path / "base")
    monkeypatch.setenv("LORA_RLHF_DATA", str(tmp_path))
    (tmp_path / "x").mkdir()
    made = lora_rlhf.init([pairs], out=tmp_path / "x", model="tiny")
    assert made.data.prompts[0].path == "data://pairs.jsonl"


def test_the_tiny_model_has_the_learning_rates_of_its_recipe(tmp_path, pairs):
    """With the defaults it hardly learns: SFT's held-out loss stayed near that of guessing."""
    demo = load_recipe(tiny.recipe())
    made = lora_rlhf.init([pairs], out=tmp_path / "r.yaml", model="tiny")
    for section in ("sft", "reward", "ppo"):
        rates = [getattr(one, section).args["learning_rate"] for one in (made, demo)]
        assert rates == [1e-3, 1e-3], section
    assert made.ppo.value_learning_rate == demo.ppo.value_learning_rate
    assert "for a larger one, leave it out" in (tmp_path / "r.yaml").read_text()
    made = lora_rlhf.init([pairs], out=tmp_path / "other.yaml", model=str(tiny.path()))
    assert "learning_rate" not in made.sft.args


def test_the_base_follows_gpu_and_language(tmp_path, pairs, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [b.id for b in bases.for_gpu(16 * 10**9, True)][0].endswith("SmolLM2-1.7B-Instruct")
    assert bases.for_gpu(16 * 10**9, False)[0].id == "Qwen/Qwen2.5-1.5B-Instruct"
    assert bases.for_gpu(None, True)[0].id.endswith("SmolLM2-135M-Instruct")
    assert bases.for_gpu(80 * 10**9, True)[0].id == "Qwen/Qwen2.5-7B-Instruct"
    lines, plan = [], SimpleNamespace(needed=7 * 10**9)
    fitted = SimpleNamespace(changes={"lora.r": 8, "lora.alpha": 16}, plan=plan)
    monkeypatch.setattr(first_recipe.gpu_fit, "fit", lambda *_: fitted)
    made = lora_rlhf.init([pairs], out=tmp_path / "r.yaml", gpu="8GB", say=lines.append)
    assert (made.model.id, made.lora.r) == ("Qwen/Qwen2.5-0.5B-Instruct", 8)
    assert "  # to fit 8 GB\n  r: 8" in (tmp_path / "r.yaml").read_text()
    shown = "\n".join(map(str, lines))
    assert "no tokenizer of it is here, so lengths are estimated" in shown
    assert "`hf download Qwen/Qwen2.5-0.5B-Instruct`" in shown
    assert "of 8 GB" in shown and "  prompt   | user: What is item 0 made of?" in shown


def test_shapes_of_bases_have_the_parameters_of_their_pages():
    import torch

    for base in bases.BASES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(base.config())
        assert sum(p.numel() for p in model.parameters()) == base.parameters, base.id
    theirs = json.loads((RECIPES / "smollm2-135m-hh" / "config.json").read_text())
    ours = bases.BASES[0].config()
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
    assert all(theirs[key] == getattr(ours, key) for key in keys)


def invoke(*args, **options):
    return CliRunner().invoke(app.app, [str(a) for a in args], prog_name="lora-rlhf", **options)


def test_command_line(tmp_path, pairs):
    out = tmp_path / "r.yaml"
    done = invoke("init", pairs, "--out", out, "--model", "tiny", "--yes")
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.stdout and "question  prompt" in done.stdout
    assert invoke("init", pairs, "--out", out, "--yes").exit_code == 2
    for verb in (["data"], ["data", "show"]):
        shown = invoke(*verb, out, "--rows", 0)
        assert shown.exit_code == 0, shown.output
        assert "the longer answer is chosen: 1.000 [0.940, 1.000], n=60" in shown.stdout
    sets = json.loads(invoke("data", out, "--json").stdout)
    assert [one["set"] for one in sets] == ["demonstrations", "comparisons", "prompts"]
    longest = sum(quantiles["1"] for quantiles in sets[0]["lengths"].values())
    stopped = invoke("data", out, "--set", f"data.max_tokens={longest - 1}")
    assert stopped.exit_code == 3
    assert "a run would stop: 30% of the demonstrations are dropped" in stopped.stdout


def test_a_question_without_a_terminal_needs_yes(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": f"a {i}?", "completion": f"b {i}", "stars": i % 5} for i in range(N)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = invoke("init", path, "--out", tmp_path / "r.yaml", "--model", "tiny")
    assert done.exit_code == 2 and "--ignore COLUMN" in done.stderr
