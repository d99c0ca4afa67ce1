# SPDX-License-Identifier: Apache-2.0
"""A chat-completions server as a target."""

import http.server
import json
import threading

import pytest
from huggingface_hub import constants

from lora_rlhf.errors import SetupError, UsageError
from lora_rlhf.evaluation import targets
from lora_rlhf.evaluation.prompt_sets import Row
from lora_rlhf.evaluation.server import KEY, Server, _token_for
from lora_rlhf.evaluation.suite import SetSection, Suite

SUITE = Suite(name="s", seed=4, sets=[SetSection(name="x", format="plain")])
ROWS = [Row("1", "", "one"), Row("2", "", [{"role": "user", "content": "two"}])]


@pytest.fixture
def chat(monkeypatch):
    """A server that repeats the last turn in capitals; `reply` may be replaced."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, asked))
            server.headers.append(self.headers["Authorization"])
            body = server.reply(asked)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    def reply(asked):
        message = {"role": "assistant", "content": asked["messages"][-1]["content"].upper()}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        return json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m",
                           "choices": [choice], "usage": usage}).encode()  # fmt: skip

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.reply, server.seen, server.headers = reply, seen, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def target_of(server):
    [target] = targets.parse([f"http://127.0.0.1:{server.server_port}/v1#m"])
    return target


def test_a_server_answers(chat):
    target = target_of(chat)
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
    target = target_of(chat)
    with pytest.raises(SetupError, match="gave no answer to row 1"):
        Server(target).answer(target, ROWS[:1], SUITE)


def test_a_url_without_a_model_is_refused():
    [target] = targets.parse(["http://127.0.0.1:1/v1"])
    with pytest.raises(UsageError, match="names no model"):
        Server(target)


def test_a_hugging_face_token_goes_to_hugging_face_alone(chat, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 20)
    Server(target_of(chat)).answer(target_of(chat), ROWS[:1], SUITE)
    assert chat.headers[0] == "Bearer none"
    monkeypatch.setenv(KEY, "sk-1")
    Server(target_of(chat)).answer(target_of(chat), ROWS[:1], SUITE)
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
