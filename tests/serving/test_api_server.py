# SPDX-License-Identifier: Apache-2.0
"""The chat-completions API: its official client, its limits, who may use it, and how it ends."""

import asyncio
import json
import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import httpx
import killed
import pytest
from fake_engine import FakeEngine

from lora_rlhf.errors import INTERRUPTED, UsageError
from lora_rlhf.runtime import interrupts
from lora_rlhf.serving import api_server
from lora_rlhf.serving.api_server import Access, ApiServer, Limits, _Kept
from lora_rlhf.serving.inference import QueueFull
from lora_rlhf.serving.moderation import Blocked, Decision, Moderation
from lora_rlhf.serving.usage_store import UsageStore

KEY = "k" * 20
HELLO = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def serve(tmp_path):
    """A function that starts a server; `made` are its parts."""
    import openai  # half a second of one worker, not of both

    running = []

    def start(pause=0.0, moderation=None, **limits):
        store = UsageStore(tmp_path / "usage.sqlite").open(create=True)
        engine, notes = FakeEngine(pause), []
        bounds = Limits(**{"drain": 5.0, **limits})
        server = ApiServer(
            engine, Access(key=KEY), bounds, store=store, moderation=moderation, say=notes.append
        )
        server.start()
        running.append(server)
        web = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"})
        client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        return SimpleNamespace(
            server=server, engine=engine, web=web, chat=client.chat.completions, client=client,
            notes=notes, path=store.path,
        )  # fmt: skip

    yield start
    for server in running:
        server.stop()


def uses(made):
    """What the store has once the server has ended."""
    made.server.stop()
    with UsageStore(made.path).open(readonly=True) as store:
        return store.uses()


def error(made, **body):
    answer = made.web.post("/chat/completions", json={"messages": HELLO, **body})
    return answer.status_code, answer.json()["error"]


def test_the_official_client_gets_an_answer(serve):
    made = serve()
    given = made.chat.create(
        model="policy", messages=HELLO, n=2, logprobs=True, top_logprobs=1, seed=3, stop="x"
    )
    assert [c.message.content for c in given.choices] == ["one two three"] * 2
    assert (
        given.choices[0].finish_reason == "stop" and given.system_fingerprint == "fp_abababababab"
    )
    token = given.choices[1].logprobs.content[0]
    assert (token.token, token.logprob, token.bytes) == ("one", -9999.0, [111, 110, 101])
    assert token.top_logprobs[0].token == "x" and given.choices[0].reward == 0.5
    assert (given.usage.prompt_tokens, given.usage.completion_tokens) == (3, 6)
    assert [m.id for m in made.client.models.list()] == ["base", "policy"]
    assert made.client.models.retrieve("policy").adapter_sha256 == "ab" * 32
    request = made.engine.requests[0]
    assert (request.n, request.logprobs, request.seed, request.stop) == (2, 1, 3, ("x",))
    [use] = uses(made)
    assert (use["model"], use["version"], use["status"]) == ("policy", "ab" * 32, 200)
    assert use["completion_tokens"] == 6 and use["seconds"] > 0 and use["first_token_s"] == 0.002


def test_the_official_client_streams(serve):
    made = serve()
    options = {"include_usage": True}
    chunks = [*made.chat.create(model="", messages=HELLO, stream=True, stream_options=options)]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "one two three " and chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.total_tokens == 6 and {c.id for c in chunks} == {chunks[0].id}
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    two = made.chat.create(
        model="", messages=[{"role": "user", "content": parts}], n=2, stream=True
    )
    texts = {0: "", 1: ""}
    for chunk in two:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "a b ", 1: "a b "}


def test_streamed_logprobs_come_with_their_text(serve):
    made = serve()
    chunks = [*made.chat.create(model="", messages=HELLO, stream=True, logprobs=True)]
    pieces = [(c.choices[0].delta.content, c.choices[0].logprobs) for c in chunks]
    told = [
        (text, logprobs and [one.token for one in logprobs.content]) for text, logprobs in pieces
    ]
    one_by_one = [(f"{word} ", [word]) for word in ("one", "two", "three")]
    assert told == [("", None), *one_by_one, (None, ["<end>"])]


