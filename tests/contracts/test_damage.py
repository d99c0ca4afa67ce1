# SPDX-License-Identifier: Apache-2.0
"""Damage to any file of a run is one error that names the file, whoever reads it."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import example_report
import killed
import pytest
from damage import flip_bit
from typer.testing import CliRunner

from lora_rlhf import pipeline
from lora_rlhf.cli import app
from lora_rlhf.errors import DamageError, UsageError
from lora_rlhf.evaluation import judges
from lora_rlhf.hub import staging, targets
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.reports import compare, html_report, plots
from lora_rlhf.reports.cards import model_card
from lora_rlhf.reports.doctor import doctor
from lora_rlhf.runs import repair, reuse, samples
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.runs.run_lock import locked
from lora_rlhf.serving import loaded_run


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory) -> Path:
    """A sealed run whose samples are made up."""
    folder = Path(shutil.copytree(runs.after("ppo"), tmp_path_factory.mktemp("damage") / "run"))
    record = Record.read(folder)
    with record.stage("evaluate"):
        lines = [
            {"index": i, "model": "policy", "prompt": f"p{i}", "completion": "w"} for i in range(4)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "samples.jsonl").write_text(text)
        record.note(folder / "samples.jsonl")
        (folder / "report.json").write_text(json.dumps(example_report.report(prompts=8)))
        record.note(folder / "report.json")
    with record.stage("card"):
        record.seal()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def copy_stages(record: Record) -> None:
    new = Record.open(record.folder.with_name("new"), record.recipe())
    reuse.copy_stages(record, new)


READERS = {
    "sft": lambda record: loaded_run.load_stage("sft", None, record),
    "reward": lambda record: loaded_run.load_stage("reward", None, record),
    "policy": lambda record: loaded_run.load_stage("ppo", None, record),
    "from": copy_stages,
    "run": lambda record: Record.open(record.folder, record.recipe()),
    "samples": samples.read,
    "card": lambda record: model_card.render(record, "policy"),
    "card sft": lambda record: model_card.render(record, "sft"),
    "doctor": doctor.examine,
    "evaluate": lambda record: targets.parse([f"{record.folder}:policy"]),
    "judge": lambda record: judges.of_targets(targets.parse([f"{record.folder}:base"])),
    "compare": lambda record: compare.run([record.folder]),
    "report": html_report.of_run,
    "push": lambda record: staging.check_adapter(record, "policy"),
}


def change(old: str, new: str):
    def edit(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def without_first_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def swap(path: Path) -> None:
    other = path.parents[1] / "sft" / path.name
    path.rename(path.with_suffix(".x"))
    other.rename(path)
    path.with_suffix(".x").rename(other)


WEIGHTS = "adapter_model.safetensors"
LOG = ("from", "run", "card", "doctor", "push")
DAMAGES = [
    (f"adapters/sft/{WEIGHTS}", flip_bit, ("sft", "from", "card sft")),
    (f"adapters/reward/{WEIGHTS}", flip_bit, ("reward", "from", "judge")),
    (f"adapters/held_out/{WEIGHTS}", flip_bit, ("reward", "from", "judge")),
    (f"adapters/policy/{WEIGHTS}", flip_bit, ("policy", "card", "push", "evaluate")),
    (f"adapters/policy/{WEIGHTS}", swap, ("policy", "sft", "card", "push", "from")),
    (f"adapters/reward/{WEIGHTS}", Path.unlink, ("reward", "from")),
    ("adapters/reward", shutil.rmtree, ("reward", "from", "judge")),
    ("adapters/reward/reward.json", change('"reward_offset": ', '"reward_offset": 1'),
     ("reward", "from")),
    ("adapters/reward/reward.json", Path.unlink, ("reward", "from")),
    ("adapters/sft/tokenizer.json", change("w7", "w9"), ("sft", "from", "card sft")),
    ("adapters/sft/check.json", change('"atol"', '"btol"'), ("sft", "from", "card sft")),
    ("adapters/policy/adapter_config.json", change('"lora_alpha"', '"alpha"'),
     ("policy", "card", "push")),
    ("samples.jsonl", cut, ("samples", "card", "compare", "push")),
    ("samples.jsonl", without_first_line, ("samples", "card", "compare", "push")),
    ("samples.jsonl", Path.unlink, ("samples", "card", "compare")),
    ("report.json", change('"headline"', '"Headline"'), ("report",)),
    ("report.json", Path.unlink, ("report",)),
    ("metrics.jsonl", without_first_line, LOG),
    ("metrics.jsonl", change('"loss": ', '"loss": 1'), LOG),
    ("metrics.jsonl", Path.unlink, LOG),
]  # fmt: skip
"""File, what is done to it, and those who read it."""


@pytest.mark.parametrize(("name", "harm", "readers"), DAMAGES)
def test_damage_is_one_error_that_names_the_file(run, name, harm, readers):
    harm(run / name)
    for reader in readers:
        with pytest.raises(DamageError) as caught:
            READERS[reader](Record.read(run))
        assert (harm is swap or name in str(caught.value)) and caught.value.remedy, reader
        shutil.rmtree(run.with_name("new"), ignore_errors=True)


@pytest.mark.parametrize("reader", [r for r in READERS if r not in ("sft", "reward", "policy")])
def test_an_undamaged_run_is_read(run, reader):
    (run / "adapters" / "sft" / "notes.txt").write_text("mine")
    with (run / "metrics.jsonl").open("ab") as log:
        log.write(bytes(50))
    record = Record.read(run)
    record.data["model"]["hub_id"] = "acme/base"  # else there is nothing to push to
    READERS[reader](record)


def test_the_doctor_names_every_damaged_file(run):
    flip_bit(run / f"adapters/policy/{WEIGHTS}")
    (run / f"adapters/held_out/{WEIGHTS}").unlink()
    cut(run / "samples.jsonl")
    found = [f for f in doctor.examine(Record.read(run)) if f.name.startswith("damaged")]
    assert [(f.stage, f.severity) for f in found] == [
        ("reward", "fault"), ("ppo", "fault"), ("evaluate", "fault")
    ]  # fmt: skip
    assert doctor.verdict(found).startswith("stage at fault: reward")


# --- record and recipe ---------------------------------------------------------------------------

BROKEN = [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(bytes(500)),
    cut,
    Path.unlink,
]


@pytest.mark.parametrize("harm", BROKEN)
@pytest.mark.parametrize("name", ["record.json", "recipe.yaml"])
def test_record_and_recipe_come_back_from_their_copies(run, caplog, name, harm):
    before = (run / name).read_text()
    recipe = Record.read(run).recipe()
    harm(run / name)
    assert Record.read(run).recipe() == recipe
    assert f"{name}.bak is used" in caplog.text
    record = Record.open(run, recipe)
    record.save()
    assert record.done("card") and (run / name).read_text() == before
    harm(run / name)
    harm(run / f"{name}.bak")
    with pytest.raises((DamageError, UsageError), match=name if name[2] == "c" else "run"):
        Record.read(run).recipe()


@pytest.mark.parametrize("harm", [BROKEN[0], Path.unlink])
def test_a_lost_record_is_rebuilt_by_the_command_that_the_error_names(run, harm):
    before, recipe = Record.read(run), Record.read(run).recipe()
    for name in ("record.json", "record.json.bak"):
        harm(run / name)
    for read in (lambda: Record.read(run), lambda: Record.open(run, recipe)):
        with pytest.raises(UsageError) as caught:
            read()
        assert f"lora-rlhf doctor {run} --rebuild-record" in caught.value.remedy
    said = CliRunner().invoke(app.app, ["doctor", str(run), "--rebuild-record"]).stdout
    assert "record.json was lost and rebuilt" in said
    now = Record.open(run, recipe)
    assert not now.done("evaluate") and now.data["seed"] == before.data["seed"]
    for stage in ("sft", "reward", "ppo"):
        kept = now.data["stages"][stage]
        old = before.data["stages"][stage]
        assert now.done(stage)
        for key in ("adapter_sha256", "files", "offset", "held_out_adapter_sha256"):
            assert kept.get(key) == old.get(key), (stage, key)
    assert now.data["clock"]["log"] == before.data["clock"]["log"]
    assert now.data["model"]["fingerprint"] == before.data["model"]["fingerprint"]
    for reader in ("samples", "card", "card sft", "doctor", "evaluate", "judge"):
        READERS[reader](now)
    assert "was lost and rebuilt" in model_card.render(now, "policy")
    with pytest.raises(UsageError, match="can be read"):
        repair.rebuild(run)


@pytest.mark.parametrize("gone", [WEIGHTS, "reward.json"])
def test_only_whole_adapters_count_when_a_record_is_rebuilt(run, gone):
    """Without its offset a reward is another one."""
    for name in ("record.json", "record.json.bak"):
        (run / name).unlink()
    cut(run / f"adapters/reward/{gone}")
    assert list(repair.rebuild(run).data["stages"]) == ["sft"]
    (run / "record.json").unlink()
    (run / "record.json.bak").unlink()
    (run / "adapters/sft/check.json").unlink()
    with pytest.raises(DamageError, match="no whole adapter"):
        repair.rebuild(run)


def test_a_damaged_stage_is_done_again_with_all_that_stands_on_it(run, runs):
    flip_bit(run / f"adapters/held_out/{WEIGHTS}")
    with pytest.raises(DamageError) as caught:
        Record.read(run).verified("adapters/held_out")
    assert f"lora-rlhf run {run} --out {run} --redo reward" in caught.value.remedy
    recipe = Record.read(run).recipe()
    with pytest.raises(UsageError, match="no stage 'grpo'"):
        Record.peek(run, recipe, redo="grpo")
    record = Record.open(run, recipe, redo="reward")
    assert list(Record.read(run).data["stages"]) == ["sft"] and not record.data["evaluation"]
    assert [path.name for path in (run / "adapters").iterdir()] == ["sft"]
    assert {line["stage"] for line in record.metrics()} == {"sft"}
    assert not (run / "samples.jsonl").exists()


def test_a_stage_that_is_done_again_has_the_same_bits(runs, tmp_path):
    out = Path(shutil.copytree(runs.after("sft"), tmp_path / "run"))
    flip_bit(out / f"adapters/sft/{WEIGHTS}")
    pipeline.run(runs.recipe(), out, until="sft", redo="sft", progress=Progress(quiet=True))
    assert killed.bits(out) == killed.bits(runs.after("sft"))


def test_a_changed_number_in_the_record_is_noticed(run, caplog):
    change('"seed": 0', '"seed": 9')(run / "record.json")
    assert Record.read(run).data["seed"] == 0
    assert "its own sha256 differs" in caplog.text


def test_an_empty_recipe_of_a_run_names_its_copy(run):
    (run / "recipe.yaml").write_bytes(bytes(9))
    with pytest.raises(UsageError, match="is empty") as caught:
        load_recipe(run)
    assert caught.value.remedy == f"use its backup {run / 'recipe.yaml.bak'}"
    assert load_recipe(run / "recipe.yaml.bak") == Record.read(run).recipe()


def test_a_recipe_that_was_edited_is_not_believed(run, caplog):
    change("updates: 3", "updates: 4")(run / "recipe.yaml")
    assert Record.read(run).recipe().ppo.updates == 3
    assert "not the recipe of this run" in caplog.text
    Record.open(run, Record.read(run).recipe())
    caplog.clear()
    change("title: null", "title: Mine")(run / "recipe.yaml")  # which no stage has read
    assert Record.read(run).recipe().card.title == "Mine" and not caplog.text


def test_a_kill_while_the_recipe_is_stored_leaves_a_recipe(run, monkeypatch):
    """Whichever of its three files was written last."""
    record = Record.read(run)
    del record.data["stages"]["evaluate"]
    record.save()
    recipe = record.recipe()
    changed = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"n": 9})})
    real = Record.save
    for at in ("before", "after"):

        def save(self, at=at):
            if at == "after":
                real(self)
            raise KeyboardInterrupt

        monkeypatch.setattr(Record, "save", save)
        with pytest.raises(KeyboardInterrupt):
            Record.open(run, changed)
        assert Record.read(run).recipe().evaluate.n == (9 if at == "after" else 12)
    monkeypatch.undo()
    assert Record.open(run, changed).recipe().evaluate.n == 9


# --- what is not a plain file --------------------------------------------------------------------


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.mknod(path, 0o140600)])
@pytest.mark.parametrize(
    "name", ["record.json", "recipe.yaml", "metrics.jsonl", "samples.jsonl",
             "adapters/sft/check.json", "adapters/policy/adapter_model.safetensors", "stray"]
)  # fmt: skip
def test_a_pipe_or_a_socket_is_refused_and_not_read(run, name, make):
    (run / name).unlink(missing_ok=True)
    make(run / name)
    with pytest.raises(UsageError, match=f"{name} is a pipe, a socket or a device"):
        Record.read(run)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_nothing_is_written_through_a_link(run, link):
    """Not a card, nor the record, the recipe, the log, a picture, or their temporary files."""
    inside, canary = run / "adapters" / "canary", run.parent / "canary"
    record = Record.read(run)
    recipe = record.recipe().model_copy(update={"report_to": ["none"]})
    names = ["adapters/policy/README.md", "adapters/policy/README.md.tmp", "record.json.tmp",
             "metrics.jsonl", "plots/training.png"]  # fmt: skip
    (run / "plots").mkdir(exist_ok=True)
    kept = (run / "metrics.jsonl").read_text()
    for name in names:
        target = inside if link is os.symlink else canary  # a link out of the run is refused
        target.write_text(kept)
        (run / name).unlink(missing_ok=True)
        link(target, run / name)
        record = Record.open(run, recipe)
        if "README" in name:
            model_card.write(record)
        record.log("later", 1, {})
        record.save()
        plots._save(run / "plots" / "training.png", [lambda axes: None])
        assert target.read_text() == kept
        record.truncate_log("later")
        target.unlink()


def test_a_card_waits_until_the_run_is_left_alone(run, monkeypatch):
    child = killed.start(hold, run)
    while not (run / "held").exists():
        time.sleep(0.01)
    result = CliRunner().invoke(app.app, ["card", str(run)])
    os.kill(child, signal.SIGKILL)
    killed.wait(child)
    assert result.exit_code == 4 and "another process works in" in result.stderr
    assert CliRunner().invoke(app.app, ["card", str(run)]).exit_code == 0


def hold(folder: Path) -> None:
    with locked(folder):
        (folder / "held").touch()
        time.sleep(60)
