# SPDX-License-Identifier: Apache-2.0
"""Columns of ordinary and odd files: the part that each is taken for, or the error that helps."""

import json

import pytest

from lora_rlhf.errors import DataError, LoraRlhfError
from lora_rlhf.recipe.schema import DataSource
from lora_rlhf.starting.columns import look

N = 24
Q = [f"What is item number {i} made of?" for i in range(N)]
A = [f"It is made of wood and {i} nails." for i in range(N)]
B = [f"No idea about {i}." for i in range(N)]


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def table(**columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def taken(path, rows, ask=None, given=None, ignore=()):
    if isinstance(rows, list):
        rows = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(rows)
    return look(DataSource(path=str(path)), given=given or {}, ignore=ignore, ask=ask)


ORDINARY = {
    "german": (
        table(Frage=Q, Antwort=A, Datum=["2026"] * N),
        {"Frage": "prompt", "Antwort": "completion", "Datum": "ignored"},
        ["demonstrations", "prompts"],
    ),
    "alpaca": (
        table(instruction=Q, input=["", "x"] * (N // 2), output=A),
        {"instruction": "prompt", "input": "input", "output": "completion"},
        ["demonstrations", "prompts"],
    ),
    "context": (
        table(context=B, question=Q, answer=A),
        {"context": "input", "question": "prompt", "answer": "completion"},
        ["demonstrations", "prompts"],
    ),
    "sharegpt": (
        table(conversations=[[{"from": "human", "value": q}, {"from": "gpt", "value": a}]
                             for q, a in zip(Q, A, strict=True)]),
        {"conversations": "messages"},
        ["demonstrations", "prompts"],
    ),
    "pairs": (
        table(question=Q, chosen=A, rejected=B, source=["web"] * N),
        {"question": "prompt", "chosen": "chosen", "rejected": "rejected", "source": "ignored"},
        ["comparisons", "demonstrations", "prompts"],
    ),
    "pairs of turns": (
        table(chosen=list(map(turns, Q, A)), rejected=list(map(turns, Q, B))),
        {"chosen": "chosen", "rejected": "rejected"},
        ["comparisons", "demonstrations", "prompts"],
    ),
    "thumbs on two answers each": (
        table(prompt=Q * 2, response=A + B, thumbs=["up"] * N + ["👎"] * N),
        {"prompt": "prompt", "response": "completion", "thumbs": "label"},
        ["comparisons", "demonstrations", "prompts"],
    ),
    "thumbs on one answer each": (
        table(prompt=Q, response=A, thumbs=["up", "down"] * (N // 2)),
        {"prompt": "prompt", "response": "completion", "thumbs": "label"},
        ["demonstrations", "prompts"],
    ),
    "ultrafeedback": (
        table(
            instruction=Q,
            completions=[
                [{"response": text, "annotations": {"h": {"Rating": stars}}}
                 for text, stars in ((good, "5"), (bad, "2"))]
                for good, bad in zip(A, B, strict=True)
            ],
        ),
        {"instruction": "prompt", "completions": "completions"},
        ["comparisons", "demonstrations", "prompts"],
    ),
    "two columns that nobody knows": (
        table(alpha=A, beta=Q, number=range(N)),
        {"alpha": "completion", "beta": "prompt", "number": "ignored"},
        ["demonstrations", "prompts"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ORDINARY)
def test_each_column_is_taken_for_something_or_ignored(tmp_path, case):
    rows, roles, sets = ORDINARY[case]
    made = taken(tmp_path / "d.jsonl", rows)
    assert {column: role for column, (role, _) in made.columns.items()} == roles
    assert sorted(made.sources) == sets
    guessed = [column for column, (_, why) in made.columns.items() if why.startswith("a guess")]
    assert guessed == (["alpha", "beta"] if case.startswith("two") else [])
    for name, source in made.sources.items():  # the recipe reads the same examples
        assert len(made.examples[name]) == len(rows), (name, source)


def test_judgements_that_no_layout_reads_are_left_out_aloud(tmp_path):
    rows = table(prompt=Q, completion=A, stars=[1, 5] * (N // 2))
    made = taken(tmp_path / "d.jsonl", rows)
    assert made.sources["demonstrations"].ignore == ["stars"]
    assert "'stars' is left out, though it judges the answers (1: 12, 5: 12)" in made.notes[0]
    with pytest.raises(DataError, match="judges the answers"):
        taken(tmp_path / "d.jsonl", rows, ask=lambda question, answers, default: "no")


def test_semicolons_a_byte_order_mark_and_quoted_line_breaks(tmp_path):
    text = "\ufeffFrage;Antwort\n" + "".join(
        f'"{q}\nBitte!";"{a} ""ja"""\n' for q, a in zip(Q, A, strict=True)
    )
    made = taken(tmp_path / "d.csv", text.encode())
    assert list(made.columns) == ["Frage", "Antwort"]
    first = made.examples["demonstrations"][0]
    assert first.prompt[0]["content"] == f"{Q[0]}\nBitte!"
    assert first.answers[0][0]["content"] == f'{A[0]} "ja"'


BROKEN = {
    "x.csv": (b"", "the file is empty"),
    "head.csv": (b"prompt,completion\n", "there are no rows"),
    "latin.csv": ("prompt,completion\nGr\xf6\xdfe?,klein\n".encode("latin-1"), "iconv -f cp1252"),
    "wide.csv": ("prompt,completion\na?,b\n".encode("utf-16"), "iconv -f utf-16"),
    "bare.csv": (f"{Q[0]},{A[0]}\n{Q[1]},{A[1]}\n".encode(), "is not a header, but data"),
    "text.jsonl": (table(text=Q), "holds plain text only"),
    "three.jsonl": (table(a=Q, b=A, c=B), "cannot be told apart"),
    "winner.jsonl": (table(prompt=Q, response_a=A, response_b=B, winner=["a"] * N),
                     "names the better one of two"),
    "turned.jsonl": (table(prompt=Q, chosen=A, rejected=B, score_chosen=[1] * N,
                           score_rejected=[2] * N), "have a score_chosen below their"),
    "x.zip": (b"PK", "cannot be read"),
    "bad.jsonl": (b"{oops\n{oops\n", "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_is_refused_with_the_remedy(tmp_path, name):
    rows, message = BROKEN[name]
    with pytest.raises(LoraRlhfError) as caught:
        taken(tmp_path / name, rows)
    assert message in str(caught.value)


def test_few_broken_rows_are_counted(tmp_path):
    rows = "".join(json.dumps(row) + "\n" for row in table(prompt=Q, completion=A)) + "{oops\n"
    made = taken(tmp_path / "d.jsonl", rows.encode())
    assert made.sources["demonstrations"].skip_bad == 1
    assert "1 broken row left out (skip_bad), the first at d.jsonl:25" in made.notes[0]


def test_unknown_columns_are_asked_for_or_named(tmp_path):
    rows = table(a=Q, b=A, c=B)
    answers = iter(["a", "b", "c"])
    made = taken(tmp_path / "d.jsonl", rows, ask=lambda *_: next(answers))
    roles = {"a": "prompt", "b": "chosen", "c": "rejected"}
    assert {column: role for column, (role, _) in made.columns.items()} == roles
    given = {"prompt": "a", "completion": "c"}
    made = taken(tmp_path / "d.jsonl", rows, given=given)
    assert made.columns["c"] == ("completion", "as you said")
    assert made.columns["b"][0] == "ignored"


REPLIES = [f"Please look at page {i} of the manual, and call us if it fails." for i in range(12)]


def test_replies_that_repeat_are_texts(tmp_path):
    rows = table(a=[f"{q} Please." for q in 3 * Q], b=6 * REPLIES, c=["in the shop"] * 72)
    offered = []

    def ask(question, choices, default):
        offered.append(choices)
        return default

    taken(tmp_path / "a.jsonl", rows, ask=ask)
    assert offered[0] == ("a", "b", "none")


def test_good_and_bad_replies_are_known_by_name(tmp_path):
    rows = table(**{"Customer question": Q, "Good reply": 2 * REPLIES, "Bad reply": [B[0]] * N})
    read = taken(tmp_path / "a.jsonl", rows).columns
    assert [read[name][0] for name in rows[0]] == ["prompt", "chosen", "rejected"]


def test_the_worse_answer_is_not_offered_as_the_better_one(tmp_path):
    rows = table(**{"Frag": Q, "a bad one": B, "one": [f"{a} So it says." for a in A]})
    offered = []

    def ask(question, choices, default):
        offered.append(default)
        return default

    taken(tmp_path / "a.jsonl", rows, ask=ask)
    assert offered[:3] == ["Frag", "one", "none"]
