# SPDX-License-Identifier: Apache-2.0
"""A conversation: turns, commands, stops, judgements; over a pipe and in a pseudo-terminal."""

import contextlib
import gc
import io
import json
import os
import pty
import select
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from scripted_engine import ScriptedEngine

from lora_rlhf.errors import UsageError
from lora_rlhf.serving import chat_terminal
from lora_rlhf.serving.chat import Chat, level
from lora_rlhf.serving.grounding import Grounding
from lora_rlhf.serving.inference import Stream
from lora_rlhf.serving.moderation import Blocked, Decision
from lora_rlhf.serving.usage_store import UsageStore

SCHEMA = {"type": "object", "required": ["a"]}


@pytest.fixture
def talk():
    return Chat(ScriptedEngine())


def typed(chat, *lines, **console):
    """What a conversation of these lines writes: answers, and notes."""
    out, notes, given = io.StringIO(), io.StringIO(), iter(lines)

    def ask(prompt, text):
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    options = {"highlight": False, "width": 80, "no_color": True, **console}
    terminal = chat_terminal.Terminal(
        chat, ask, Console(file=out, **options), Console(file=notes, **options)
    )
    return terminal.talk(), out.getvalue(), notes.getvalue()


def test_turns_follow_each_other(talk):
    assert str(talk.ask("one")) == "policy says: one (0)"
    assert talk.ask("two").seed == 1
    assert [turn["content"] for turn in talk.engine.requests[1].messages] == [
        "one", "policy says: one (0)", "two",
    ]  # fmt: skip
    assert [turn["role"] for turn in talk.history] == ["user", "assistant"] * 2


def test_retry_and_edit_replace_the_last_answer(talk):
    talk.ask("one")
    list(talk.retry())
    assert [answer.text for _, answer in talk.exchanges] == ["policy says: one (1)"]
    list(talk.edit("two"))
    assert [question for question, _ in talk.exchanges] == ["two"]
    with pytest.raises(UsageError, match="empty"):
        list(talk.edit(" "))
    assert [question for question, _ in talk.exchanges] == ["two"]  # kept


def test_a_closed_stream_keeps_and_marks_what_came(talk):
    stream = talk.stream("one")
    assert next(stream) == "policy"
    stream.close()
    assert (talk.last.text, talk.last.mark) == ("policy", "stopped")
    talk.ask("two")
    assert talk.engine.requests[1].messages[1]["content"] == "policy"


def test_nothing_is_kept_of_an_answer_stopped_before_its_first_word(talk, monkeypatch):
    def stopped(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("scripted_engine.time.sleep", stopped)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("one")
    assert talk.history == [] and talk.last_question == "one"


def test_a_refused_request_is_one_error(monkeypatch):
    noise = []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)

    def refuse(put):
        raise UsageError("too long")

    with pytest.raises(UsageError, match="too long"):
        Stream(refuse)
    gc.collect()
    assert noise == []


def test_compare_leaves_the_conversation_as_it_was(talk):
    talk.ask("one")
    answers = talk.compare()
    assert [answer.model for answer in answers] == ["base", "sft", "policy", "best-of-n"]
    assert {len(r.messages) for r in talk.engine.requests[1:]} == {1}  # without the old answer
    assert answers[0].kl[1] == ("t1 ", 1.0) and answers[0].reward == 4
    assert len(talk.exchanges) == 1
    talk.compare("two")
    assert len(talk.engine.requests[-1].messages) == 3
    assert "title=" in answers._repr_html_() and "<table>" in answers._repr_html_()
    talk.set_temperature(0)
    assert "best-of-n" not in [answer.model for answer in talk.compare()]


def test_thumbs_and_requests_are_in_the_usage_store(talk, tmp_path):
    with UsageStore(tmp_path / "u.sqlite") as store:
        talk.usage = store
        talk.ask("one")
        talk.good()
        talk.bad("too short")
        [task] = store.tasks()
        assert (task["comment"], task["answer"]) == ("too short", "policy says: one (0)")
        assert task["messages"] == [{"role": "user", "content": "one"}]
        stream = talk.stream("two")
        next(stream)
        stream.close()
        assert [(u["status"], u["version"]) for u in store.uses()] == [
            (200, "sha-policy"), (499, "sha-policy"),
        ]  # fmt: skip
    talk.usage = None
    with pytest.raises(UsageError, match="no usage store"):
        talk.good()


