# SPDX-License-Identifier: Apache-2.0
"""The run directory: continued only where finished stages would have been the same."""

import errno
import json
from pathlib import Path

import pytest

from lora_rlhf.errors import DamageError, GateError, SetupError, UsageError
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.runs import record as module
from lora_rlhf.runs.record import Record, finite

TEXT = "name: x\nmodel: {id: tiny}\ndata: {prompts: [{task: closed-world}]}\n"


def recipe(*sets: str):
    return parse_recipe(TEXT, "r.yaml", list(sets))


def with_done(folder: Path, *stages: str) -> Record:
    record = Record.open(folder, recipe())
    for stage in stages:
        with record.stage(stage):
            pass
    return record


@pytest.mark.parametrize("change", ["hub.policy=a/b", "reward.gate=warn"])
def test_keys_that_change_no_result_may_change(tmp_path, change):
    with_done(tmp_path / "run", "sft", "reward", "ppo", "evaluate")
    Record.open(tmp_path / "run", recipe(change))


@pytest.mark.parametrize(
    ("done", "change", "refused"),
    [
        (("sft",), "ppo.kl_coef=0.1", False),
        (("sft", "reward"), "ppo.updates=7", False),
        (("sft", "reward", "ppo"), "ppo.updates=7", True),
        (("sft",), "sft.args.learning_rate=1e-3", True),
        (("sft",), "seed=1", True),
        (("sft",), "threads=2", True),  # sums round differently
        (("sft",), "data.prompts.0.n=9", True),
        (("sft",), "reward.args.learning_rate=1e-3", False),
        (("sft", "reward"), "ppo.args.max_completion_length=9", True),
        (("sft", "reward", "ppo"), "evaluate.n=9", False),
    ],
)
def test_a_change_is_refused_once_a_stage_that_read_it_is_done(tmp_path, done, change, refused):
    with_done(tmp_path / "run", *done)
    if not refused:
        Record.open(tmp_path / "run", recipe(change))
        return
    with pytest.raises(UsageError) as caught:
        Record.open(tmp_path / "run", recipe(change))
    key, value = change.split("=")
    assert key in str(caught.value) and caught.value.exit_code == 2
    assert json.loads((tmp_path / "run" / "record.json").read_text())["name"] == "x"
    Record.open(tmp_path / "run", recipe())  # the old recipe still goes on


def test_an_interrupted_stage_keeps_no_result(tmp_path):
    record = Record.open(tmp_path / "run", recipe())
    with pytest.raises(KeyboardInterrupt), record.stage("sft") as entry:
        entry["loss"] = 1.0
        raise KeyboardInterrupt
    again = Record.read(tmp_path / "run")
    assert again.data["stages"]["sft"] == {"status": "interrupted"} and not again.done("sft")


def test_metrics_of_an_interrupted_stage_are_dropped(tmp_path):
    record = Record.open(tmp_path / "run", recipe())
    record.log("sft", 1, {"loss": 1.0})
    record.log("ppo", 1, {"loss": 2.0})
    record.truncate_log("ppo")
    assert [line["stage"] for line in record.metrics()] == ["sft"]


def test_a_number_that_is_not_finite_stays_visible(tmp_path):
    record = Record.open(tmp_path / "run", recipe())
    record.log("ppo", 1, {"loss": float("nan"), "x": float("inf")})
    assert record.metrics()[0]["loss"] == "nan" and record.metrics()[0]["x"] == "inf"
    assert finite({"a": [float("-inf")]}) == {"a": ["-inf"]}


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a run"):
        Record.open(tmp_path, recipe())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="not a run directory"):
        Record.read(tmp_path)


# --- reading a record ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "holds a list"), ("{}", "schema None"), ('{"schema": 2}', "schema 2"),
     ('{"schema": 1}', "model is missing"), ("{", "cannot be read"), ("", "cannot be read")],
)  # fmt: skip
def test_a_record_of_another_shape_is_one_clear_error(tmp_path, text, message):
    with_done(tmp_path / "run")
    for name in ("record.json", "record.json.bak"):
        (tmp_path / "run" / name).write_text(text)
    for call in (Record.read, lambda folder: Record.open(folder, recipe())):
        with pytest.raises(UsageError, match=message):
            call(tmp_path / "run")


def test_stages_that_are_no_mappings_are_refused(tmp_path):
    record = with_done(tmp_path / "run")
    record.data["stages"]["sft"] = "done"
    record.save()
    with pytest.raises(UsageError, match="no mapping"):
        Record.read(tmp_path / "run")


def test_a_run_without_its_recipe_is_one_clear_error(tmp_path):
    with_done(tmp_path / "run", "sft")
    for name in ("recipe.yaml", "recipe.yaml.bak"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(DamageError, match=r"recipe.yaml: it is missing"):
        Record.open(tmp_path / "run", recipe())


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    record = with_done(tmp_path / "run")
    record.log("sft", 1, {"loss": 1.0})
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"stage": "ppo", "st')
    assert [line["stage"] for line in record.metrics()] == ["sft"]
    record.truncate_log("ppo")
    record.log("ppo", 1, {"loss": 2.0})
    assert [line["stage"] for line in record.metrics()] == ["sft", "ppo"]


@pytest.mark.parametrize("bad", ["{", "[]", '{"step": 1}', '{"stage": 1, "step": 1}', ""])
def test_bad_line_of_the_log_is_reported_with_its_number(tmp_path, bad):
    record = with_done(tmp_path / "run")
    record.log("sft", 1, {})
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text() + bad + "\n" + log.read_text())
    with pytest.raises(UsageError, match=r"metrics\.jsonl:2: not a line of the log"):
        record.metrics()


