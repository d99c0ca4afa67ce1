# SPDX-License-Identifier: Apache-2.0
"""Numbers are rounded, local folders removed, and untrusted texts shown as plain text."""

import itertools
import re

import pytest
from card_run import HOSTILE, RECIPE, estimate, make_run, rows, write_samples
from huggingface_hub import ModelCard

from lora_rlhf.reports.cards import model_card
from lora_rlhf.reports.cards.card_markdown import (
    CUT,
    cell,
    interval,
    number,
    relative,
    without_paths,
)


@pytest.fixture
def run(tmp_path):
    count = itertools.count()
    return lambda *args, **kw: make_run(tmp_path / f"run{next(count)}", *args, **kw)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "not recorded"), (True, "yes"), (0, "0"), (1234567, "1,234,567"), (2.0, "2"),
        (0.123456, "0.1235"), (3.5e-05, "3.5e-05"), (123456.7, "123,457"),
        (float("nan"), "not finite"), ("NaN", "not finite"), ("-inf", "not finite"),
        ("a|b", "a&#124;b"),
    ],
)  # fmt: skip
def test_number(value, shown):
    assert number(value) == shown


def test_a_missing_interval_is_stated():
    assert interval(estimate(0.5, 0.4, 0.6, 10)) == "0.5 (95 % interval 0.4 to 0.6, n = 10)"
    assert interval(estimate(0.5, 0.4, 0.6, 10), short=True) == "0.5 [0.4, 0.6], n = 10"
    assert interval({"value": 0.5, "n": 1}) == "0.5 (no interval recorded, n = 1)"
    assert interval(0.5) == "0.5 (no interval recorded)"
    assert interval(None) == "not recorded"


# --- samples and untrusted text -------------------------------------------------------------


def test_samples_hold_the_worst_answers_first(run):
    table = rows(model_card.render(run(), "policy"), "Samples")
    assert [row[0] for row in table[2:]] == ["worst", "worst", "first", "first"]
    assert [row[-1] for row in table[2:]] == ["-0.875", "0.375", "0.625", "0.9375"]
    assert [row[1] for row in table[2:]] == ["prompt b", "prompt d", "prompt a", "prompt c"]
    sft = rows(model_card.render(run(), "sft"), "Samples")
    assert [row[-1] for row in sft[2:]] == ["-0.25", "0.125", "0.5", "0.75"]


def test_hostile_samples_render_as_text(run):
    text = model_card.render(run(), "policy")
    table = rows(text, "Samples")
    assert {len(row) for row in table} == {6}  # no pipe of an answer makes a column
    worst = table[2][4]
    for markup in ("<", "`", "*", "![", "](", "@", "https://", "www.", "$", "\u202e", "\x00"):
        assert markup not in worst, markup
    assert "script&#62;alert(1)" in worst and "&#91;U+202E&#93;reversed" in worst
    assert text.count("\n# ") == 1  # the answer's heading is none
    assert len(re.findall(r"(?m)^---$", text)) == 2


def test_hostile_text_everywhere_else_leaves_the_card_whole(run):
    def edit(data):
        data["name"] = HOSTILE
        for entry in data["data"].values():
            entry["notes"] = [HOSTILE]
            entry["sources"][0] |= {"name": HOSTILE, "license": HOSTILE}
            entry["counts"] = {HOSTILE: {"before": 3, "after": 2}}
        data["stages"]["reward"] |= {"gate": "warned", "gate_reason": HOSTILE}
        data["stages"]["ppo"]["signs"] = [{"update": 3, "sign": HOSTILE, "message": HOSTILE}]
        data["evaluation"]["policy"][HOSTILE] = estimate(0.5, 0.4, 0.6, 9)
        data["clock"]["host"] = {HOSTILE: HOSTILE}
        data["model"] |= {"license": HOSTILE, "fingerprint": HOSTILE, "source": HOSTILE}

    words = dict.fromkeys(("title", "license", "authors", "intended_use", "limits"), HOSTILE)
    record = run(edit, recipe={**RECIPE, "card": {**RECIPE["card"], **words}})
    plain, text = model_card.render(run(), "policy"), model_card.render(record, "policy")
    assert "<script" not in text.split("\n---\n", 1)[1]
    for mark in (r"(?m)^# ", r"(?m)^## ", r"(?m)^```"):
        assert len(re.findall(mark, text)) == len(re.findall(mark, plain))
    data = ModelCard(text).data
    assert data.license == "other" and len(data.eval_results) == 5


def test_long_texts_are_cut_with_a_mark(run):
    record = run()
    write_samples(record.folder, "ordinary", "long " * 500)
    worst = rows(model_card.render(record, "policy"), "Samples")[2][4]
    assert worst.endswith(CUT.replace("[", "&#91;").replace("]", "&#93;").strip())
    assert len(worst) < 500


def test_a_cell_keeps_words_readable():
    assert cell("learning_rate of _x_") == "learning_rate of &#95;x&#95;"
    assert cell("a\r\n\r\nb\tc") == "a ⏎ b c"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/x.jsonl", "x.jsonl"), ("/home/John Doe/x.jsonl", "x.jsonl"),
        ("C:\\Users\\me\\x.jsonl", "x.jsonl"), ("~/x/y.csv", "y.csv"), ("/data/base/", "base"),
        ("read /data/in/x.jsonl, then", "read x.jsonl, then"), ("https://a.b/c/d", "https://a.b/c/d"),
        ("acme/base", "acme/base"), ("either/or/both", "either/or/both"), ("data://hh/x", "data://hh/x"),
    ],
)  # fmt: skip
def test_local_folders_are_removed(text, expected):
    assert relative(text) == expected
    assert without_paths({"a": [text]}) == {"a": [expected]}
