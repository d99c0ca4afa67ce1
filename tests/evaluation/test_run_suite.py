# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation of a little run: sampled once, continued to the same bits, reported."""

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.errors import DataError, UsageError
from lora_rlhf.evaluation import (
    evaluate_targets,
    judges,
    prompt_sets,
    run_suite,
    suite,
)
from lora_rlhf.evaluation import suite as suites
from lora_rlhf.evaluation.engine import Engine, cost_of
from lora_rlhf.hub import targets
from lora_rlhf.recipe.schema import ModelSection

SUITE = """version: 1
name: little
temperature: 1.0
max_new_tokens: 6
headline: words/win_rate
sets:
  - name: words
    format: plain
    path: {prompts}
    metrics: [{metrics}]
    win_rate: true
"""


@pytest.fixture
def suite_file(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    kinds = ("short", "long")
    rows = [{"prompt": f"w{5 + i} w{6 + i}", "kind": kinds[i % 2]} for i in range(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "little.yaml"
    path.write_text(SUITE.format(prompts=prompts, metrics=""))
    return path


@pytest.fixture(scope="module")
def run(runs):
    return runs.after("evaluate")


def evaluate(run, suite_file, out, **options):
    folder = evaluate_targets.evaluate_targets(
        [str(run)], suite=str(suite_file), out=out, **options
    )
    report = json.loads((folder / "report.json").read_text())
    timed = ("created", "costs", "seconds")
    return {key: value for key, value in report.items() if key not in timed}, report["costs"]


def test_an_evaluation_goes_on_to_the_same_report(run, suite_file, tmp_path, monkeypatch):
    whole, costs = evaluate(run, suite_file, tmp_path / "whole", price_per_hour=1.0)
    assert (tmp_path / "whole" / "report.html").is_file()
    assert len(whole["targets"]) == 3 and whole["sets"][0]["kinds"] == {"short": 6, "long": 6}
    assert costs["after-evaluate:sft"]["per_1000"] > 0
    assert len(whole["samples"]) == 12 and len(whole["samples"][0]["answers"]) == 3
    by = {t["judge"] for t in whole["tables"]}
    assert by == {"after-evaluate:held_out", "after-evaluate:reward"}
    ratings = [t for t in whole["tables"] if t["metric"] == "bradley_terry"]
    assert {t["judge"] for t in ratings} == by and all(len(t["differences"]) == 3 for t in ratings)
    assert ratings[0]["estimates"]["after-evaluate:sft"]["value"] == 0
    assert not any(t["trusted"] for t in whole["tables"]), "no judge was compared with people"
    assert whole["headline"] is None and whole["verdict"][0].startswith("No verdict")

    tasks = [json.loads(x) for x in (tmp_path / "whole" / "to_label.jsonl").open()]
    assert {task["id"] for task in tasks} == {sample["id"] for sample in whole["samples"]}
    ranked = [{**task, "ranking": [[n] for n in task["answers"]]} for task in tasks[:6]]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(task) + "\n" for task in ranked))
    labelled, _ = evaluate(run, suite_file, tmp_path / "whole", labels=[tmp_path / "mine.jsonl"])
    judges = {t["judge"]: t["trusted"] for t in labelled["tables"]}
    assert judges["mine"] and judges["mine + after-evaluate:held_out"], "people may decide"
    assert labelled["headline"]["judge"] == "mine"

    own, sampled = Engine.answer, []

    def answer(self, target, *rest):
        if len(sampled) == 1:
            raise KeyboardInterrupt
        sampled.append(target.name)
        return own(self, target, *rest)

    monkeypatch.setattr(Engine, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, suite_file, tmp_path / "cut")
    [kept] = (tmp_path / "cut" / "answers").iterdir()
    sampled.clear()
    monkeypatch.setattr(Engine, "answer", lambda *a: sampled.append(a[1].name) or own(*a))
    assert evaluate(run, suite_file, tmp_path / "cut")[0] == whole
    assert len(sampled) == 2, "one of three targets had answered before"
    parts = json.loads((tmp_path / "cut" / "report.json").read_text())["seconds"]
    answers = {
        f"answers of after-evaluate:{m} on {whole['sets'][0]['name']}"
        for m in ("base", "sft", "policy")
    }
    assert answers < parts.keys() and min(parts[part] for part in answers) > 0
    assert {f"judge {name}" for name in by} | {"statistics", "page"} < parts.keys()
    assert "Time of this evaluation" in (tmp_path / "cut" / "report.html").read_text()

    sampled.clear()  # what is damaged is sampled again
    kept.write_text(kept.read_text().replace("w", "v", 1))
    assert evaluate(run, suite_file, tmp_path / "cut")[0] == whole
    assert len(sampled) == 1


def test_a_validated_judge_decides(run, suite_file, tmp_path):
    record = {"judge": "after-evaluate:held_out", "n": 80, "constant": 0.5,
              "accuracy": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 80}}  # fmt: skip
    (tmp_path / "judge.json").write_text(json.dumps(record))
    options = {"judge_records": [tmp_path / "judge.json"], "against": "after-evaluate:base"}
    report, _ = evaluate(run, suite_file, tmp_path / "out", **options)
    assert report["headline"]["judge"] == "after-evaluate:held_out"
    assert {t["trusted"] for t in report["tables"] if t["judge"].endswith("reward")} == {False}
    head = next(t for t in report["tables"] if t["trusted"])
    assert list(head["estimates"]) == ["after-evaluate:sft", "after-evaluate:policy"]
    assert report["verdict"][0] == report["headline"]["sentence"]
    for wrong in (
        {},
        {**record, "n": "80"},
        {**record, "constant": None},
        {**record, "probes": {"empty": 1}},
    ):
        (tmp_path / "judge.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"judge.json: not a record of a judge"):
            evaluate(run, suite_file, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("metrics: []", "metrics: [beauty]"), "unknown metric 'beauty'"),
        (("metrics: []", "metrics: [gold_reward]"), "gold_reward needs 'item'"),
        (("metrics: []", "metrics: [f1, f1]"), "metrics names one twice"),
        (("version: 1", "version: 2"), "version"),
        (("name: words", "names: words"), r"little.yaml:\d+: sets.0.names"),
        (("words/win_rate", "words/f1"), r"little.yaml:5: headline: 'words/f1' is not measured"),
        (("temperature: 1.0", "temperature: hot"), r"little.yaml:3: temperature"),
    ],
)
def test_a_wrong_suite_is_one_error(run, suite_file, tmp_path, change, message):
    suite_file.write_text(suite_file.read_text().replace(*change))
    with pytest.raises(UsageError, match=message):
        evaluate(run, suite_file, tmp_path / "out")


