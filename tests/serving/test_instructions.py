# SPDX-License-Identifier: Apache-2.0
"""Instructions: what the model is asked, checks that fail and are tried again, long texts."""

import json
import re
from types import SimpleNamespace

import pytest
from scripted_engine import ScriptedEngine
from typer.testing import CliRunner

import lora_rlhf
from lora_rlhf.cli import app
from lora_rlhf.errors import DataError, UsageError
from lora_rlhf.serving import instructions
from lora_rlhf.serving.moderation import Decision
from lora_rlhf.serving.usage_store import UsageStore

TEXT = "The river rose on Monday. The bridge was closed for a week, and then it opened again."
SCHEMA = {"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]}


def says(*answers):
    """An engine that gives these answers in turn, the last one for ever."""
    left = list(answers)
    return ScriptedEngine(lambda request: left.pop(0) if len(left) > 1 else left[0])


def do(verb, engine, text=TEXT, **options):
    return lora_rlhf.do(verb, text, run=engine, **options)


def test_options_are_in_the_prompt_and_the_answer_is_checked():
    engine = says("The bridge was closed.")
    result = do("summarize", engine, length="5 words", tone="kind", model="sft")
    prompt = engine.requests[0].messages[-1]["content"]
    assert "at most 5 words" in prompt and "kind tone" in prompt and TEXT in prompt
    assert str(result) == "The bridge was closed." and result.passed and result.tries == 1
    assert engine.requests[0].temperature == 0 and engine.requests[0].model == "sft"
    assert {c.name for c in result.checks} >= {"length", "shorter", "quotes"}


def test_no_more_requests_than_an_engine_lets_wait():
    inside, most = [], []

    def submit(number):
        inside.append(number)
        most.append(len(inside))

        def result():
            inside.remove(number)
            return number

        return SimpleNamespace(result=result, cancel=lambda: None)

    engine = SimpleNamespace(submit=submit)
    assert [*instructions._completions(engine, range(400))] == [*range(400)]
    assert max(most) == 64


def test_a_failed_check_is_tried_again_with_another_seed():
    engine, failed = says("one two three", "one two"), []
    result = do("rewrite", engine, length="2 words", seed=5, failed=lambda *got: failed.append(got))
    assert (result.text, result.tries, result.seed) == ("one two", 2, 6)
    assert [(r.seed, r.temperature) for r in engine.requests] == [(5, 0.0), (6, 0.7)]
    [(index, attempt, bad)] = failed
    assert (index, attempt) == (0, 1) and bad.problems == [
        "length: 3 words, at most 2 words asked for"
    ]


@pytest.mark.parametrize("text", ["", " \n", ["one", ""]])
def test_an_empty_text_is_refused(text):
    with pytest.raises(UsageError, match="is empty"):
        do("rewrite", says("one"), text=text)


def test_the_best_attempt_is_kept():
    engine = says("- one two three", "one\n\ntwo three four", "one two three")
    result = do("rewrite", engine, length="2 words", format="line")
    assert (result.text, result.tries, result.passed) == ("- one two three", 3, False)
    assert [len(r.problems) for r in [result]] == [1]


def test_only_failures_of_a_batch_are_tried_again():
    engine = ScriptedEngine(
        lambda r: "short" if "text one" in r.messages[-1]["content"] else "too long"
    )
    results = do("rewrite", engine, ["text one", "text two"], length="1 word", tries=2)
    assert [r.passed for r in results] == [True, False]
    assert [r.tries for r in results] == [1, 2] and len(engine.requests) == 3


def test_labels_and_schemas_constrain_the_answer():
    engine = says("good")
    assert do("classify", engine, labels="good, bad").passed
    assert engine.requests[0].constraint.value == ["good", "bad"]
    engine = says('{"day": "Monday"}', '{"day": "Friday"}')
    assert do("extract", engine, schema=SCHEMA).passed
    assert engine.requests[0].constraint.kind == "json_schema"
    invented = do("extract", engine, schema=SCHEMA, tries=1)
    assert invented.problems == ["in_source: not in the text: Friday"]
    do("answer", says('{"a": 1}'), question="When?", format="json")


def test_bullets_constrain_the_answer():
    engine = says("- one\n- two")
    for options, wrong in (
        ({}, "one\n- two"),
        ({"length": "2 bullets"}, "- one"),
        ({"length": "1-2 bullets"}, "- a\n- b\n- c"),
    ):
        assert do("rewrite", engine, format="bullets", **options).passed
        constraint = engine.requests[-1].constraint
        assert constraint.kind == "regex" and constraint.grammar
        assert re.fullmatch(constraint.value, "- one\n- two")
        assert not re.fullmatch(constraint.value, wrong)


class Gate:
    """A moderation that blocks `bad` and warns of `odd`."""

    def check(self, text, where, prompt=""):
        action = "block" if "bad" in text else "warn" if "odd" in text else "allow"
        return Decision(action, "rude", 0.9, 0.5, "words")


def test_moderation_of_texts_and_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(instructions.Moderation, "load", lambda *_: Gate())
    engine, path = says("this is bad", "fine", "a bad one"), tmp_path / "u.sqlite"
    options = {"moderation": "default", "usage": path, "tries": 2}
    blocked, odd = do("rewrite", engine, ["a bad text", "an odd text"], **options)
    assert (blocked.text, blocked.tries, blocked.passed) == ("", 0, False)
    assert "the prompt is blocked: rude" in blocked.problems[0]
    assert (odd.text, odd.tries, odd.passed) == ("fine", 2, True)
    assert ["the prompt is doubtful: rude" in one for one in odd.warnings] == [True]
    assert "bad text" not in str(engine.requests)
    [never] = do("rewrite", engine, ["a text"], **options)
    assert never.text == "" and "the answer is blocked: rude" in never.problems[0]
    with UsageStore(path) as store:
        assert [use["blocked"] for use in store.uses()] == [True, False, True]
    assert do("rewrite", engine, "a bad text").text == "a bad one"  # off


def test_an_answer_that_is_cut_off_is_not_whole():
    result = do("rewrite", says("one two three"), max_tokens=2, tries=1)
    assert result.problems == ["whole: cut off after 2 tokens"]


def test_examples_are_earlier_turns(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"input": "A cat sat.", "output": "Cat."}\n')
    engine = says("Bridge.")
    do("summarize", engine, examples=path)
    roles = [
        (turn["role"], turn["content"].splitlines()[-1]) for turn in engine.requests[0].messages
    ]
    assert roles == [("user", "A cat sat."), ("assistant", "Cat."), ("user", TEXT)]


@pytest.mark.parametrize(
    "line", ["", "x", '{"input": "a"}', '{"input": 1, "output": "b"}', "[1]",
             '{"input": "a", "output": "b"}\n' * 4],
)  # fmt: skip
def test_broken_examples(tmp_path, line):
    path = tmp_path / "examples.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=r"examples\.jsonl"):
        instructions.read_examples(path)


@pytest.mark.parametrize(
    ("verb", "options", "match"),
    [
        ("summarise", {}, "did you mean summarize"),
        ("translate", {}, "needs --to"),
        ("translate", {"to": "Klingon"}, "Klingon"),
        ("summarize", {"labels": "a,b"}, "does not use --labels"),
        ("summarize", {"format": "xml"}, "--format 'xml'"),
        ("classify", {"labels": "a"}, "two or more"),
        ("summarize", {"tries": 0}, "tries 0"),
        ("extract", {"schema": {"type": 3}}, "schema"),
    ],
)
def test_options_that_cannot_be_used(verb, options, match):
    with pytest.raises(UsageError, match=match):
        instructions.make(verb, **options)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda x: lora_rlhf.do("rewrite", TEXT, run=x, lenght=3),
            r"'lenght': did you mean length",
        ),
        (lambda x: lora_rlhf.do("rewrite", TEXT, run=x, wanted={}), "do has no option 'wanted'"),
        (lambda x: lora_rlhf.ground("Who?", x, run=x, max_new_tokens=3), "did you mean max_tokens"),
        (lambda x: lora_rlhf.chat(x, temprature=1), "did you mean temperature"),
    ],
)
def test_an_unknown_option_in_python_is_named_before_anything_is_read(call, match):
    with pytest.raises(UsageError, match=match):
        call("no/such/run")


