# SPDX-License-Identifier: Apache-2.0
"""`sft.from` and `reward.from`: adapters of one's own in place of the trainings."""

import shutil
from pathlib import Path

import killed
import pytest
from hub_server import HubServer, turn_to

from lora_rlhf import pipeline
from lora_rlhf.errors import AdapterError, RecipeError
from lora_rlhf.recipe.loader import dump_recipe, load_recipe, parse_recipe
from lora_rlhf.runs.disk import sha256
from lora_rlhf.training import checkpoint_callback


@pytest.fixture
def own(runs: killed.Runs, tmp_path: Path) -> Path:
    """Plain PEFT folders: what this package adds to them is missing."""
    for role in ("sft", "reward"):
        folder = tmp_path / "own" / role
        shutil.copytree(runs.before("ppo") / "adapters" / role, folder)
        for extra in ("check.json", "reward.json", "README.md"):
            (folder / extra).unlink(missing_ok=True)
    return tmp_path / "own"


def weights(folder: Path) -> str:
    return sha256(folder / "adapter_model.safetensors")


def sets(own: Path, *more: str) -> list[str]:
    return [f"sft.from={own / 'sft'}", "sft.args={}", f"reward.from={own / 'reward'}",
            "reward.args={}", "reward.held_out_model=false", *more]  # fmt: skip


def test_both_are_used_as_they_are(runs: killed.Runs, own: Path, tmp_path: Path):
    out = tmp_path / "run"
    made = runs.recipe("ppo", *sets(own, "data.comparisons=[]", "data.demonstrations=[]"))
    assert pipeline.check(made, out) == []
    record = pipeline.run(made, out, until="ppo")
    for stage in ("sft", "reward"):
        entry = record.data["stages"][stage]
        assert entry["from"] == {"adapter": stage, "sha256": weights(own / stage)}
        assert entry["adapter_sha256"] == weights(out / "adapters" / stage)
        assert weights(own / stage) == weights(out / "adapters" / stage)
    assert (entry["gate"], entry["offset"], entry["offset_from"]) == ("not judged", 0.0, 0)
    assert not record.metrics("sft") and record.metrics("ppo")


def test_adapters_and_a_function_that_were_moved_with_the_run_are_found(
    runs: killed.Runs, own: Path, tmp_path: Path
):
    """As in a round of feedback, whose recipe names the run before by its absolute path."""
    project, later = tmp_path / "project", tmp_path / "later"
    shutil.copytree(own, project / "own")
    (project / "mine.py").write_text("def score(completions):\n    return [0.0] * len(completions)")
    made = runs.recipe("ppo", *sets(project / "own"), f"ppo.reward={project}/mine.py:score")
    pipeline.run(made, project / "run", until="sft")
    project.rename(later)
    found = pipeline.Record.read(later / "run").recipe()
    assert (found.sft.start, found.reward.start) == tuple(
        str(later / "own" / name) for name in ("sft", "reward")
    )
    assert found.ppo.reward == f"{later}/mine.py:score"
    record = pipeline.run(found, later / "run", until="reward")
    assert record.done("reward")
    flat = checkpoint_callback._differences({"sft.from": str(project)}, {"sft.from": str(later)})
    assert flat == [], "their sha256 stands for them in a checkpoint"


def test_a_reward_model_is_judged_where_there_is_data(runs: killed.Runs, own: Path, tmp_path: Path):
    shutil.copytree(runs.before("reward"), tmp_path / "run")
    options = sets(own)[2:]
    record = pipeline.run(runs.recipe("ppo", *options), tmp_path / "run", until="reward")
    entry = record.data["stages"]["reward"]
    assert entry["gate"] in ("passed", "failed") and entry["accuracy"]["n"] > 0
    assert entry["offset_from"] > 0 and "args" not in entry
    trained = runs.recipe("ppo")
    before = pipeline.Record.read(runs.before("ppo")).data["stages"]["reward"]
    assert trained.reward.start is None
    assert entry["accuracy"] == before["accuracy"] and entry["offset"] == before["offset"]


def test_a_wrong_adapter_is_refused_before_anything(runs: killed.Runs, own: Path, tmp_path: Path):
    options = sets(own, "lora.alpha=3")
    errors = pipeline.check(runs.recipe("ppo", *options), tmp_path / "run")
    assert [type(error) for error in errors] == [AdapterError, AdapterError]
    with pytest.raises(AdapterError, match="lora_alpha"):
        pipeline.run(runs.recipe("ppo", *options), tmp_path / "run")
    gone = runs.recipe("ppo", f"sft.from={own / 'gone'}", "sft.args={}")
    with pytest.raises(AdapterError, match="holds no adapter"):
        pipeline.run(gone, tmp_path / "other")


@pytest.mark.hub
def test_an_adapter_on_the_hub_is_used(
    runs: killed.Runs, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = {path.name: path.read_bytes() for path in (own / "sft").iterdir()}
    with HubServer() as server:
        server.add_repo("acme/sft", files)
        turn_to(server, monkeypatch, tmp_path)
        made = runs.recipe("sft", "sft.from=acme/sft", "sft.args={}")
        assert pipeline.check(made, tmp_path / "run", until="sft") == []
        record = pipeline.run(made, tmp_path / "run", until="sft")
        entry = record.data["stages"]["sft"]
        assert entry["from"] == {"adapter": "acme/sft", "sha256": weights(own / "sft")}
        assert record.recipe().sft.start == "acme/sft"
        gone = runs.recipe("sft", "sft.from=acme/gone", "sft.args={}")
        errors = pipeline.check(gone, tmp_path / "other", until="sft")
    assert any("acme/gone" in str(error) for error in errors)


def test_the_folder_is_relative_to_the_recipe(tmp_path: Path):
    text = "name: x\nmodel: {id: tiny}\nsft: {from: mine}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    made = load_recipe(tmp_path)
    assert made.sft.start == str(tmp_path / "mine")
    assert parse_recipe(dump_recipe(made), "again") == made
    assert load_recipe(tmp_path, ["sft.from=acme/mine"]).sft.start == "acme/mine"
    (tmp_path / "acme" / "mine").mkdir(parents=True)
    made = load_recipe(tmp_path, ["sft.from=acme/mine"])
    assert made.sft.start == str(tmp_path / "acme" / "mine")
    for more in ("reward: {from: a, ensemble: 2}", "reward: {from: a, args: {seed: 1}}"):
        with pytest.raises(RecipeError, match=r"reward\.from"):
            parse_recipe(f"name: x\nmodel: {{id: tiny}}\n{more}\n", "x")