def test_streamed_logprobs_wait_for_moderation_as_their_text_does(serve):
    def check(text, where, prompt=""):
        return Decision("block" if where == "answer" and "secret" in text else "allow")

    moderation = SimpleNamespace(check=check)
    moderation.gate = lambda prompt: Moderation.gate(moderation, prompt)
    made = serve(moderation=moderation)
    text = "Not so good. And this is a secret thing."
    messages = [{"role": "user", "content": text}]
    shown, tokens = "", []
    for chunk in made.chat.create(model="", messages=messages, stream=True, logprobs=True):
        shown += chunk.choices[0].delta.content or ""
        logprobs = chunk.choices[0].logprobs
        tokens += [one.token for one in logprobs.content] if logprobs else []
        assert tokens == shown.split()
    assert shown == "Not so good. "


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
         "json_schema"),
        ({"structured_outputs": {"regex": "a+"}}, "regex"),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, "json_schema"),
        ({"guided_choice": ["a", "b"]}, "choice"),
        ({"guided_grammar": 'start: "a"'}, "grammar"),
    ],
)  # fmt: skip
def test_constraints_reach_the_engine(serve, body, kind):
    made = serve()
    extra = {**body, "best_of": 2, "scored": True}
    answer = made.chat.create(model="", messages=HELLO, extra_body=extra)
    request = made.engine.requests[0]
    assert (request.constraint.kind, request.best_of, request.scored) == (kind, 2, True)
    assert answer.choices[0].valid is True and uses(made)[0]["valid"] is True


