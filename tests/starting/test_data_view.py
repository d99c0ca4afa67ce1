# SPDX-License-Identifier: Apache-2.0
"""`lora-rlhf data RECIPE`: its numbers, and a run's line on a set, whose numbers add up."""

import re

import pytest
from data_sources import PREFS, jsonl, make_tokenizer, recipe

import lora_rlhf
from lora_rlhf.data import dataset_builder
from lora_rlhf.starting import data_view


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(data_view.loading, "find_tokenizer", lambda *_: make_tokenizer())


def test_length_bias_duplicates_and_cut_rows(tmp_path, offline):
    rows = [{**row, "rejected": f"bad{i}"} for i, row in enumerate(PREFS)]
    rows += [rows[0], {**rows[1], "chosen": "same", "rejected": "same"}]
    rows += [{"prompt": f"p{i}", "chosen": "x", "rejected": "a longer one"} for i in range(20)]
    rows += [{"prompt": "long", "chosen": "word " * 200, "rejected": "b"}]
    made = recipe(comparisons=jsonl(tmp_path / "p.jsonl", rows), max_tokens=100)
    [view] = lora_rlhf.show_data(made, seed=3, rows=2).sets
    assert view.pairs["chosen equal to rejected, left out"] == 1
    assert view.pairs["duplicate, left out"] == 1
    longer = view.pairs["the longer answer is chosen"]
    assert (longer["value"], longer["n"]) == (60 / 80, 80)
    assert longer["low"] < 0.75 < longer["high"]
    assert sum(n > 100 for n in view.tokens) == 1 and view.lengths["rejected"]["1"] < 20
    assert [which.partition(",")[0] for which, *_ in view.rows] == ["first", "longest"] + [
        "random"
    ] * 2
    assert view.report["counts"]["over data.max_tokens = 100"]["after"] == 80
    assert not view.stops


def test_a_set_that_cannot_be_read_does_not_hide_the_others(tmp_path, offline):
    made = recipe(
        comparisons=jsonl(tmp_path / "p.jsonl", PREFS), demonstrations=tmp_path / "no.csv"
    )
    view = lora_rlhf.show_data(made)
    assert "there is no such file" in view.sets[0].stops and view.sets[1].report["train"]
    assert not view.runs


def adds_up(prepared):
    """The numbers of the line: read (or made) = to train on + held out + left out."""
    line = prepared.lines[0]
    numbers = {
        key: int(found[1].replace(",", "")) if (found := re.search(rf"([\d,]+) {key}", line)) else 0
        for key in (
            "rows read",
            "pairs, ",
            "made of them",
            "(?:pairs )?to train on",
            "held out(?!  ?in)",
        )
    }
    read, pairs, more, train, held_out = numbers.values()
    left = re.search("; left out: ([^;]*)", line)
    lost = (
        [int(n.replace(",", "")) for n in re.findall(r"(?:^|, )([\d,]+) ", left[1])] if left else []
    )
    return (pairs or read) + more == train + held_out + sum(lost), line


def test_lines_add_up(tmp_path):
    tokenizer = make_tokenizer()
    ranked = [
        {"prompt": f"q{i}", "completions": ["a", "b", "c"], "ranks": [1, 2, 2]} for i in range(40)
    ]
    labels = [
        {"prompt": f"q{i}", "completion": text, "label": good}
        for i in range(40) for text, good in (("a", True), ("b", False))
    ]  # fmt: skip
    asked = jsonl(tmp_path / "e.jsonl", [{"prompt": f"other {i}"} for i in range(9)])
    for rows in (ranked, labels, [*PREFS, *PREFS]):
        path = jsonl(tmp_path / "p.jsonl", rows)
        made = recipe(comparisons=path, prompts=path, evaluate=asked)
        for builder in (dataset_builder.comparisons, dataset_builder.prompts):
            ok, line = adds_up(builder(made, tokenizer))
            assert ok, line
    assert "; 9 of 9 rows of data.evaluate to evaluate on" in line