def test_unknown_names_are_one_error(run, suite_file, tmp_path):
    with pytest.raises(UsageError, match="--against 'gpt' is not a target"):
        evaluate(run, suite_file, tmp_path / "out", against="gpt")
    with pytest.raises(UsageError, match="there is no suite 'everything'"):
        suite.load("everything")
    (tmp_path / "x.yaml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"x.yaml: the file cannot be read"):
        suite.load(str(tmp_path / "x.yaml"))
    with pytest.raises(UsageError, match="there is no file"):
        evaluate(run, suite_file, tmp_path / "out", labels=[tmp_path / "none.jsonl"])


def test_packaged_suites_can_be_read():
    assert {"closed-world", "quick"} <= set(suite.shipped())
    for name in suite.shipped():
        made, _ = suite.load(name)
        assert made.name == name
        known = run_suite.METRICS
        assert all(metric in known for one in made.sets for metric in one.metrics), name


def test_the_commands_compare_models_and_check_a_judge(run, suite_file, tmp_path):
    def invoke(*arguments):
        result = CliRunner().invoke(app.app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    pairs = [{"prompt": f"w{5 + i}", "a": "w9 w8", "b": "w7", "labels": ["a"]} for i in range(8)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    judge, record = f"{run}:held_out", tmp_path / "judge.json"
    told = invoke("judge", f"{run}:base", "--against", tmp_path / "labels.jsonl", "--out", record)
    assert "of its verdicts change with the order" in told
    options = ("--suite", suite_file, "--judge", judge, "--judge-record", record)
    options = (*options, "--out", tmp_path / "out")
    wrong = CliRunner().invoke(app.app, ["evaluate", str(run), *map(str, options)])
    assert wrong.exit_code == 2 and "judge 'after-evaluate:base', which is not" in wrong.output
    told = invoke("judge", judge, "--against", tmp_path / "labels.jsonl", "--out", record)
    assert (
        "agrees with people on" in told
        and "may not decide a report: it was compared with 8 labels" in told
    )
    options = ("--suite", suite_file, "--judge", judge, "--judge-record", record)
    told = invoke("evaluate", run, *options, "--out", tmp_path / "out")
    assert "No verdict" in told and f"report  {tmp_path / 'out' / 'report.html'}" in told
    assert invoke("report", tmp_path / "out")
    own = shutil.copytree(run, tmp_path / "run")
    (own / "report.html").unlink()
    assert invoke("report", own).strip() == str(own / "report.html"), "of a run too"
    wrong = CliRunner().invoke(app.app, ["evaluate", "recipe.yaml", "--judge", "x"])
    assert wrong.exit_code == 2 and "is a recipe, which reads only" in wrong.output
    labels = ("--against", str(tmp_path / "labels.jsonl"), "--out", str(tmp_path))
    wrong = CliRunner().invoke(app.app, ["judge", judge, *labels])
    assert wrong.exit_code == 2 and "is a folder" in wrong.output
    wrong = CliRunner().invoke(app.app, ["evaluate", str(run), "--set", "seed=1"])
    assert wrong.exit_code == 2 and "are for a recipe" in wrong.output


def test_a_row_without_reference_is_named_before_anything_is_sampled(run, suite_file, tmp_path):
    rows = [{"prompt": "w5", "reference": "w6"}, {"prompt": "w6"}, {"prompt": "w7"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite_file.write_text(suite_file.read_text().replace("metrics: []", "metrics: [f1]"))
    with pytest.raises(UsageError, match="2 of its 3 rows do not have, the first '2'"):
        evaluate(run, suite_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        ("gold_reward", {"item": "x"}),
        ("unsafe_compliance", {"label": "Unsafe"}),
        ("crows_pairs_preference", {"sent_more": "w5", "sent_less": 3}),
        ("truthfulqa_mc1", {"mc1_targets": {"choices": [], "labels": []}}),
    ],
)
def test_a_reference_of_another_layout_is_one_error(run, suite_file, tmp_path, metric, reference):
    rows = [{"prompt": "w5", "reference": reference}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps(rows[0]) + "\n")
    text = suite_file.read_text().replace("metrics: []", f"metrics: [{metric}]")
    suite_file.write_text(text)
    with pytest.raises(DataError, match=f"{metric} cannot use the reference of row '1' of words"):
        evaluate(f"{run}:base", suite_file, tmp_path / "out")


def test_prompts_that_do_not_fit_the_context_are_not_measured(run, suite_file, tmp_path):
    rows = [{"prompt": "w5 " * 3000}, {"prompt": "w6"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, costs = evaluate(run, suite_file, tmp_path / "out")
    assert [gap["what"].split(":")[1] for gap in report["not_measured"]] == [
        "base on words",
        "sft on words",
        "policy on words",
    ]
    assert not report["samples"] and not costs and report["verdict"][0].startswith("No verdict")
    said = [*evaluate_targets.summary(tmp_path / "out")]
    assert "not measured: " in said[-2] and "base on words and 2 more: a prompt with" in said[-2]


def test_no_report_is_written_over_something_else(run, suite_file, tmp_path):
    out = tmp_path / "out"
    evaluate(f"{run}:sft", suite_file, out)
    before = (out / "report.json").read_bytes()
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "report.json").write_text("{}")
    other = tmp_path / "other.yaml"
    other.write_text(suite_file.read_text().replace("little", "other"))
    for target, file, place, message in (
        (f"{run}:policy", suite_file, out, "it holds a report on after-evaluate:sft"),
        (f"{run}:sft", other, out, "it holds a report on the suite little"),
        (run, suite_file, tmp_path / "file", "it is a file"),
        (run, suite_file, run, "it is a run"),
        (run, suite_file, tmp_path / "foreign", "cannot be read: not a report of version 1"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(target, file, place)
    assert (out / "report.json").read_bytes() == before
    assert len(evaluate(run, suite_file, out)[0]["targets"]) == 3, "targets may be added"


def test_judges_of_one_name_are_one_error(run, suite_file, tmp_path):
    line = json.dumps({"set": "words", "id": "1", "ranking": [["a"], ["b"]]}) + "\n"
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.jsonl").write_text(line)
    files = [tmp_path / folder / "mine.jsonl" for folder in ("x", "y")]
    with pytest.raises(UsageError, match="two judges are called 'mine'"):
        evaluate(run, suite_file, tmp_path / "out", labels=files)
    with pytest.raises(
        DataError, match="of after-evaluate:sft and another model here, but of a, b"
    ):
        evaluate(run, suite_file, tmp_path / "out", labels=files[:1])
    shutil.copytree(run, tmp_path / run.name)
    names = [
        spec.name for spec in judges.of_targets(targets.parse([str(run), str(tmp_path / run.name)]))
    ]
    assert names == [f"{run.name}{n}:{role}" for n in ("", " 2") for role in ("held_out", "reward")]


def test_fewer_prompts_are_named_in_the_report_and_have_a_folder_of_their_own(
    run, suite_file, tmp_path, monkeypatch
):
    """48 prompts of `quick` take long on a CPU, and nothing asked for fewer."""
    monkeypatch.chdir(tmp_path)
    folder = evaluate_targets.evaluate_targets([str(run)], suite=str(suite_file), n=4)
    assert folder == Path("evaluations/little-n4")
    report = json.loads((folder / "report.json").read_text())
    assert report["suite"]["name"] == "little-n4" and report["sets"][0]["n"] == 4
    assert "At most 4 prompts of each set were used (--n)" in report["verdict"][-1]
    with pytest.raises(UsageError, match="it holds a report on the suite little-n4"):
        evaluate_targets.evaluate_targets([str(run)], suite=str(suite_file), out=folder)
    with pytest.raises(UsageError, match="n is 1"):
        evaluate_targets.evaluate_targets([str(run)], suite=str(suite_file), n=1)
    packaged = suites.load("full")[0]
    short = packaged.shortened(3)
    assert {one.n for one in short.sets} == {3}
    tasks = packaged.model_copy(update={"lm_eval": suites.LmEvalSection(tasks=["piqa"], n=9)})
    assert [tasks.shortened(n).lm_eval.n for n in (3, 20)] == [3, 9]


def test_secrets_and_home_folders_stay_out_of_the_report(run, suite_file, tmp_path, monkeypatch):
    token = "hf_" + "a" * 20
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": f"w5 {token}"}) + "\n")
    monkeypatch.setenv("HOME", str(run.parent))
    folder = evaluate_targets.evaluate_targets(
        [str(run)], suite=str(suite_file), out=tmp_path / "out"
    )
    for path in folder.rglob("*.*"):
        assert token not in path.read_text() and str(run.parent) not in path.read_text(), path
    assert targets.Target("m", "url", url="https://me:word@host/v1#m").describe()["id"] == (
        "https://me:***@host/v1#m"
    )


def test_one_base_at_a_time_is_in_memory(monkeypatch, tmp_path):
    alive, most = weakref.WeakSet(), []

    class Fake:
        def __init__(self, section, group):
            alive.add(self)
            most.append(len(alive))
            self.base = SimpleNamespace(model_section=section)
            self.adapters = SimpleNamespace(load_scorer=lambda *_: None)

        def measure(self, *_):
            return cost_of([1.0], None, 1, None)

    monkeypatch.setattr(run_suite, "Engine", Fake)
    monkeypatch.setattr(run_suite, "_of_target", lambda *_: None)
    monkeypatch.setattr(
        run_suite,
        "_load_sets",
        lambda _: [(words, prompt_sets.PromptSet("x", [], "", "", ""))],
    )
    monkeypatch.setattr(run_suite, "_win_rates", lambda *_: [])
    monkeypatch.setattr(run_suite, "_with_people", lambda *_: [])
    monkeypatch.setattr(run_suite, "report", lambda *_: {})
    monkeypatch.setattr(run_suite, "_to_label", lambda *_: [])
    words = suite.SetSection(name="x", format="plain", win_rate=True)
    bases = [ModelSection(id=name) for name in ("a/a", "b/b", "c/c")]
    named = [targets.Target(base.id, "model", base=base) for base in bases[:2]]
    made = run_suite.Evaluation(
        named, suite.Suite(name="s", sets=[words]), tmp_path, tmp_path / "o", "a/a"
    )
    run_suite.run(made, [judges.JudgeSpec(str(i), "reward", bases[i], "x") for i in (0, 1, 2)])
    assert most == [1] * 4