# --- stages --------------------------------------------------------------------------------------


def test_interrupted_stage_keeps_the_message_of_our_errors(tmp_path):
    record = Record.open(tmp_path / "run", recipe())
    with pytest.raises(GateError), record.stage("ppo"):
        raise GateError("no", remedy="mend it")
    kept = Record.read(tmp_path / "run").data["stages"]["ppo"]
    message = {"type": "GateError", "message": "no\n  to do: mend it"}
    assert kept == {"status": "interrupted", "error": message}
    with pytest.raises(ValueError), record.stage("ppo"):
        raise ValueError("odd")
    assert Record.read(tmp_path / "run").data["stages"]["ppo"] == {"status": "interrupted"}


def test_stage_records_changed_versions(tmp_path, monkeypatch):
    record = with_done(tmp_path / "run", "sft")
    monkeypatch.setattr(module, "versions", lambda: {**record.data["versions"], "trl": "9.9"})
    with record.stage("reward"):
        pass
    assert "versions" not in record.data["stages"]["sft"]
    assert record.data["stages"]["reward"]["versions"] == {"trl": "9.9"}


def sealed(folder: Path) -> Record:
    record = with_done(folder, "sft", "reward", "ppo", "evaluate")
    record.adapter("policy").mkdir(parents=True)
    for name in ("README.md", "adapter_model.safetensors"):
        (record.adapter("policy") / name).write_text("first")
    record.log("ppo", 1, {"loss": 1.0})
    with record.stage("card"):
        record.seal()
    return record


def test_a_run_is_finished_once_it_is_sealed(tmp_path):
    record = sealed(tmp_path / "run")
    assert record.done("card")
    record.data["files"] = {}
    assert not record.done("card") and record.done("ppo")


def test_rewriting_a_card_does_not_reseal_changed_weights(tmp_path):
    record = sealed(tmp_path / "run")
    before, log = dict(record.data["files"]), dict(record.data["clock"]["log"])
    assert log["ppo"]["lines"] == 1
    for name in ("README.md", "adapter_model.safetensors"):
        (record.adapter("policy") / name).write_text("second")
    record.log("ppo", 2, {"loss": 2.0})
    record.seal()
    changed = {name for name, digest in record.data["files"].items() if before[name] != digest}
    assert changed == {"adapters/policy/README.md"}
    assert record.data["clock"]["log"] == log
    with record.stage("ppo"):  # what a stage writes anew is sealed anew
        pass
    record.seal()
    assert (
        record.data["files"]["adapters/policy/adapter_model.safetensors"]
        != before["adapters/policy/adapter_model.safetensors"]
    )
    assert record.data["clock"]["log"]["ppo"]["lines"] == 2


def test_changed_free_key_requires_new_cards(tmp_path):
    record = sealed(tmp_path / "run")
    record.data["model"] = {"id": "tiny", "hub_id": "a/old", "hub_revision": "c0ffee"}
    record.save()
    assert Record.open(tmp_path / "run", recipe()).done("card")
    again = Record.open(tmp_path / "run", recipe("card.title=New", "model.hub_id=a/new"))
    assert not again.done("card") and again.done("evaluate")
    assert again.data["model"] == {"id": "tiny", "hub_id": "a/new"}
    assert again.recipe().card.title == "New"
    assert not Record.read(tmp_path / "run").done("card")


def test_run_killed_before_its_record_starts_again(tmp_path):
    for name in ("recipe.yaml.tmp", "recipe.yaml", "record.json.tmp"):
        (tmp_path / name).write_text("half")
        assert Record.open(tmp_path, recipe()).data["stages"] == {}
        for record in ("record.json", "record.json.bak"):
            (tmp_path / record).unlink()
    (tmp_path / "other").touch()
    with pytest.raises(UsageError, match="is not a run"):
        Record.open(tmp_path, recipe())


def test_a_folder_that_cannot_be_written_is_no_full_disk(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module, "write_atomically", refuse)
    (tmp_path / "run").mkdir()
    with pytest.raises(SetupError, match="cannot write to .*run: Permission denied") as caught:
        Record.open(tmp_path / "run", recipe())
    assert caught.value.remedy == "give another --out"


def test_a_renamed_project_keeps_its_runs(tmp_path):
    """Base and data are recorded by their folders; what they hold is compared by its hash."""
    before = tmp_path / "before"
    (before / "base").mkdir(parents=True)
    (before / "base" / "config.json").write_text("{}")
    (before / "data").mkdir()
    (before / "data" / "d.jsonl").write_text("{}")
    text = "name: x\nmodel: {id: ./base}\ndata: {prompts: [{path: data/d.jsonl}]}\n"
    record = Record.open(before / "run", parse_recipe(text, "r", folder=before))
    with record.stage("sft"):
        pass
    before.rename(tmp_path / "after")
    now = parse_recipe(text, "r", folder=tmp_path / "after")
    assert Record.read(tmp_path / "after" / "run").recipe() == now
    Record.open(tmp_path / "after" / "run", now)
    (tmp_path / "after" / "base" / "config.json").unlink()
    (tmp_path / "after" / "base").rmdir()
    left = Record.read(tmp_path / "after" / "run").recipe()
    assert left.model.id == str(tmp_path / "after" / "base"), "as the continued run recorded it"


def test_a_continued_run_keeps_its_precision(tmp_path):
    record = Record.open(tmp_path / "run", recipe())
    assert record.model_section(recipe()).dtype == "auto"
    record.data["model"]["dtype"] = "bfloat16"
    assert record.model_section(recipe()).dtype == "bfloat16"
    assert record.model_section(recipe("model.dtype=float32")).dtype == "float32"
