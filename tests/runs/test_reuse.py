# SPDX-License-Identifier: Apache-2.0
"""Finished stages are reused only with the data that they read."""

import shutil
from pathlib import Path

import killed
import pytest

from lora_rlhf import pipeline
from lora_rlhf.errors import DataError
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.runs import reuse
from lora_rlhf.runs.record import Record
from lora_rlhf.training.reward import reward_stage

TEXT = "name: x\nmodel: {id: tiny}\ndata: {prompts: [{task: closed-world}]}\n"


def test_data_may_not_change_between_stages_that_read_them(tmp_path: Path):
    def report(sha, evaluate="e"):
        return {"sources": [{"sha256": sha}], "evaluate": {"sources": [{"sha256": evaluate}]}}

    record = Record.open(tmp_path / "run", parse_recipe(TEXT, "r.yaml"))
    record.data["data"] = {"demonstrations": report("a"), "prompts": report("a")}
    reuse.check_data(record, "demonstrations", report("b"))  # no stage has read them
    with record.stage("sft"):
        pass
    reuse.check_data(record, "demonstrations", report("a"))
    reuse.check_data(record, "prompts", report("b"))
    with pytest.raises(DataError, match="data.demonstrations has changed since sft"):
        reuse.check_data(record, "demonstrations", report("b"))
    with pytest.raises(DataError, match="data.evaluate has changed since sft"):
        reuse.check_data(record, "prompts", report("a", "f"))
    with record.stage("ppo"):
        pass
    with pytest.raises(DataError, match="data.prompts has changed since ppo"):
        reuse.check_data(record, "prompts", report("b"))


def test_a_copy_that_was_killed_is_made_again(
    runs: killed.Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, out, source = runs.recipe("ppo"), tmp_path / "run", runs.before("ppo")
    record, other = Record.open(out, recipe), reuse.check(source, recipe, out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(record, "save", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        reuse.copy_stages(other, record)
    record, other = Record.open(out, recipe), reuse.check(source, recipe, out)
    assert not record.done("sft") and record.metrics("sft")
    assert reuse.copy_stages(other, record) == ["sft", "reward"]
    assert Record.read(out).metrics() == other.metrics()


def test_shared_stages_end_with_the_same_bits(runs: killed.Runs, tmp_path: Path, monkeypatch):
    """A run that took SFT and reward model over from another is the run it would have been."""
    source = Path(shutil.copytree(runs.after("evaluate"), tmp_path / "a"))
    (source / "adapters" / "sft" / "README.md").write_text("the card of the other run")
    monkeypatch.setattr(reward_stage, "run", lambda *_: pytest.fail("a shared stage ran again"))
    record = pipeline.run(runs.recipe("ppo", "name=other"), tmp_path / "b", start_from=source)
    assert "the card of the other run" not in (record.adapter("sft") / "README.md").read_text()
    now, wanted = killed.bits(record.folder), killed.bits(source)
    origins = [now["record"]["stages"][stage].pop("from_run") for stage in ("sft", "reward")]
    assert origins[0] == origins[1] and origins[0]["name"] == "little"
    assert len(origins[0]["record_sha256"]) == 64 and set(origins[0]) == {"name", "record_sha256"}
    for key in ("name", "recipe_sha256"):
        assert now["record"].pop(key) != wanted["record"].pop(key)
    assert now["record"]["stages"].pop("card")
    for bits in (now, wanted):  # it has the recipe's name
        assert bits["record"]["stages"]["evaluate"]["files"].pop("report.json")
    assert now == wanted