def test_json_answers_are_checked(talk):
    talk.set_schema(SCHEMA)
    assert "not JSON" in talk.ask("one").problem
    assert talk.engine.requests[0].constraint.value == SCHEMA
    talk.engine.say = lambda request: '{"a": 1}'
    assert talk.ask("two").problem == ""
    with pytest.raises(UsageError, match="schema"):
        talk.set_schema({"type": 3})


class Gate:
    """A moderation that blocks a word, and lets text through sentence by sentence."""

    def check(self, text, where, prompt=""):
        action = "block" if "bad" in text else "warn" if "odd" in text else "allow"
        return Decision(action, "rude", 0.9, 0.5, "words")

    def gate(self, prompt):
        held = []

        def feed(delta):
            held.append(delta)
            text = "".join(held)
            if "bad" in text:
                raise Blocked(self.check(text, "answer"))
            if not text.endswith("."):
                return ""
            held.clear()
            return text

        return SimpleNamespace(feed=feed, finish=lambda: "".join(held))


def test_moderation_of_prompt_history_and_answer():
    talk = Chat(ScriptedEngine(lambda request: "Fine. This is bad now."), moderation=Gate())
    assert list(talk.stream("one")) == ["Fine."]
    assert (talk.last.text, talk.last.mark) == ("Fine.", "blocked: rude")
    list(talk.stream("odd"))
    assert "warning on the prompt: rude" in talk.last.facts
    with pytest.raises(UsageError, match="the prompt is blocked: rude"):
        talk.ask("bad")
    talk.exchanges = [("bad", talk.last)]
    with pytest.raises(UsageError, match="the history is blocked"):
        talk.ask("two")
    assert {answer.mark for answer in Chat(talk.engine, moderation=Gate()).compare("x")} == {
        "blocked: rude"
    }


def test_a_notebook_shows_the_answer_as_it_comes(talk, monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda body: shown.append(body))
    display = SimpleNamespace(
        HTML=str, display=lambda body, display_id: shown.append(body) or handle
    )
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1), display=display)
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    answer = talk.ask("<b>")
    assert [body.count("policy says") for body in shown] == [0, 1, 1, 1]
    assert "&lt;b&gt;" in shown[-1]
    assert "says" not in answer._repr_html_() and "says" in answer._repr_html_()
    assert "<small>policy · 4 tokens" in talk._repr_html_()


def test_grounding_sees_the_question_and_ends_the_answer():
    seam = SimpleNamespace(
        knows=lambda question: question != "xyzzy?",
        prompt=lambda question: f"PASSAGES {question}",
        finish=lambda question, answer: f"{answer} [1]",
    )
    talk = Chat(ScriptedEngine(lambda request: "yes"), grounding=seam)
    assert list(talk.stream("who?")) == ["yes [1]"]
    assert talk.engine.requests[0].messages[-1]["content"] == "PASSAGES who?"
    assert talk.history[0]["content"] == "who?"


def test_without_a_passage_no_model_is_asked(tmp_path):
    (tmp_path / "a.txt").write_text("The boiler is in the cellar.")
    talk = Chat(ScriptedEngine(), grounding=Grounding.open(tmp_path))
    assert talk.ask("xyzzy?").text == "The sources do not say."
    first, second = talk.last.id, talk.ask("xyzzy?").id
    assert first and second and first != second  # by which thumbs are kept apart
    assert not talk.engine.requests and talk.history[-1]["content"] == "The sources do not say."
    assert "[unsupported]" in talk.ask("the boiler?").text, "it goes on"
    assert talk.grounding.finish("xyzzy?", "It is in the hall.") == "The sources do not say."


