# SPDX-License-Identifier: Apache-2.0
"""A chat-completions server as a target."""

import pytest

from lora_rlhf.errors import SetupError, UsageError
from lora_rlhf.evaluation.prompt_sets import Row
from lora_rlhf.evaluation.server import KEY, Server, _token_for
from lora_rlhf.evaluation.suite import SetSection, Suite
from lora_rlhf.hub import targets

SUITE = Suite(name="s", seed=4, sets=[SetSection(name="x", format="plain")])
ROWS = [Row("1", "", "one"), Row("2", "", [{"role": "user", "content": "two"}])]


def test_a_server_answers(chat):
    target = chat.target()
    assert (target.name, target.kind) == ("m", "url")
    made = Server(target)
    answers = made.answer(target, ROWS, SUITE)
    assert [(a.text, a.tokens, a.finished) for a in answers] == [("ONE", 3, True), ("TWO", 3, True)]
    path, asked = chat.seen[0]
    assert path == "/v1/chat/completions" and asked["model"] == "m" and asked["seed"] == 4
    assert asked["max_tokens"] == 128 and asked["temperature"] == 0
    assert made.measure(target, ROWS, SUITE).tokens_per_second > 0


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"choices": []}', b"<html>"])
def test_nonsense_is_one_error(chat, body):
    chat.reply = lambda asked: body
    target = chat.target()
    with pytest.raises(SetupError, match="gave no answer to row 1"):
        Server(target).answer(target, ROWS[:1], SUITE)


def test_rows_without_an_answer_lose_no_other(chat):
    rows = [Row(str(i), "", f"row {i}") for i in range(12)]
    known, saved, echo = {}, [], chat.reply
    chat.reply = lambda asked: b"{}" if "row 3" in str(asked) else echo(asked)
    target = chat.target()

    def ask():
        return Server(target).answer(target, rows, SUITE, known, lambda: saved.append(len(known)))

    with pytest.raises(SetupError, match=r"no answer to row 3: .*; 1 of 12 rows have no answer"):
        ask()
    assert saved == [7, 11], "the rows after it were asked"
    chat.reply, before = echo, len(chat.seen)
    assert [answer.text for answer in ask()] == [f"ROW {i}" for i in range(12)]
    assert len(chat.seen) - before == 1, "only the missing row"


def test_a_server_that_is_gone_is_asked_once_for_a_few_rows(chat):
    chat.reply, target = lambda asked: b"{}", chat.target()
    rows = [Row(str(i), "", f"row {i}") for i in range(40)]
    with pytest.raises(SetupError, match="40 of 40 rows have no answer"):
        Server(target).answer(target, rows, SUITE)
    assert len(chat.seen) == 8


def test_a_url_without_a_model_is_refused():
    [target] = targets.parse(["http://127.0.0.1:1/v1"])
    with pytest.raises(UsageError, match="names no model"):
        Server(target)


def test_a_hugging_face_token_goes_to_hugging_face_alone(chat, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 20)
    Server(chat.target()).answer(chat.target(), ROWS[:1], SUITE)
    assert chat.headers[0] == "Bearer none"
    monkeypatch.setenv(KEY, "sk-1")
    Server(chat.target()).answer(chat.target(), ROWS[:1], SUITE)
    assert chat.headers[1] == "Bearer sk-1"
    for url, sent in (
        ("https://router.huggingface.co/v1", True),
        ("https://x.endpoints.huggingface.cloud/v1", True),
        ("http://router.huggingface.co/v1", False),
        ("https://huggingface.co.example.com/v1", False),
        ("https://huggingface.co:80@example.com/v1", False),
        ("https://xhuggingface.co/v1", False),
    ):
        assert (_token_for(url) is None) == sent, url
