"""The owner's page, and labelers in counts: from the store's labels to record and card."""

import base64
import hashlib
import json
import re
import subprocess
import sys

import card_run
import pytest
from data_sources import jsonl, make_tokenizer, recipe
from simulated_team import team
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.data.dataset_builder import comparisons
from lora_rlhf.errors import DataError
from lora_rlhf.feedback import label_files, label_summary, project
from lora_rlhf.reports import agreement_report
from lora_rlhf.reports.cards.model_card import render

PEOPLE = {f"p{i:02}": "x" if i < 5 else "y" for i in range(8)}


@pytest.fixture(scope="module")
def made():
    habits = ("honest",) * 7 + ("left",)
    return team(7, each=24, overlap=1.0, per_overlap=4, habits=habits)


@pytest.fixture(scope="module")
def left(made):
    return next(who for who, habit in made.habits.items() if habit == "left")


@pytest.fixture(scope="module")
def page(made):
    summary = label_summary.summary(made.tasks, made.labels, PEOPLE, made.judge)
    return agreement_report.render(summary | {"project": "<b>&", "created": "2026-01-01T00:00:00Z"})


# --- the page ------------------------------------------------------------------------------------


def test_the_page_names_who_should_be_looked_at(page, left):
    verdict = page.split('id="labelers"')[0]
    assert "1 of 8 labelers should be looked at" in verdict and f"<dt>{left}</dt>" in verdict
    assert "always the same side" in verdict and "100% of pairs" in verdict
    table = page.split('id="labelers"')[1].split('id="agreement"')[0]
    assert all(f">{who}</th>" in table for who in PEOPLE)
    agreement = page.split('id="agreement"')[1]
    assert not any(who in agreement for who in PEOPLE)
    assert re.search(r">x</th>", agreement) and not re.search(r">y</th>", agreement)
    assert "1 self-described group is not shown" in agreement


def test_the_page_runs_and_asks_for_nothing(page):
    assert (
        "<script" not in page and " on" not in "".join(re.findall(r"<\w+ ([^>]*)>", page)).lower()
    )
    assert not re.search(r"""(?:href|src)=["'](?!#|data:,)""", page)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = re.search(r'Security-Policy" content="([^"]*)"', page)[1]
    assert f"style-src 'sha256-{digest}'" in policy and "script-src 'none'" in policy
    assert "<h1>&lt;b&gt;&amp;</h1>" in page and "<b>&<" not in page


def test_the_page_needs_no_torch():
    code = "import sys, lora_rlhf.reports.agreement_report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("count", "lead"), [(0, "nobody to compare"), (1, "nobody to compare")])
def test_a_project_without_several_people(made, count, lead):
    labels = [one for one in made.labels if one.labeler == "p00"] * count
    summary = label_summary.summary(made.tasks, labels, {})
    assert lead in agreement_report.lines(summary)[0]
    page = agreement_report.render(summary | {"project": "p", "created": "2026-01-01T00:00:00Z"})
    assert "No task has two labels" in page and "No question was answered by two" in page


# --- from the store to the recipe ----------------------------------------------------------------


