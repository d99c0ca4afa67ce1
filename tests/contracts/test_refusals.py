# SPDX-License-Identifier: Apache-2.0
"""A run that would not be the same is refused with a table; a warm start is another run."""

import json
import shutil
from pathlib import Path

import killed
import pytest
from damage import edit, flip_bit
from typer.testing import CliRunner

from lora_rlhf import pipeline
from lora_rlhf.cli import app
from lora_rlhf.errors import CheckpointError, LoraRlhfError, UsageError
from lora_rlhf.models import backbone, base_model
from lora_rlhf.runs.record import Record


@pytest.fixture
def half(runs: killed.Runs) -> Path:
    """A run that was killed in the middle of PPO."""
    return runs.half()


@pytest.fixture
def out(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "stage"),
    [("seed=3", "sft, which is done"), ("sft.args.learning_rate=1e-3", "sft, which is done"),
     ("ppo.args.learning_rate=1e-4", "ppo, which has begun"),
     ("ppo.updates=9", "ppo, which has begun"), ("algorithm=dpo", "ppo, which has begun")],
)  # fmt: skip
def test_changed_seed_or_rate_is_refused_with_a_table(
    half: Path, out: Path, change: str, stage: str
):
    with pytest.raises(UsageError, match=f"(?s){change.split('=')[0]}: .* -> .*{stage}") as caught:
        pipeline.run(killed.recipe(half.parent, change), out, until="policy")
    for free in ("checkpoint", "report_to"):
        assert free in caught.value.expected, "keys that may change are listed"
    assert "--warm-start" in caught.value.remedy
    assert Record.read(out).in_flight("ppo")


@pytest.mark.slow
def test_free_keys_may_change(half: Path, out: Path):
    changed = killed.recipe(half.parent, "checkpoint.keep=5", "card.title=x", "evaluate.n=8")
    assert pipeline.run(changed, out, until="ppo").done("ppo")


def test_values_given_earlier_by_set_are_named_with_the_way_to_keep_them(half: Path, out: Path):
    with pytest.raises(UsageError) as caught:
        pipeline.run(killed.recipe(half.parent, "ppo.updates=9", "evaluate.n=5"), out)
    assert "--set evaluate.n=12 --set ppo.updates=3" in caught.value.remedy