@pytest.mark.parametrize(
    ("body", "status", "code", "text"),
    [
        ({"model": "gpt"}, 404, "model_not_found", "there are: base, policy"),
        ({"tempratur": 1}, 400, "unknown_parameter", "'tempratur'"),
        ({"temperature": 9}, 400, "invalid_value", "temperature: Input should be less"),
        ({"temperature": "1"}, 400, "invalid_value", "temperature"),
        ({"n": True}, 400, "invalid_value", "n:"),
        ({"frequency_penalty": 0.5}, 400, "invalid_value", "not supported here, other than as 0"),
        ({"tools": [{}]}, 400, "invalid_value", "not supported"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
         "invalid_value", "messages.0.content: a part of type 'image_url': this server takes text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_value", "not end"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "invalid_value", "differ"),
        ({"top_logprobs": 2}, 400, "invalid_value", "needs logprobs"),
        ({"max_tokens": 101}, 400, "invalid_value", "this server gives 100"),
        ({"max_tokens": 98}, 400, "context_length_exceeded", "context has 100 tokens"),
        ({"messages": [{"role": "user", "content": "x " * 31}]}, 413, "prompt_too_large", "has 31"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "invalid_value", "several"),
        ({"guided_json": "{"}, 400, "invalid_value", "not JSON"),
        ({"response_format": {"type": "json_schema"}}, 400, "invalid_value", "no json_schema"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_error(serve, body, status, code, text):
    made = serve(prompt=30)
    got, problem = error(made, **body)
    assert (got, problem["code"]) == (status, code) and text in problem["message"]
    assert problem["type"] == "invalid_request_error" and not made.engine.requests


def test_null_is_as_not_given_and_a_message_of_the_client_goes_back(serve):
    made = serve()
    first = made.chat.create(model="", messages=HELLO, max_tokens=None, temperature=None)
    turns = [*HELLO, first.choices[0].message, {"role": "user", "content": "more"}]
    assert made.chat.create(model="", messages=turns).choices[0].message.content == "more"
    assert made.engine.requests[1].messages[1] == {"role": "assistant", "content": "one two three"}


def test_bodies_are_bounded_and_say_that_they_are_json(serve):
    made = serve(body=500)
    post, url = made.web.post, "/chat/completions"
    assert post(url, content=b"x" * 501, headers={"content-type": "text/plain"}).status_code == 415
    json_type = {"content-type": "application/json"}
    assert post(url, content=b"x" * 501, headers=json_type).status_code == 413
    stream = iter([b"x" * 300, b"x" * 300])
    assert post(url, content=stream, headers=json_type).status_code == 413
    assert post(url, content=b"{", headers=json_type).json()["error"]["code"] == "invalid_json"
    assert post(url, content=b"[" * 400, headers=json_type).status_code == 400
    listed = post(url, content=b"[]", headers=json_type).json()["error"]["message"]
    assert listed == "the body is not a JSON object"
    half = rb'{"messages": [{"role": "user", "content": "a \ud800"}]}'
    assert post(url, content=half, headers=json_type).json()["error"]["code"] == "invalid_json"
    assert made.web.get("/nothing").json()["error"]["message"] == "there is no /v1/nothing"
    assert made.web.get(url).json()["error"]["message"] == "GET does nothing here"


def test_the_key_and_the_name_of_the_server(serve):
    made = serve()
    port = made.server.port
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": KEY}):
        answer = httpx.get(f"{made.server.url}/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{made.server.address}metrics").status_code == 401
    assert httpx.get(f"{made.server.address}health").json() == {"status": "ok"}
    for host in (f"evil.example:{port}", "127.0.0.1:1", ""):  # a name that was made to point here
        assert made.web.get("/models", headers={"host": host}).status_code == 403
    preflight = made.web.options("/chat/completions", headers={"origin": "http://evil.example"})
    allowed = [name for name in preflight.headers if name.startswith("access-control")]
    assert preflight.status_code == 405 and not allowed
    assert made.web.get("/models").headers["cache-control"] == "no-store"


def test_other_machines_are_let_in_with_a_key_of_ones_own_only(monkeypatch):
    monkeypatch.delenv("LORA_RLHF_API_KEY", raising=False)
    with pytest.raises(UsageError, match="there is no key"):
        Access("0.0.0.0")
    with pytest.raises(UsageError, match="has 3 characters"):
        Access(key="abc")
    assert len(Access().key) >= 43 and Access().key != Access().key
    monkeypatch.setenv("LORA_RLHF_API_KEY", KEY)
    assert Access("0.0.0.0").key == KEY and KEY not in repr(Access())


def later(call, *args, **options):
    """The result of a call in a thread, in a list."""
    got = []
    thread = threading.Thread(target=lambda: got.append(call(*args, **options)), daemon=True)
    thread.start()
    return thread, got


def wait(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_is_429(serve):
    made, full = serve(queue=1), threading.Event()
    made.engine.held = lambda told: not full.is_set()
    thread, got = later(made.web.post, "/chat/completions", json={"messages": HELLO}, timeout=60)
    wait(lambda: made.engine.requests)
    answer = made.web.post("/chat/completions", json={"messages": HELLO})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    full.set()
    thread.join()
    assert got[0].status_code == 200
    assert [use["status"] for use in uses(made)] == [429, 200]


def test_a_slow_answer_is_503(serve):
    from openai import APIError

    made = serve(seconds=0.1)
    made.engine.held = lambda told: True
    status, problem = error(made)
    assert (status, problem["code"]) == (503, "timeout")
    assert made.engine.cancelled.wait(60)
    with pytest.raises(APIError, match=r"took over 0.1 s"):
        list(made.chat.create(model="", messages=HELLO, stream=True))
    assert [use["status"] for use in uses(made)] == [503, 503]


def test_a_request_that_is_refused_counts_for_the_model_asked_for(serve):
    made = serve()
    bodies = [{"model": "base", "n": "x"}, {"model": "gpt"}, {"n": 0}, [1]]
    for queue in (64, 0):
        made.server.api.limits = Limits(queue=queue)
        for body in bodies:
            made.web.post("/chat/completions", json=body)
    kept = sorted((use["status"], use["model"]) for use in uses(made))
    assert kept == [(status, n) for status in (400, 429) for n in ("", "", "base", "policy")]


def test_uses_that_the_store_cannot_take_are_counted_and_told(serve, monkeypatch):
    monkeypatch.setattr(api_server, "_UNWRITTEN", 2)
    made, hangs = serve(), threading.Event()
    record = made.server.api.store.record
    monkeypatch.setattr(made.server.api.store, "record", lambda use: hangs.wait(30) and record(use))
    for _ in range(5):
        made.chat.create(model="", messages=HELLO)
    url = f"{made.server.address}metrics"
    wait(lambda: "lora_rlhf_unrecorded_total 3.0" in made.web.get(url).text)
    hangs.set()
    assert len(uses(made)) == 2
    assert made.notes == [
        "the usage store is behind by 2 requests, and misses some",
        "requests that the usage store misses: 3",
    ]


def test_an_engine_that_is_full_is_429(serve):
    made = serve()

    def submit(*_):
        raise QueueFull("64 requests wait")

    made.engine.submit = submit
    status, problem = error(made)
    assert (status, problem["code"]) == (429, "queue_full")


def test_a_client_that_does_not_read_holds_no_place(monkeypatch):
    monkeypatch.setattr(api_server, "_BODY_SECONDS", 0.05)
    api, body = api_server.Api(FakeEngine(), Limits(seconds=0.05)), {"messages": HELLO}
    parts = [json.dumps({**body, "stream": True}).encode()]

    async def receive():
        if not parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": parts.pop(), "more_body": False}

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
    asyncio.run(asyncio.wait_for(api_server._Endpoint(api)(scope, receive, send), 5))
    assert api.active == 0
    api.close()


def test_a_server_that_ended_keeps_nothing_of_its_requests(serve):
    made = serve()
    made.server.api.draining = True
    assert error(made)[0] == 503
    kept = [one for one in vars(api_server).values() if isinstance(one, Exception)]
    assert not [one for one in kept if one.__traceback__ is not None]


def test_empty_texts_fill_the_memory_of_answers_too(serve):
    api = serve().server.api
    for number in range(200):
        api.keep(str(number), _Kept(api.engine.models["base"], [{"content": ""}] * 1000, []))
    assert len(api._kept) < 50


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_stops_its_generation(serve, stream):
    made = serve()
    made.engine.held = lambda told: len(told) == stream  # after the first word of a stream
    body = {"messages": HELLO, "stream": stream}
    if stream:
        with made.web.stream("POST", "/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            made.web.post("/chat/completions", json=body, timeout=0.2)
    assert made.engine.cancelled.wait(60)
    wait(lambda: not made.server.api.active)
    assert [use["status"] for use in uses(made)] == [499]


def test_an_error_of_the_engine_shows_no_text(serve):
    made = serve()
    status, problem = error(made, messages=[{"role": "user", "content": "fail now"}])
    assert (status, problem["message"]) == (500, "the model failed")
    assert re.fullmatch(r"unexpected RuntimeError at fake_engine.py:\d+", made.notes[0])


def test_a_thumb_names_one_of_several_answers(serve):
    made = serve()
    made.engine.texts = ["red", "blue", "green"]
    given = made.chat.create(model="", messages=HELLO, n=3)
    assert [choice.message.content for choice in given.choices] == made.engine.texts
    thumb = {"completion_id": given.id, "thumb": "down"}
    for wrong in ({}, {"choice": 3}, {"choice": -1}, {"choice": "1"}):
        answer = made.web.post("/feedback", json={**thumb, **wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "choice")
    assert "0 to 2" in made.web.post("/feedback", json=thumb).json()["error"]["message"]
    for choice, way in ((0, "up"), (2, "down"), (1, "down"), (1, "up")):
        body = {**thumb, "choice": choice, "thumb": way}
        assert made.web.post("/feedback", json=body).json()["choice"] == choice
    made.server.stop()
    with UsageStore(made.path).open(readonly=True) as store:
        [use], tasks = store.uses(), store.tasks()
    assert use["thumbs"] == {0: True, 1: True, 2: False}
    assert [(task["answer"], task["choice"]) for task in tasks] == [("green", 2)]


def test_thumbs_keep_the_text_that_they_are_about(serve):
    made = serve()
    given = made.chat.create(model="", messages=HELLO)
    thumb = {"completion_id": given.id, "thumb": "down", "comment": "no"}
    assert made.web.post("/feedback", json=thumb).json()["text_stored"] is True
    for wrong, status in (
        ({"completion_id": "x"}, 404), ({"thumb": "sideways"}, 400), ({"choice": 1}, 400),
        ({"comment": "x" * 5001}, 400),
    ):  # fmt: skip
        assert made.web.post("/feedback", json={**thumb, **wrong}).status_code == status
    made.server.api._kept.clear()  # as newer ones do
    wrong = {"choice": 10**30}
    assert made.web.post("/feedback", json={**thumb, **wrong}).status_code == 400
    text = httpx.get(f"{made.server.address}metrics", headers=made.web.headers).text
    assert 'lora_rlhf_thumbs_total{model="policy",thumb="down"} 1.0' in text
    assert 'lora_rlhf_requests_total{model="policy",status="200"} 1.0' in text
    assert "lora_rlhf_total_seconds_bucket" in text
    made.server.stop()
    with UsageStore(made.path).open(readonly=True) as store:
        [task] = store.tasks()
    assert (task["messages"], task["answer"], task["version"]) == (
        HELLO,
        "one two three",
        "ab" * 32,
    )


class Blocks:
    """Moderation that blocks what holds `bad`, and passes a text word by word."""

    def check(self, text, where, prompt=""):
        return SimpleNamespace(action="block" if "bad" in text else "allow")

    def gate(self, prompt):
        class Gate:
            def feed(self, delta):
                if "bad" in delta:
                    raise Blocked(Decision("block", "test"))
                return delta

            def finish(self):
                return ""

        return Gate()


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_prompt_or_answer_is_filtered_and_counted(serve, stream):
    made = serve(moderation=Blocks())

    def ask(*texts):
        turns = [{"role": "user", "content": text} for text in texts]
        answer = made.chat.create(model="", messages=turns, stream=stream, logprobs=True)
        if not stream:
            return answer.choices[0].message.content, answer.choices[0].finish_reason
        chunks = [*answer]
        return "".join(c.choices[0].delta.content or "" for c in chunks), (
            chunks[-1].choices[0].finish_reason
        )

    assert ask("a bad thing") == ask("bad", "good") == ("", "content_filter")
    assert not made.engine.requests
    made.engine.count_tokens = lambda messages: 1
    made.server.api.moderation.check = lambda text, where, prompt="": SimpleNamespace(
        action="block" if where == "answer" and "bad" in text else "allow"
    )
    assert ask("good bad secret") == ("good " if stream else "", "content_filter")
    assert [use["blocked"] for use in uses(made)] == [True] * 3


# ------------------------------------------------------------------------------- the end


def served(go, ready):
    """A server in a process of its own, until a signal; its answers wait for the file `go`."""
    engine = FakeEngine()

    def held(told):
        if not told:
            os.write(ready, b"asked\n")
        while not go.exists():
            time.sleep(0.01)

    engine.held = held
    server = ApiServer(engine, Access(key=KEY), Limits(drain=60.0))
    os.write(ready, f"{server.url}\n".encode())
    try:
        server.run()
    except interrupts.Interrupted as error:
        return INTERRUPTED[str(error)]


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_lets_running_requests_end(tmp_path, signals):
    read, write = os.pipe()
    child = killed.start(served, tmp_path / "go", write)
    os.close(write)
    lines = os.fdopen(read)
    web = httpx.Client(base_url=lines.readline().strip(), timeout=60)
    web.headers["authorization"] = f"Bearer {KEY}"
    health = str(web.base_url).replace("/v1/", "/health")

    def post():
        try:
            return web.post("/chat/completions", json={"messages": HELLO}).status_code
        except httpx.HTTPError:
            return "cut"

    thread, got = later(post)
    assert lines.readline() == "asked\n"
    os.kill(child, signal.SIGTERM)
    wait(lambda: httpx.get(health).status_code == 503)
    answer = web.post("/chat/completions", json={"messages": HELLO})
    assert answer.status_code == 503 and answer.headers["retry-after"]
    if signals == 2:
        os.kill(child, signal.SIGTERM)
    else:
        (tmp_path / "go").touch()
    thread.join()
    assert got[0] in ([200] if signals == 1 else [503, "cut"])
    assert killed.wait(child) == (0 if signals == 1 else 143)
