# SPDX-License-Identifier: Apache-2.0
"""Rounds: recipes of old and new labels, their lineage, and rounds that were killed."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_rlhf import pipeline, tiny
from lora_rlhf.cli import app
from lora_rlhf.data import dataset_builder, label_pool
from lora_rlhf.data.closed_world import generator
from lora_rlhf.data.closed_world.checkers import check
from lora_rlhf.errors import DamageError, DataError, UsageError
from lora_rlhf.feedback import rounds
from lora_rlhf.feedback.labels import Answer, Task
from lora_rlhf.feedback.rounds import Round
from lora_rlhf.feedback.task_choice import Choice
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.reports.cards import model_card
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record


def labels(out):
    """People's labels of the tasks: the first answer is the best."""
    given = [json.loads(line) for line in (out / "tasks.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": one["prompt"], "completions": list(texts), "ranks": [*range(1, len(texts) + 1)]}
        for one in given
        for texts in [one["answers"].values()]
    ]
    path = out.parent / "people.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


OTHER = (Answer("a", "w6"), Answer("b", "w7"))

ASKED = Round(Choice("random", 6, 3, "policy"), start="policy", overrides=("reward.gate=warn",))


def labelled(run, out, asked=ASKED):
    """Both calls of a round: the first one waits for labels."""
    assert rounds.prepare(run, out, asked) is None
    with_labels = Round(asked.choice, str(labels(out)), asked.start, asked.overrides)
    return rounds.prepare(run, out, with_labels), with_labels


def test_a_round_learns_from_old_and_new_labels(runs, tmp_path):
    run, out = runs.after("ppo"), tmp_path / "round"
    recipe, asked = labelled(run, out)
    before = Record.read(run).recipe()
    assert recipe.data.comparisons[:-1] == before.data.comparisons
    assert recipe.data.comparisons[-1].path == str(out / "labels.jsonl")
    assert recipe.sft.start == str(run / "adapters" / "policy")
    [one] = recipe.rounds
    assert (one.number, one.rankings, one.labels, one.start) == (1, 6, "people.jsonl", "policy")
    assert one.tasks_sha256 == sha256(out / "tasks.jsonl")
    assert one.labels_sha256 == sha256(out / "labels.jsonl")
    assert one.record_sha256 == sha256(run / "record.json")
    assert rounds.prepare(run, out, asked) == recipe, "the same command goes on"

    sets = ("reward.args.max_steps=1", "reward.held_out_model=false")
    again = rounds.prepare(run, out, Round(asked.choice, asked.labels, "policy", sets))
    record = pipeline.run(again, out / "run", until="reward", progress=Progress(quiet=True))
    assert record.data["rounds"] == [one.model_dump()]
    assert record.data["stages"]["sft"]["from"]["adapter"] == "policy"
    hashes = [s["sha256"] for s in record.data["data"]["comparisons"]["sources"]]
    assert one.labels_sha256 in hashes, "the lineage names the data that was read"
    card = model_card.render(record, "reward")
    assert f"Round 1 of feedback: 6 rankings by people.jsonl (sha256 `{one.labels_sha256}`)" in card

    assert rounds.find_run(out) == out / "run"
    assert rounds.next_folder(out / "run") == tmp_path / "round-round-2"
    second, _ = labelled(out / "run", tmp_path / "two", Round(Choice("random", 4, 3, "sft")))
    assert [r.number for r in second.rounds] == [1, 2] and second.rounds[0] == one
    assert second.name == "little-round-2"
    texts = [(path / "tasks.jsonl").read_text() for path in (out, tmp_path / "two")]
    first, more = ({json.loads(x)["prompt"] for x in text.splitlines()} for text in texts)
    assert not first & more, "no prompt is labelled twice"


