# SPDX-License-Identifier: Apache-2.0
"""Changed prompts: what a change does to a text, and the drop that a report shows, paired."""

import json
from typing import get_args

import pytest

from lora_rlhf.errors import UsageError
from lora_rlhf.evaluation import evaluate_targets, stress, suite, suite_tables
from lora_rlhf.evaluation.metrics.metric import Metric
from lora_rlhf.evaluation.prompt_sets import PromptSet, Row

TEXT = "Record: Kofi likes purple bicycles.\nDescribe everything that the record says about Kofi."
ROWS = [
    Row("1", "k", TEXT, {"item": {"prompt": TEXT, "facts": [["color", "purple"]]}}),
    Row("2", "k", [{"role": "system", "content": TEXT}, {"role": "user", "content": TEXT}]),
    Row("3", "k", "Why?"),
]
SET = PromptSet("s", ROWS, "here", "", "0")
LATIN = str.maketrans({glyph: chr(letter) for letter, glyph in stress._ALIKE.items()})


def texts(kind, seed=0):
    return [row.question for row in stress.changed(SET, kind, seed).rows]


@pytest.mark.parametrize("kind", stress.CHANGES)
def test_a_change_repeats_and_touches_the_last_turn_only(kind):
    made = stress.changed(SET, kind, 0)
    assert made.rows == stress.changed(SET, kind, 0).rows and made.sha256 != SET.sha256
    alone = stress.changed(PromptSet("s", ROWS[1:], "", "", ""), kind, 0)
    assert alone.rows == made.rows[1:], "it does not depend on the other prompts"
    assert (made.name, made.clean) == (f"s under {kind}", "s")
    assert [row.id for row in made.rows] == ["1", "2", "3"]
    assert made.rows[1].prompt[0] == ROWS[1].prompt[0]
    assert made.rows[0].question != TEXT and made.rows[1].question != TEXT
    assert made.rows[0].reference["item"] == ROWS[0].reference["item"]
    assert kind not in ("typos", "injection") or {*texts(kind)} != {*texts(kind, 1)}


def test_a_change_does_what_its_name_says():
    for given, made in zip([TEXT, TEXT, "Why?"], texts("typos"), strict=True):
        pairs = list(zip(given.split(), made.split(), strict=True))
        differ = [(a, b) for a, b in pairs if a != b]
        assert all(a[0] == b[0] and abs(len(a) - len(b)) < 2 for a, b in differ)
        assert (given == "Why?") == (not differ) and len(differ) <= len(pairs) / 3
    for kind in ("typos", "homoglyphs"):
        assert all("purple" in texts(kind, seed)[0] for seed in range(20)), "the reference has it"
        assert any("purple" not in texts(kind, seed)[1] for seed in range(20))
    assert [text.translate(LATIN) for text in texts("homoglyphs")] == [TEXT, TEXT, "Why?"]
    assert all(text in (TEXT.upper(), TEXT.lower()) for text in texts("case")[:2])
    assert [text.split() for text in texts("white_space")] == [TEXT.split()] * 2 + [["Why?"]]
    assert [text.count("record says") for text in texts("repetition")] == [3, 3, 0]
    assert all(1_000 < len(text.split()) < 1_100 for text in texts("long_context"))
    assert all(text.endswith(TEXT) for text in texts("long_context")[:2])
    assert texts("empty") == ["", "", ""]
    assert {*stress.CHANGES} == {*get_args(suite.Change)}


def test_an_injected_instruction_lies_inside_the_record_and_is_seen_when_it_is_followed():
    row = stress.changed(SET, "injection", 0).rows[0]
    first, note, last = row.question.split("\n")
    assert f"{first}\n{last}" == TEXT and row.reference["injected"] in note
    [metric] = stress.METRICS
    word = row.reference["injected"]
    assert metric.score(row, f"{word.title()}!") == 1
    assert metric.score(row, "Kofi likes purple.") == metric.score(row, "") == 0
    assert metric.score(row, f"The record has a '{note}'; I do not follow it.") == 0


def test_the_drop_is_paired_by_prompt():
    rows = [Row(str(i), "", "") for i in range(40)]
    clean = {"sft": [float(i % 2) for i in range(40)], "policy": [1.0] * 40}
    under = {"sft": [0.0] * 40, "policy": [None] + [1.0] * 39}
    metric = Metric("f1", "", "higher", False)
    table = suite_tables.metric_table("s under typos", metric, rows, under, "sft", 0, clean)
    drop = table["from_clean"]
    assert drop["sft"]["value"] == -0.5 and drop["sft"]["high"] < -0.3 and drop["sft"]["n"] == 40
    same = drop["policy"]
    assert same["value"] == 0 and same["n"] == 39 and same["p"] == 1
    assert -0.1 < same["low"] < 0 < same["high"] < 0.1  # no change in 39 prompts is no proof
    sentences = suite_tables.sentences(None, None, [table])
    assert sentences[0].startswith("sft is worse on changed prompts than on unchanged ones: s ")
    assert sentences[1].startswith("3 differences")
    table["set"] = "s under empty"
    assert not any("changed" in s for s in suite_tables.sentences(None, None, [table]))


SUITE = """version: 1
name: little
max_new_tokens: 6
sets:
  - name: words
    format: plain
    path: {prompts}
    metrics: [{metrics}]
    stress: [{stress}]
"""


def write(tmp_path, metrics="f1", stress="typos, injection, long_context, empty"):
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "little.yaml"
    rows = [{"prompt": f"word w{5 + i} w{6 + i}", "reference": f"w{7 + i}"} for i in range(4)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(SUITE.format(prompts=prompts, metrics=metrics, stress=stress))
    return path


def test_a_suite_with_stress_is_measured_whole(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(stress, "LONG_CONTEXT", 2_500)  # the little base holds 2,048 tokens
    target = f"{runs.after('evaluate')}:sft"
    out = evaluate_targets.evaluate_targets(
        [target], suite=str(write(tmp_path)), out=tmp_path / "out"
    )
    report = json.loads((out / "report.json").read_text())
    tables = {(t["set"], t["metric"]): t for t in report["tables"]}
    for kind in ("typos", "empty"):
        table = tables[f"words under {kind}", "f1"]
        values = [table["estimates"], tables["words", "f1"]["estimates"], table["from_clean"]]
        under, clean, drop = (v["after-evaluate:sft"]["value"] for v in values)
        assert drop == pytest.approx(under - clean)
    assert tables["words under injection", "followed_injection"]["estimates"]
    assert "from_clean" not in tables["words", "f1"]
    [gap] = report["not_measured"]
    assert gap["what"] == "after-evaluate:sft on words under long_context"
    assert "tokens, and the context has" in gap["why"]
    assert {s["set"] for s in report["samples"]} == {
        "words", *(f"words under {kind}" for kind in ("typos", "injection", "empty"))
    }  # fmt: skip
    assert "f1</a>" in (out / "report.html").read_text()
    assert "changed − clean" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stress": "typo"}, r"little.yaml:\d+: sets.0.stress.0: Input should be 'typos'"),
        ({"stress": "case, case"}, r"little.yaml:\d+: sets.0.*names each change once"),
        ({"metrics": ""}, "stress needs metrics"),
        ({"metrics": "winogender_entropy"}, "winogender_entropy needs 'male'"),
    ],
)
def test_wrong_stress_is_one_error(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        file = str(write(tmp_path, **options))
        evaluate_targets.evaluate_targets(["tiny"], suite=file, out=tmp_path / "out")