def test_a_blocked_question_is_a_row_of_the_usage(tmp_path):
    """`usage` said that nothing was blocked, whatever the policy had refused."""
    refuse = SimpleNamespace(check=lambda text, where: Decision("block", "rude", 1.0))
    with UsageStore(tmp_path / "u.sqlite") as store:
        talk = Chat(ScriptedEngine(), usage=store, moderation=refuse)
        for _ in range(2):
            with pytest.raises(UsageError, match="blocked"):
                talk.ask("you fool")
        with pytest.raises(UsageError, match="blocked"):
            talk.compare("you fool")  # answers of /compare are no rows either
        uses = store.uses()
    assert [(use["blocked"], use["kind"], use["completion_tokens"]) for use in uses] == [
        (True, "chat", 0)
    ] * 2
    assert not talk.exchanges


def test_save(talk, tmp_path):
    talk.system = "Be kind."
    talk.ask("one")
    talk.save(tmp_path / "a.jsonl")
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
    talk.save(tmp_path / "a.md")
    for name, match in (("a.md", "exists"), ("a.txt", "ends in"), ("no/a.md", "cannot be written")):
        with pytest.raises(UsageError, match=match):
            talk.save(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_model", "polcy"), ("set_seed", -1), ("set_temperature", float("nan")),
     ("set_tokens", 0), ("set_tokens", 1000)],
)  # fmt: skip
def test_settings_out_of_range(talk, name, value):
    with pytest.raises(UsageError):
        getattr(talk, name)(value)


def test_levels_of_colour():
    assert [level(kl) for kl in (0, 0.1, 0.6, 1, 9)] == [0, 1, 2, 3, 4]


# --- by lines ------------------------------------------------------------------------------------


def test_commands_over_a_pipe(talk, tmp_path):
    path = tmp_path / "c.jsonl"
    refused, out, notes = typed(
        talk, "hi", "/model sft", "/retry", "/edit ho", "/system Be kind.", "/seed 7", "",
        "/temperature 0.5", "/tokens 9", '"""', "a", "b", '"""', f"/save {path}", "//x",
        "/template",
    )  # fmt: skip
    assert refused == 0, notes
    assert out.splitlines() == [
        "policy says: hi (0)", "sft says: hi (1)", "sft says: ho (2)", "sft says: a", "b (7)",
        "sft says: /x (8)",
        "<system>Be kind.<user>ho<assistant>sft says: ho (2)<user>a", "b<assistant>sft says: a",
        "b (7)<user>/x",
    ]  # fmt: skip
    assert "sft · 5 tokens · 0.2 s · seed 7 · reward 5.00" in notes
    assert path.exists() and "\x1b" not in out + notes


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("/modle", "unknown command /modle: did you mean /model?"),
        ("/zzz", "/help lists them"),
        ("/_do x", "unknown command /_do"),
        ("/seed x", "/seed x"),
        ("/seed 1.5", "a number"),
        ("/tokens inf", "a number"),
        ("/retry", "no question yet"),
        ("/edit x", "no question yet"),
        ("/good", "no usage store"),
        ("/save", "/save needs a file"),
        ("/format none.json", "cannot be read"),
        ("/model polcy", "did you mean policy?"),
    ],
)
def test_a_refused_line_is_one_note_and_the_chat_goes_on(talk, line, note):
    refused, out, notes = typed(talk, line, "hi")
    assert note in notes and refused == 1
    assert "policy says: hi" in out


def test_edit_without_its_text_takes_no_other_line_of_a_pipe(talk):
    refused, out, notes = typed(talk, "hi", "/edit", "/model sft", "ho")
    assert refused == 1 and "/edit needs the changed question" in notes
    assert out.splitlines() == ["policy says: hi (0)", "sft says: ho (1)"]


def test_every_command_has_its_method_and_help(talk):
    methods = {n[5:] for n in dir(chat_terminal.Terminal) if n.startswith("_cmd_")}
    assert methods == set(chat_terminal.COMMANDS)
    _, out, _ = typed(talk, "/help")
    assert all(f"/{name}" in out for name in methods)