def test_a_change_that_may_be_made_is_said(half: Path, out: Path, capsys: pytest.CaptureFixture):
    shutil.rmtree(out / "checkpoints")
    recipe = killed.recipe(half.parent, "evaluate.n=8")
    pipeline.run(recipe, out, until="sft")
    said = " ".join(capsys.readouterr().err.split())
    assert "changed in this run: evaluate.n 12 -> 8 (to undo: --set evaluate.n=12)" in said
    pipeline.run(recipe, out, until="sft")
    assert "changed" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("until", "sets", "message"),
    [
        ("sft", ["sft.args.learnin=1"], "did you mean"),
        ("ppo", ["ppo.value_warmup_updates=3"], "lower ppo.value_warmup_updates"),
        ("ppo", ["data.prompts=[{path: gone.jsonl}]"], "no such file"),
        ("ppo", ["ppo.args.per_device_train_batch_size=64"], "too few prompts"),
        ("ppo", ["ppo.reward=gold"], "no checker"),
        ("ppo", ["model.id=./gone"], "config.json"),
        ("card", ["hub.policy=a/b", "hub.value=a/c", "ppo.value=head"], "trains no value adapter"),
        ("dpo", [], "no stage 'dpo'"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses_and_writes_nothing(
    runs: killed.Runs, tmp_path: Path, until: str, sets: list[str], message: str
):
    recipe, out = runs.recipe("ppo", *sets), tmp_path / "run"
    errors = pipeline.check(recipe, out, until=until)
    assert message in str(errors[0]) and not out.exists()
    with pytest.raises(LoraRlhfError) as caught:
        pipeline.run(recipe, out, until=until)
    assert str(caught.value) in map(str, errors)


def test_a_dry_run_of_a_begun_run_checks_it(half: Path, out: Path):
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert pipeline.check(killed.recipe(half.parent), out) == []
    flip_bit(out / "adapters" / "sft" / "adapter_model.safetensors")
    [error] = pipeline.check(killed.recipe(half.parent, "seed=3"), out)
    assert "holds a run of another recipe" in str(error)
    assert {p for p in out.rglob("*") if p.is_file()} == before.keys()


def test_a_dry_run_needs_no_data_of_stages_that_it_would_copy(runs: killed.Runs, tmp_path: Path):
    source = runs.before("ppo")
    gone = ["data.demonstrations=[{path: gone.jsonl}]"]
    assert pipeline.check(runs.recipe("ppo"), tmp_path / "run", start_from=source) == []
    errors = pipeline.check(runs.recipe("ppo", *gone), tmp_path / "run", start_from=source)
    assert "its stages read other values" in str(errors[0])


def test_keys_of_stages_that_are_not_asked_for_refuse_nothing(runs: killed.Runs, tmp_path: Path):
    sets = ["ppo.value_warmup_updates=5", "ppo.args.nonsense=1", "hub.value=a/b", "ppo.value=head"]
    recipe = runs.recipe("ppo", *sets, "data.prompts=[{path: gone.jsonl}]", "reward.args.x=1")
    assert pipeline.check(recipe, tmp_path / "run", until="sft") == []
    assert len(pipeline.check(recipe, tmp_path / "run", until="reward")) == 1


def tampered(out: Path, **changes) -> None:
    """The newest checkpoint as one of a run in which these were different."""
    for path in (out / "checkpoints" / "ppo").glob("*/manifest.json"):
        assert changes.keys() <= json.loads(path.read_text())["run"].keys()
        edit(path, lambda data: data["run"].update(changes))


@pytest.mark.parametrize(
    "key", ["base", "base.dtype", "tokenizer.template", "data.prompts", "adapter.reward"]
)
def test_changed_base_template_or_adapter_is_refused_with_a_table(half: Path, out: Path, key: str):
    tampered(out, **{key: "another"})
    with pytest.raises(CheckpointError, match=f"(?s)of another run:\n  {key}: 'another' -> "):
        pipeline.run(killed.recipe(half.parent), out, until="ppo")
    assert not Record.read(out).done("ppo")


def test_another_template_of_the_same_base_is_refused(half: Path, out: Path, monkeypatch):
    """For real: the base's tokenizer has got another template since."""
    real = pipeline.Backbone.load

    def load(*args):
        made = real(*args)
        made.tokenizer.chat_template += " "
        return made

    monkeypatch.setattr(pipeline.Backbone, "load", load)
    with pytest.raises(CheckpointError, match=r"  tokenizer.template: "):
        pipeline.run(killed.recipe(half.parent), out, until="ppo")


def test_prompts_that_changed_in_between_are_refused(half: Path, tmp_path: Path):
    folder = tmp_path / "all"
    shutil.copytree(half.parent, folder, ignore=shutil.ignore_patterns("after-*", "half*"))
    shutil.copytree(half, folder / "run")
    (folder / "prompts.jsonl").write_text(
        (folder / "prompts.jsonl").read_text().replace("w5", "w6")
    )
    # The paths in the recipe are those of the copy, so only the checkpoint is asked.
    text = (folder / "run" / "recipe.yaml").read_text().replace(str(half.parent), str(folder))
    (folder / "run" / "recipe.yaml").write_text(text)
    record = Record.read(folder / "run")
    record.rehash(["recipe.yaml"])
    record.save()
    with pytest.raises(CheckpointError, match=r"data.prompts: "):
        pipeline.run(killed.recipe(folder), folder / "run", until="ppo")


# --- warm start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_warm_start_keeps_the_adapters_and_says_so(half: Path, out: Path, broken: bool):
    change = "ppo.args.learning_rate=1e-4"
    if broken:  # what an exact resume needs is gone, the adapters are whole
        for folder in (out / "checkpoints" / "ppo").glob("step-*"):
            flip_bit(folder / "optimizer.safetensors")
    record = pipeline.run(killed.recipe(half.parent, change), out, until="ppo", warm_start=True)
    assert record.done("ppo") and [line["step"] for line in record.metrics("ppo")] == [1, 2, 3]
    note = record.data["warm_starts"]["ppo"]
    assert note["from_step"] == 6 and len(note["adapters_sha256"]) == 64
    assert [row.split(":")[0].strip() for row in note["changed"]] == [change.split("=")[0]]
    first = record.metrics("ppo")[0]
    assert first["kl/sequence"] != 0, "it began from the adapters of the checkpoint, not from SFT"
    assert "kl_at_start" not in record.data["stages"]["ppo"]["identities"]


def test_a_warm_start_needs_something_to_start_from(half: Path, out: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="learning_rate.*sft, which is done"):
        pipeline.run(killed.recipe(half.parent, "sft.args.learning_rate=1"), out, warm_start=True)
    for folder in (out / "checkpoints" / "ppo").glob("step-*"):
        flip_bit(folder / "roles.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint holds its adapters whole"):
        pipeline.run(killed.recipe(half.parent), out, until="ppo", warm_start=True)
    tampered(out, base="another")
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(UsageError, match="no interrupted stage with a checkpoint"):
        pipeline.run(killed.recipe(half.parent), out, until="ppo", warm_start=True)


VERBS_THAT_WRITE = {
    "score": "score {run} rows.jsonl --out {out}",
    "compare": "compare {run} --plot {out}",
    "judge": "judge {run}:reward --against pairs.jsonl --out {out}",
    "do": "do summarize text.txt --with {run} --out {out}",
    "tasks": "tasks {run} --n 2 --k 2 --out {out}",
    "label": "label project --export {out}",
    "data": "data export project {out} --to label-studio",
    "evaluate": "evaluate {run} --suite closed-world --out {out}",
    "init": "init pairs.jsonl --model tiny --yes --out {out}",
    "serve": "serve {run} --moderation default --moderation-log {out}",
}


@pytest.mark.parametrize("verb", VERBS_THAT_WRITE)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    verb: str, runs: killed.Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An answer, a score or a label was computed, and lost in an unexpected error."""

    def worked(*args: object, **kwargs: object) -> None:
        raise AssertionError("the work has begun")

    run = runs.after("evaluate")
    monkeypatch.chdir(tmp_path)
    for name, row in (
        ("rows.jsonl", {"prompt": "w5", "answers": ["w6", "w7"]}),
        ("pairs.jsonl", {"prompt": "w5", "a": "w6", "b": "w7", "labels": ["a"]}),
        ("tasks.jsonl", {"prompt": "w5", "answers": {"x": "w6", "y": "w7"}}),
    ):
        Path(name).write_text(json.dumps(row) + "\n")
    Path("text.txt").write_text("w5 w6 w7")
    invoke = CliRunner().invoke
    invoke(app.app, ["label", "project", "--new", "tasks.jsonl"])
    for place in (base_model.BaseModel, backbone.Backbone):
        monkeypatch.setattr(place, "load", worked)
    line = VERBS_THAT_WRITE[verb].format(run=run, out="text.txt/new")
    result = invoke(app.app, line.split(), prog_name="lora-rlhf")
    assert result.exit_code == 4, result.output
    assert "cannot write to" in result.output and "text.txt is a file" in result.output