def test_a_long_text_is_refused_or_done_in_parts():
    words = "\n\n".join(f"Paragraph {i} has some words in it." for i in range(12))
    engine = ScriptedEngine(lambda r: "It has words.", context=110)
    with pytest.raises(UsageError, match=r"(?s)the prompt has 9\d tokens .* at most 60"):
        do("summarize", engine, words)
    with pytest.raises(UsageError, match=r"(?s)at most 0: .* less 1,000 .*to do: fewer --tokens$"):
        do("summarize", engine, words, max_tokens=1000)
    with pytest.raises(UsageError, match="no `split: true`"):
        do("rewrite", engine, words, long="split")
    result = do("summarize", engine, words, long="split", length="5 words")
    assert result.parts > 1 and result.passed
    shown = [r.messages[-1]["content"] for r in engine.requests]
    assert all(engine.count_tokens(r.messages) <= 60 for r in engine.requests)
    assert sum(one.count("Paragraph") for one in shown) == 12  # each once, none cut
    assert "at most 5 words" in shown[-1] and "at most 5 words" not in shown[0]
    with pytest.raises(UsageError, match="the parts are not shorter"):
        do("summarize", ScriptedEngine(lambda r: "a " * 49, context=110), words, long="split")


def test_every_call_is_in_the_usage_store(tmp_path):
    path = tmp_path / "u.sqlite"
    do("classify", says("good"), labels="good,bad", usage=path)
    do("rewrite", says("one two"), length="1 word", usage=path)
    with UsageStore(path) as store:
        kept = [(u["kind"], u["completed"], u["valid"], u["version"]) for u in store.uses()]
    assert kept == [("do", True, True, "sha-policy"), ("do", False, None, "sha-policy")]