def test_escape_codes_of_a_model_do_nothing():
    talk = Chat(ScriptedEngine(lambda request: "\x1b[2J\x1b]0;x\x07 done\u202e"))
    _, out, notes = typed(talk, "hi", "/compare")
    assert "\\x1b[2J" in out and not {"\x1b", "\x07", "\u202e"} & set(out + notes)


def test_the_history_that_does_not_fit_is_named_once():
    talk = Chat(ScriptedEngine(context=60))
    _, _, notes = typed(talk, *["a b c d e f g"] * 4)
    assert notes.count("longer than the context of 60 tokens") == 1


def test_comparison_side_by_side_or_one_by_one(talk):
    wide = typed(talk, "/compare hi", force_terminal=True, width=120, no_color=False,
                 color_system="truecolor")[1]  # fmt: skip
    assert "╭" in wide and "\x1b[48;2;" in wide and "KL to SFT" in wide
    narrow = typed(talk, "/compare hi", force_terminal=True, width=40)[1]
    assert "╭" not in narrow and max(map(len, narrow.splitlines())) < 90
    piped = typed(talk, "/compare hi")[1]
    assert "[policy]" in piped and "KL 1.500 a token · most at 't3' (3.00)" in piped


# --- in a pseudo-terminal ------------------------------------------------------------------------


class Screen:
    """A conversation in a child on a terminal of its own."""

    def __init__(self, pause=0.0, editor=True):
        self.seen = ""
        self.child, self.file = pty.fork()
        if self.child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                sys.stdin, sys.stdout, sys.stderr = (
                    open(number, mode, closefd=False)
                    for number, mode in ((0, "r"), (1, "w"), (2, "w"))
                )
                if not editor:
                    sys.modules["prompt_toolkit"] = None
                chat_terminal.run(Chat(ScriptedEngine(pause=pause)))
                code = 0
            os._exit(code)

    def until(self, text, seconds=60, pressing=""):
        """Read on until a text is on the screen, pressing a key every two seconds."""
        end, press = time.monotonic() + seconds, time.monotonic()
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if pressing and time.monotonic() >= press:
                self.type(pressing)
                press = time.monotonic() + 2
            if select.select([self.file], [], [], 0.1)[0]:
                self.seen += os.read(self.file, 4096).decode()
                if "\x1b[6n" in self.seen:  # prompt_toolkit asks where the cursor is
                    self.seen = self.seen.replace("\x1b[6n", "")
                    os.write(self.file, b"\x1b[1;1R")
        before, self.seen = self.seen, self.seen.partition(text)[2]
        return before

    def type(self, text):
        os.write(self.file, text.encode())

    def end(self):
        self.type("\x04")
        with contextlib.suppress(OSError):  # the terminal is gone with the child
            while os.read(self.file, 4096):
                pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        os.close(self.file)
        return code


@pytest.mark.parametrize("editor", [True, False], ids=["prompt_toolkit", "readline"])
def test_arrow_keys_and_ctrl_d(editor):
    if editor:
        pytest.importorskip("prompt_toolkit")
    screen = Screen(editor=editor)
    screen.until("policy>")
    screen.type("first\r")
    screen.until("says: first (0)")
    screen.until("policy>")
    screen.type("\x1b[A")
    screen.until("first")
    screen.type("\r")
    screen.until("says: first (1)")
    screen.until("policy>")
    assert screen.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program():
    screen = Screen(pause=0.2, editor=False)
    for _ in range(2):
        screen.until("policy>")
        screen.type("one two three four five six seven eight nine\r")
        screen.until("says:")
        screen.type("\x03")
        screen.until("stopped)")
    screen.until("policy>")
    screen.type("half a line")
    screen.until("half a line")
    # CPython's readline loses a Ctrl-C that comes while it reads a key, until the next key.
    screen.until("Ctrl-D or /quit ends the chat", pressing="\x03")
    screen.until("policy>")
    assert screen.end() == 0


def test_clear_drops_what_the_engine_kept(talk):
    dropped = []
    talk.engine.forget = lambda: dropped.append(True)
    typed(talk, "Hello", "/clear")
    assert dropped == [True]
