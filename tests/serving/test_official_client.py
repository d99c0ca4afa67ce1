# SPDX-License-Identifier: Apache-2.0
"""OpenAI's own client against the server with a real model: what it parses, streams and raises."""

import asyncio
import json

import openai
import pydantic
import pytest

from lora_rlhf.serving.api_server import Access, ApiServer, Limits
from lora_rlhf.serving.inference import InferenceEngine
from lora_rlhf.serving.usage_store import UsageStore

KEY = "k" * 20
RECORD = "Record: name: Tariq; room: 371; pet: gecko; food: waffles; language: Finnish."
ASK = [{"role": "user", "content": f"{RECORD}\nWhich pet does Tariq have?"}]


class Pet(pydantic.BaseModel):
    pet: str = pydantic.Field(max_length=8)
    room: int = pydantic.Field(ge=0, le=999)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    engine = InferenceEngine.load(["tiny"])
    path = tmp_path_factory.mktemp("usage") / "usage.sqlite"
    store = UsageStore(path).open(create=True)
    made = ApiServer(engine, Access(key=KEY), Limits(prompt=200, body=20_000), store=store)
    made.start()
    yield made
    made.stop()
    engine.close()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def create(client):
    def ask(**options):
        given = {"model": "base", "messages": ASK, "seed": 1, "max_tokens": 20, **options}
        return client.chat.completions.create(**given)

    return ask


def streamed(chunks):
    """Text, finish reason and log-probs of each answer of a stream."""
    made = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        text, reason, logprobs = made.get(choice.index, ("", None, []))
        logprobs = [*logprobs, *(choice.logprobs.content if choice.logprobs else [])]
        text += choice.delta.content or ""
        made[choice.index] = text, choice.finish_reason or reason, logprobs
    return [made[index] for index in sorted(made)]


def test_a_seed_n_answers_and_their_stream_are_the_same(create):
    first, several = create(), create(n=3)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert texts[0] == first.choices[0].message.content and len(set(texts)) > 1
    chunks = list(create(n=3, stream=True, stream_options={"include_usage": True}))
    found = [(text, reason) for text, reason, _ in streamed(chunks)]
    assert found == [(c.message.content, c.finish_reason) for c in several.choices]
    assert chunks[-1].usage == several.usage and not chunks[-1].choices
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {several.id}
    assert create(seed=2).choices[0].message.content != texts[0]


def test_an_answer_ends_before_a_stop_text_and_at_its_limit(create):
    whole = create(temperature=0).choices[0].message.content
    word = whole.split()[1]
    for stop in (word, ["never there", word]):
        stopped = create(temperature=0, stop=stop).choices[0]
        assert stopped.message.content == whole[: whole.index(word)]
        assert stopped.finish_reason == "stop"
        [(text, reason, _)] = streamed(create(temperature=0, stop=stop, stream=True))
        assert (text, reason) == (stopped.message.content, "stop")
    for limit in ("max_tokens", "max_completion_tokens"):
        cut = create(**{"temperature": 0, "max_tokens": None, limit: 2})
        assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2


def test_logprobs_are_those_of_every_token(create):
    given = create(temperature=0, logprobs=True, top_logprobs=3)
    tokens = given.choices[0].logprobs.content
    assert len(tokens) == given.usage.completion_tokens
    for token in tokens:
        best = [one.logprob for one in token.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, best[0])  # greedy
        assert token.logprob <= 0
    text = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert text.strip().startswith(given.choices[0].message.content)
    [(_, _, later)] = streamed(create(temperature=0, logprobs=True, top_logprobs=3, stream=True))
    assert later == tokens
    assert create(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert create().choices[0].logprobs is None


def test_structured_answers_are_parsed_by_the_client(client, create):
    shaped = create(response_format={"type": "json_object"}, max_tokens=60)
    assert isinstance(json.loads(shaped.choices[0].message.content), dict)
    options = {"model": "base", "messages": ASK, "response_format": Pet, "max_tokens": 80}
    given = client.chat.completions.parse(seed=1, **options)
    assert isinstance(given.choices[0].message.parsed, Pet)
    with client.chat.completions.stream(seed=1, **options) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == given.choices[0].message.parsed
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_a_message_of_the_client_goes_back_as_it_is(create):
    first = create(temperature=0)
    turns = [*ASK, first.choices[0].message, {"role": "user", "content": "Which room?"}]
    longer = create(messages=turns, temperature=0, safety_identifier="u", modalities=["text"])
    assert longer.usage.prompt_tokens > first.usage.total_tokens
    dumped = [*ASK, first.choices[0].message.model_dump(), turns[-1]]
    again = create(messages=dumped, temperature=0)
    assert again.choices[0].message.content == longer.choices[0].message.content


def test_the_asynchronous_client_streams_too(server, create):
    async def ask():
        client = openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        chunks = await client.chat.completions.create(
            model="base", messages=ASK, seed=1, max_tokens=20, stream=True
        )
        return [chunk async for chunk in chunks]

    [(text, *_)] = streamed(asyncio.run(ask()))
    assert text == create().choices[0].message.content


@pytest.mark.parametrize(
    ("options", "kind", "status", "code"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, 404, "model_not_found"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, openai.APIStatusError, 413,
         "prompt_too_large"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, openai.APIStatusError, 413,
         "body_too_large"),
        ({"temperature": 3}, openai.BadRequestError, 400, "invalid_value"),
        ({"modalities": ["text", "audio"]}, openai.BadRequestError, 400, "invalid_value"),
        ({"n": 0, "stream": True}, openai.BadRequestError, 400, "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, 400,
         "invalid_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "nothing"}}}}, openai.BadRequestError, 400,
         "invalid_value"),
    ],
)  # fmt: skip
def test_errors_are_those_that_the_client_knows(create, options, kind, status, code):
    with pytest.raises(kind) as caught:
        create(**options)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.body["message"] and caught.value.type == "invalid_request_error"


def test_a_wrong_key_and_unknown_paths(server, client):
    stranger = openai.OpenAI(base_url=server.url, api_key="x" * 20, max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.code == "invalid_api_key"
    assert [model.id for model in client.models.list()] == ["base"]
    for call in (
        lambda: client.models.retrieve("gpt-4o"),
        lambda: client.embeddings.create(model="base", input="x"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()


def test_a_full_queue_is_a_rate_limit_that_the_client_waits_for(server, client, monkeypatch):
    monkeypatch.setattr(server.api, "limits", Limits(queue=0))
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="base", messages=ASK)
    assert caught.value.code == "queue_full" and caught.value.type == "rate_limit_error"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        monkeypatch.setattr(server.api, "limits", Limits())

    patient = client.with_options(max_retries=1)
    monkeypatch.setattr(openai._base_client.time, "sleep", sleep)
    given = patient.chat.completions.create(model="base", messages=ASK, max_tokens=2)
    assert given.choices and waits == [pytest.approx(1.0)]


def test_feedback_on_one_of_several_answers(client, create):
    given = create(n=3)
    body = {"completion_id": given.id, "thumb": "down", "choice": 2}
    answer = client.post("/feedback", cast_to=object, body=body)
    assert answer == {"completion_id": given.id, "choice": 2, "text_stored": True}
    with pytest.raises(openai.BadRequestError, match="expected the index of the answer, 0 to 2"):
        client.post("/feedback", cast_to=object, body={**body, "choice": None})