def test_a_round_that_is_killed_at_any_write_goes_on(runs, tmp_path, monkeypatch):
    run = runs.after("ppo")
    whole, asked = labelled(run, tmp_path / "whole" / "round")
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole" / "round").glob("*.json*")}
    real, left = os.replace, [0]

    def replace(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(*args, **options)

    monkeypatch.setattr(os, "replace", replace)
    out, recipe, kills = tmp_path / "killed" / "round", None, 0
    while recipe is None:
        left[0], kills = kills, kills + 1  # one write more each time
        try:
            recipe = rounds.prepare(run, out, asked)
        except KeyboardInterrupt:
            continue
    assert kills > 3
    assert {p.name: p.read_bytes() for p in out.glob("*.json*")} == files
    assert recipe.rounds == whole.rounds


def test_labels_and_folders_that_are_not_of_this_round(runs, tmp_path):
    run, out = runs.after("ppo"), tmp_path / "round"
    assert rounds.prepare(run, out, ASKED) is None
    path = labels(out)
    row = {"prompt": "w5 w5 w5 w5 w5", "completions": ["w6", "w7"], "ranks": [1, 2]}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    asked = Round(ASKED.choice, str(path), "policy")
    with pytest.raises(DataError, match="none of the round's tasks") as error:
        rounds.prepare(run, out, asked)
    assert str(error.value).startswith(f"{path}:7")
    with pytest.raises(UsageError, match="another choice"):
        rounds.prepare(run, out, Round(Choice("novelty", 6, 3, "policy")))
    with pytest.raises(UsageError, match="judge the closed-world task only"):
        rounds.prepare(run, out, Round(ASKED.choice, rounds.SIMULATED))
    tampered = out / "tasks.jsonl"
    tampered.write_text(tampered.read_text().replace("policy/1", "policy/9"))
    with pytest.raises(DamageError, match="tasks.jsonl"):
        rounds.prepare(run, out, ASKED)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        rounds.prepare(run, tmp_path / "other", ASKED)
    with pytest.raises(UsageError, match="no finished policy"):
        rounds.prepare(runs.after("reward"), tmp_path / "new", ASKED)


def test_a_round_waits_until_a_project_has_all_labels(runs, tmp_path):
    """A skipped task counts as answered; it, and labels of other tasks, are no comparisons."""
    pytest.importorskip("sqlalchemy")
    from lora_rlhf.feedback import project

    made = project.create(tmp_path / "project", project.Settings(name="p", overlap=0.0))
    other = Task("other", "ranking", ({"role": "user", "content": "w5"},), OTHER)
    with made.store() as store:
        store.add_tasks([other])
    asked = Round(Choice("random", 3, 3, "policy"), str(tmp_path / "project"))
    run, out, said = runs.after("ppo"), tmp_path / "round", []
    assert rounds.prepare(run, out, asked, say=said.append) is None
    assert "without a label yet: 3 of 3 tasks" in said[-1]
    with made.store() as store:
        store.add_labeler("anna")
        while given := store.next_assignment("anna"):
            ranks = [1 + place for place in range(len(given.task.answers))]
            skipped = given.task.id.startswith("round") and len(store.labels()) == 2
            store.submit("anna", given.id, None if skipped else {"ranks": ranks})
    recipe = rounds.prepare(run, out, asked, say=said.append)
    lines = (out / "labels.jsonl").read_text().splitlines()
    assert recipe.rounds[0].rankings == len(lines) == 2
    assert recipe.rounds[0].labels == "project"
    assert "w5" not in {json.loads(line)["prompt"] for line in lines}
    people, stale = label_pool.beside(out / "labels.jsonl")
    assert (people["people"], people["labels"], stale) == (1, 2, "")
    again = rounds._earlier_prompts(recipe)
    assert len(again) == 3, "the skipped one is not asked again"


def test_the_next_round_lies_beside_the_run(runs, tmp_path, monkeypatch):
    """Also if the run is called as the run of a round is, or is the current folder."""
    run = tmp_path / "run"
    run.symlink_to(runs.after("ppo"))
    assert rounds.next_folder(run) == tmp_path / "run-round-1"
    (tmp_path / "mine").symlink_to(runs.after("ppo"))
    monkeypatch.chdir(tmp_path)
    assert rounds.next_folder(Path("mine")) == Path("mine-round-1")
    monkeypatch.chdir(runs.after("ppo"))
    found = rounds.next_folder(Path("."))
    assert found == Path.cwd().with_name(f"{Path.cwd().name}-round-1")


def test_a_task_file_beside_comparisons_need_not_be_of_a_round(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"instruction": "Boil an egg."}\n')
    own = {"path": str(tmp_path / "comparisons.jsonl"), "license": "mit"}
    recipe = load_recipe(tiny.recipe())
    recipe.data.comparisons[:] = [type(recipe.data.comparisons[0]).model_validate(own)]
    assert rounds._earlier_prompts(recipe) == set()
    (tmp_path / "round.json").write_text("{}")
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "w5"}\n')
    assert rounds._earlier_prompts(recipe) == {rounds.prompt_key("w5")}