def test_targets_with_a_model(tmp_path):
    (tmp_path / "run").mkdir()
    assert instructions.split_target(f"{tmp_path}/run:sft") == (f"{tmp_path}/run", "sft")
    assert instructions.split_target(tmp_path / "run") == (f"{tmp_path}/run", "")
    assert instructions.split_target("org/model") == ("org/model", "")


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`lora-rlhf do` on a fake engine; its exit code, stdout and stderr."""
    made = SimpleNamespace(engine=says("one two"))
    monkeypatch.setattr(instructions.InferenceEngine, "load", lambda targets, **_: made.engine)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("Two.")

    def call(*args, **options):
        done = CliRunner().invoke(app.app, ["do", *map(str, args)], **options)
        return done.exit_code, done.stdout, done.stderr

    made.call = call
    return made


def test_the_command(command, tmp_path):
    assert command.call("rewrite", "a.txt", "--with", "run")[:2] == (0, "one two\n")
    code, out, _ = command.call("rewrite", "a.txt", "b.txt", "--with", "run", "--no-usage")
    assert (code, out) == (0, "==> a.txt <==\none two\n\n==> b.txt <==\none two\n")
    code, out, err = command.call("rewrite", "-", "--with", "run", "--json", input="Text.")
    row = json.loads(out)
    assert code == 0 and row["passed"] and len(row["template_sha256"]) == 64 and row["file"] == "-"
    assert command.call("rewrite", "a.txt", "b.txt", "--with", "run", "--out", "new")[0] == 0
    assert (tmp_path / "new" / "b.txt").read_text() == "one two\n"
    assert command.call("rewrite", "a.txt", "--with", "run", "--out", "new")[0] == 2
    assert (tmp_path / "lora-rlhf-usage.sqlite").exists()


def test_no_result_takes_the_place_of_another(command, tmp_path):
    """`a.txt`, `a-3.txt` and `d/a.txt`: two results had one name, and the first was lost."""
    (tmp_path / "d").mkdir()
    files = ["a.txt", "a-3.txt", "d/a.txt"]
    for number, file in enumerate(files):
        (tmp_path / file).write_text(f"Text {number}.")
    assert command.call("rewrite", *files, "--with", "run", "--out", "new")[0] == 0
    assert len([*(tmp_path / "new").iterdir()]) == len(files)


def test_a_failed_check_is_shown_and_gives_exit_code_6(command):
    code, out, err = command.call("rewrite", "a.txt", "--with", "run", "--length", "1 word")
    assert (code, out) == (6, "one two\n")
    assert err.count("a.txt: try") == 3 and "2 words, at most 1 word asked for" in err
    assert "answers that fail a check: 1 of 1, tries: 3" in err


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["rewrite", "a.txt"], "--with"),
        (["rewrite", "none.txt", "--with", "run"], "none.txt"),
        (["rewrit", "a.txt", "--with", "run"], "did you mean rewrite"),
        (["rewrite", "a.txt", "--with", "run", "--long", "cut"], "long"),
    ],
)
def test_what_the_command_refuses(command, args, match):
    code, out, err = command.call(*args)
    assert code in (2, 3) and not out and match in err


def test_moderation_by_the_command(command, monkeypatch, tmp_path):
    monkeypatch.setattr(instructions.Moderation, "load", lambda *_: Gate())
    (tmp_path / "a.txt").write_text("a bad text")
    (tmp_path / "b.txt").write_text("an odd text")
    asked = ("rewrite", "--moderation", "default", "--with", "run", "--no-usage")
    code, out, err = command.call(*asked, "b.txt")
    assert (code, out) == (0, "one two\n") and "b.txt: warning: the prompt is doubtful" in err
    code, out, err = command.call(*asked, "a.txt")
    assert (code, out) == (6, "\n") and "a.txt: moderation: the prompt is blocked" in err


def test_show_prints_a_template_to_copy(command, tmp_path):
    code, out, _ = command.call("--show", "summarize")
    assert code == 0 and out.startswith("---\nabout:")
    (tmp_path / "mine.md").write_text(out.replace("Summarize", "Shorten"))
    command.call("mine", "b.txt", "--template", "mine.md", "--with", "run")
    assert command.engine.requests[0].messages[-1]["content"].startswith("Shorten the text")
