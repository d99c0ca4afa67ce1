# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline at reduced size: from demonstrations to cards, twice, interrupted, gated."""

import json
import os
import runpy
from pathlib import Path

import pytest

import lora_rlhf
from lora_rlhf import pipeline, ppo_trainer, reward, tiny
from lora_rlhf.config import load_recipe
from lora_rlhf.errors import DataError, GateError, UsageError
from lora_rlhf.record import Record

REDUCED = [
    "data.demonstrations.0.n=60", "data.comparisons.0.n=40", "data.comparisons.0.completions=3",
    "data.prompts.0.n=60", "evaluate.n=24", "data.evaluate.0.n=24", "reward.gate=warn",
    "sft.args.num_train_epochs=1", "ppo.updates=3", "ppo.args.per_device_train_batch_size=4",
    "ppo.args.steps_per_generation=2", "ppo.args.max_completion_length=24",
]  # fmt: skip


def recipe(*more: str):
    return load_recipe(tiny.recipe(), [*REDUCED, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return pipeline.run(recipe(), tmp_path_factory.mktemp("run") / "a")


def bits(record: Record) -> dict[str, object]:
    """All that two equal runs must share: the record without its clock, metrics and samples."""
    data = {k: v for k, v in record.data.items() if k not in ("clock", "files")}
    lines = [{k: v for k, v in line.items() if k != "clock"} for line in record.metrics()]
    samples = (record.folder / "samples.jsonl").read_text()
    weights = {
        p.parent.name: p.read_bytes()
        for p in record.folder.glob("adapters/*/adapter_model.safetensors")
    }
    return {"record": data, "metrics": lines, "samples": samples, "weights": weights}


def test_a_run_leaves_everything_a_user_was_promised(finished: Record):
    folder = finished.folder
    assert {p.name for p in (folder / "adapters").iterdir()} == {"sft", "reward", "policy", "value"}
    for adapter in (folder / "adapters").iterdir():
        assert (adapter / "README.md").stat().st_size > 1000
        assert (adapter / "adapter_config.json").is_file()
    assert list((folder / "plots").glob("*.png"))
    assert set(finished.data["evaluation"]) == {"base", "sft", "policy"}
    for metric in ("gold_reward", "hallucination", "length", "kl"):
        assert {"value", "low", "high", "n"} <= set(finished.data["evaluation"]["policy"][metric])
    assert finished.data["stages"]["ppo"]["identities"]["kl_at_start"] == 0
    assert finished.data["stages"]["ppo"]["updates"] == len(finished.metrics("ppo")) == 3
    assert finished.data["files"]["recipe.yaml"]
    for stage in ("sft", "reward", "ppo"):  # the adapters on disk are those of the stages
        entry = finished.data["stages"][stage]
        role = "policy" if stage == "ppo" else stage
        path = f"adapters/{role}/adapter_model.safetensors"
        assert finished.data["files"][path] == entry["adapter_sha256"]


def test_the_policy_moved_away_from_sft(finished: Record):
    stages = finished.data["stages"]
    assert stages["ppo"]["adapter_sha256"] != stages["sft"]["adapter_sha256"]
    assert stages["ppo"]["identities"]["mean_abs_log_ratio_after_first_update"] > 0


def test_a_finished_run_is_not_run_again(finished: Record, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline.Backbone, "load", lambda *_: pytest.fail("the base was loaded"))
    again = pipeline.run(recipe(), finished.folder)
    assert again.data == finished.data


def test_a_run_of_another_recipe_is_refused(finished: Record):
    with pytest.raises(UsageError, match="another recipe"):
        pipeline.run(recipe("ppo.kl_coef=0.1"), finished.folder)
    assert Record.read(finished.folder).data == finished.data


def test_an_interrupted_run_ends_with_the_same_bits(
    finished: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped in the middle of PPO, then the same command again."""
    out, real = tmp_path / "b", ppo_trainer.PPOTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.update == 1:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ppo_trainer.PPOTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe(), out)
    monkeypatch.undo()
    half = Record.read(out)
    assert half.done("reward") and not half.done("ppo")
    monkeypatch.setattr(reward, "run", lambda *_: pytest.fail("a finished stage ran again"))
    record = pipeline.run(recipe(), out)
    assert bits(record) == bits(finished)


def test_another_seed_gives_other_numbers(finished: Record, tmp_path: Path):
    record = pipeline.run(recipe("seed=1"), tmp_path / "c", until="sft")
    assert (
        record.data["stages"]["sft"]["adapter_sha256"]
        != finished.data["stages"]["sft"]["adapter_sha256"]
    )


def test_ppo_is_refused_behind_a_failed_gate(finished: Record, tmp_path: Path):
    data = json.loads((finished.folder / "record.json").read_text())
    out = tmp_path / "gated"
    import shutil

    shutil.copytree(finished.folder, out)
    data["stages"] = {k: data["stages"][k] for k in ("sft", "reward")}
    data["stages"]["reward"] |= {"gate": "failed", "gate_reason": "it is a test"}
    (out / "record.json").write_text(json.dumps(data))
    with pytest.raises(GateError, match="it is a test"):
        pipeline.run(recipe("reward.gate=stop"), out)


def test_missing_data_is_found_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(DataError):
        pipeline.run(recipe("data.prompts=[{path: nowhere.jsonl}]"), tmp_path / "d")
    assert not Record.read(tmp_path / "d").data["stages"]


def test_generate_answers_as_base_sft_and_policy(finished: Record):
    rows = pipeline.generate(finished.folder, "Say hello politely.", seed=1)
    assert [row["model"] for row in rows] == ["base", "sft", "policy"]
    assert all(isinstance(row["reward"], float) for row in rows)


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    root = Path(__file__).parent.parent
    (tmp_path / "recipes").symlink_to(root / "recipes")
    monkeypatch.chdir(tmp_path)
    load = lora_rlhf.load_recipe
    monkeypatch.setattr(
        lora_rlhf, "load_recipe", lambda path, sets: load(path, [*sets, *REDUCED]), raising=False
    )
    script = root / "docs" / "quickstart.py"
    assert len(script.read_text().splitlines()) <= 15
    runpy.run_path(str(script))
    assert "policy" in capsys.readouterr().out
    assert os.path.exists("runs/quickstart/record.json")