def test_a_text_may_hold_other_ends_of_a_line(tmp_path):
    rows = [{"prompt": "one\u2028two\x85three"}, {"prompt": "p"}]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "labels.jsonl").write_text("".join(lines), encoding="utf-8")
    assert rounds._rows(tmp_path / "labels.jsonl") == rows


def test_simulated_labelers_keep_their_noise_and_draw_new_errors():
    recipe = load_recipe(tiny.recipe())
    items = generator.items(40, recipe.seed, "prompts")
    given = []
    for item in items:
        texts = [item.answer or "not stated", "Sorry, no.", f"{item.answer} and {item.answer}"]
        given.append({"prompt": item.prompt, "answers": dict(enumerate(texts))})
    right, _ = rounds.simulated(recipe, given, 0, noise=1e-6)
    for item, row in zip(items, right, strict=True):
        gold = [check(item, text).reward for text in row["completions"]]
        assert row["ranks"] == [1 + sum(other > one for other in gold) for one in gold]
    first, noise = rounds.simulated(recipe, given, 0)
    assert noise > 0.05 and first != right
    assert rounds.simulated(recipe, given, 0, noise) == (first, noise)
    assert rounds.simulated(recipe, given, 1_000, noise)[0] != first


@pytest.mark.slow
def test_labels_of_the_task_generator_are_those_of_the_run(tmp_path, monkeypatch):
    """The same answers of SFT and the same ranks as in the run's own reward stage."""
    sets = [
        "data.demonstrations.0.n=32", "data.comparisons.0.n=24", "data.prompts.0.n=40",
        "sft.args.max_steps=1", "reward.args.max_steps=1", "data.held_out=0.3",
    ]  # fmt: skip
    read, real = [], dataset_builder._task_rows

    def rows(recipe, source, kept, chat, sampler):
        made = real(recipe, source, kept, chat, sampler)
        read.extend(row for _, row in made if kept.name == "comparisons")
        return made

    monkeypatch.setattr(dataset_builder, "_task_rows", rows)
    run, out = tmp_path / "run", tmp_path / "round"
    recipe = load_recipe(tiny.recipe(), sets)
    pipeline.run(recipe, run, until="reward", progress=Progress(quiet=True))
    asked = Round(Choice("highest_reward", 4, model="sft"), rounds.SIMULATED)
    made = rounds.prepare(run, out, asked)
    keys = ("prompt", "completions", "ranks")
    earlier = [json.loads(line) for line in (out / "earlier.jsonl").read_text().splitlines()]
    assert earlier == [{key: row[key] for key in keys} for row in read]
    assert [Path(source.path).name for source in made.data.comparisons] == [
        "earlier.jsonl", "labels.jsonl",
    ]  # fmt: skip
    assert made.rounds[0].noise > 0 and made.rounds[0].labels == "simulated"


def test_the_command_waits_for_labels_and_goes_on(runs, tmp_path, monkeypatch):
    run, out, made = runs.after("evaluate"), tmp_path / "round", []

    def execute(recipe, folder, **options):
        made.append((recipe, folder))
        return Record.read(run)

    monkeypatch.setattr(pipeline, "run", execute)
    asked = ["iterate", str(run), "--n", "4", "--k", "3", "--start", "policy", "--out", str(out)]
    asked += ["--set", "reward.gate=warn"]
    first = CliRunner().invoke(app.app, asked)
    assert first.exit_code == 0 and f"{out / 'tasks.jsonl'} waits for labels" in first.stdout
    again = CliRunner().invoke(app.app, [*asked, "--labels", str(labels(out))])
    assert again.exit_code == 0 and "win rate" in again.stdout, again.output
    [(recipe, folder)] = made
    assert (folder, recipe.rounds[0].rankings, recipe.reward.gate) == (out / "run", 4, "warn")
    other = CliRunner().invoke(app.app, [*asked, "--seed", "1"])
    assert other.exit_code == 2 and "holds a round with another choice" in other.stderr
    assert CliRunner().invoke(app.app, ["iterate", str(tmp_path)]).exit_code == 2