def test_the_command_names_a_labeler_and_a_copied_judge(tmp_path):
    rows = [
        {"id": f"t{i}", "prompt": f"q{i}", "type": "pair", "answers": {"a": f"{i}", "b": f"{i}."}}
        for i in range(40)
    ]
    folder, judge = tmp_path / "p", tmp_path / "judge.jsonl"
    jsonl(judge, [{"id": f"t{i}", "ranking": ["ab"[i % 2], "ba"[i % 2]]} for i in range(40)])
    run = CliRunner().invoke
    tasks = jsonl(tmp_path / "tasks.jsonl", rows)
    assert run(app.app, ["label", str(folder), "--new", str(tasks)]).exit_code == 0
    settings = folder / "project.yaml"
    settings.write_text(settings.read_text().replace("labels_per_task: 1", "labels_per_task: 9"))
    with project.load(folder).store() as store:
        for n, who in enumerate(("copy", "ann", "bob", "eve")):
            store.add_labeler(who)
            while given := store.next_assignment(who):
                i = int(given.task.id[1:])
                of_judge, right = i % 2, (i * 7 // 3) % 2
                choice = of_judge if n == 0 else right if (i + 3 * n) % 8 else 1 - right
                sign = 1 if given.order[1] == choice else -1  # in shown order
                store.submit(who, given.id, {"strength": sign})
    result = run(app.app, ["label", str(folder), "--agreement", "--judge", str(judge)])
    assert result.exit_code == 0, result.output
    assert "copy: answers as judge does, on 100% of 40 pairs" in result.output
    assert (folder / "agreement.html").is_file()
    assert run(app.app, ["label", str(folder), "--judge", str(judge)]).exit_code == 2
    judge.write_text('{"id": "t1", "ranking": ["a", "c"]}\n')
    result = run(app.app, ["label", str(folder), "--agreement", "--judge", str(judge)])
    assert result.exit_code and "judge.jsonl:1" in result.output and "names a, c" in result.output


@pytest.fixture
def exported(made, left, tmp_path):
    path = tmp_path / "labels.jsonl"
    label_files.export(made.tasks, made.labels, path, without=[left], groups=PEOPLE)
    return path


def prepared(path):
    rows = recipe(comparisons=path, demonstrations=path, prompts=path, held_out=0.4)
    return comparisons(rows, make_tokenizer(None)).report


def test_labelers_reach_the_record_in_counts(exported, made, left):
    report = prepared(exported)
    [source] = report["sources"]
    pool = source["labelers"]
    gold = {task.id for task in made.tasks if task.gold}
    given = [one for one in made.labels if one.labeler != left and one.task not in gold]
    used = [one for one in given if len({*one.value["ranks"]}) > 1]  # ties are not in the file
    assert (pool["people"], pool["left_out"], pool["labels"]) == (7, 1, len(used))
    assert pool["by_type"] == {"ranking": len(used)} and sum(pool["by_kind"].values()) == len(used)
    assert pool["agreement"]["comparisons"]["labelers"] == 7 and pool["verdicts"] == {}
    assert sum(pool["screening"]["rankings"].values()) == 7
    assert set(pool["groups"]) <= {"x"} and all(n >= 5 for n in pool["groups"].values())
    text = json.dumps(report)
    assert not any(who in text for who in PEOPLE)


def test_labelers_are_on_the_card(exported, tmp_path):
    pool = prepared(exported)["sources"][0]["labelers"]
    data = {"data__comparisons__sources": [
        {"kind": "file", "name": "labels.jsonl", "license": "mit", "rows": 9, "sha256": "0b" * 32,
         "labelers": pool}
    ]}  # fmt: skip
    card = render(card_run.make_run(tmp_path / "run", card_run.change(**data)), "reward")
    section = card_run.section(card, "Data")
    assert f"comparisons: labelled by 7 people, {pool['labels']} labels (ranking" in section
    assert "labels of 1 more people were left out" in section
    alpha = pool["agreement"]["comparisons"]["alpha"]
    assert f"Krippendorff's alpha {alpha:.4g}" in section
    assert "people by what speaks against their labels: none 7" in section


def test_a_changed_file_is_not_described_by_the_old_description(exported):
    exported.write_text(exported.read_text() + exported.read_text().splitlines()[0] + "\n")
    report = prepared(exported)
    assert "labelers" not in report["sources"][0]
    assert any("describes another version of the file" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda pool: pool | {"names": ["Ann"]}, "names: Extra inputs are not permitted"),
        (lambda pool: pool | {"version": 2}, "version: Input should be 1"),
        (lambda pool: pool | {"people": "Ann"}, "people: Input should be a valid integer"),
        (lambda pool: "{", "the file: Invalid JSON"),
    ],
)
def test_a_wrong_description_is_one_error_with_its_place(exported, change, problem):
    path = exported.with_name("labels.jsonl.labels.json")
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(DataError, match=re.escape(problem)) as caught:
        prepared(exported)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("form", ["majority", "consensus"])
def test_one_row_of_each_task_from_all_its_labels(made, tmp_path, form):
    path = tmp_path / "together.jsonl"
    text = label_files.export(made.tasks, made.labels, path, form)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [row["task"] for row in rows]
    assert len({*names}) == len(names) > 20 and f"({form})" in text
    right = [
        (row["ranks"][a] < row["ranks"][b]) == (gold[a] > gold[b])
        for row in rows
        for gold in [made.rewards[row["task"]]]
        for a in range(4)
        for b in range(a)
        if gold[a] != gold[b] and row["ranks"][a] != row["ranks"][b]
    ]
    assert sum(right) / len(right) > 0.75
    assert "labeler_agreement" not in prepared(path)
