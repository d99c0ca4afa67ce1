# SPDX-License-Identifier: Apache-2.0
"""The inference engine: streams, stops, seeds, log-probs, history, errors."""

import pytest
import torch

from lora_rlhf.errors import UsageError
from lora_rlhf.serving.inference import InferenceEngine, PromptTooLong, Request
from lora_rlhf.serving.structured import Constraint

ASK = ({"role": "user", "content": "What is in the box?"},)


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    made = InferenceEngine.load(["tiny"])
    yield made
    made.close()


def ask(**options) -> Request:
    return Request(ASK, **{"max_tokens": 12, "seed": 1, **options})


class TestAnswers:
    def test_a_seed_gives_the_same_answer_again(self, engine):
        first, again, other = (engine.generate(ask(seed=seed)) for seed in (1, 1, 2))
        assert first.choices == again.choices
        assert first.choices != other.choices

    def test_the_stream_is_the_text(self, engine):
        stream = engine.stream(ask(n=2, max_tokens=40))
        parts = list(stream)
        assert len(parts) > 2
        for index, choice in enumerate(stream.completion.choices):
            assert "".join(d.text for d in parts if d.index == index) == choice.text

    def test_text_before_a_stop(self, engine):
        whole = engine.generate(ask(max_tokens=40)).choices[0]
        stop = whole.text[5:8]
        cut = engine.generate(ask(max_tokens=40, stop=("never this", stop))).choices[0]
        assert cut.text == whole.text.partition(stop)[0]
        assert cut.finish_reason == "stop"

    def test_logprobs_are_the_models(self, engine):
        choice = engine.generate(ask(logprobs=2, temperature=0.7)).choices[0]
        assert [one.id for one in choice.logprobs] == choice.ids
        ids = torch.tensor([engine.base.encode_prompt(list(ASK)) + choice.ids])
        with torch.no_grad():
            expected = engine.base.causal(ids).logits[0].float().log_softmax(-1)
        start = ids.shape[1] - len(choice.ids)
        for at, one in enumerate(choice.logprobs):
            row = expected[start + at - 1]
            assert one.logprob == pytest.approx(float(row[one.id]), abs=1e-4)
            top = row.topk(2).values.tolist()
            assert [p for _, p in one.top] == pytest.approx(top, abs=1e-4)

    def test_cancelled(self, engine):
        stream = engine.stream(ask(max_tokens=200, seed=3, temperature=5.0))
        next(stream)
        stream.close()
        assert stream.completion.choices[0].finish_reason == "cancelled"


class TestHistory:
    def test_whole_turns_are_dropped_and_the_system_kept(self, engine):
        turn = {"role": "user", "content": "word " * 60}
        answer = {"role": "assistant", "content": "word " * 60}
        system = {"role": "system", "content": "Be brief."}
        done = engine.generate(Request((system, *[turn, answer] * 6, *ASK), max_tokens=4))
        assert done.dropped_turns in (2, 4, 6, 8, 10)
        kept = [system, *[turn, answer] * (6 - done.dropped_turns // 2), *ASK]
        assert done.prompt_tokens == engine.count_tokens(kept) <= engine.context - 4

    def test_a_turn_that_cannot_fit(self, engine):
        with pytest.raises(PromptTooLong, match="tokens"):
            engine.submit(Request(({"role": "user", "content": "word " * 2000},)))


@pytest.mark.parametrize(
    "options",
    [{"model": "gpt"}, {"n": 0}, {"temperature": float("nan")}, {"top_p": 0}, {"seed": -1},
     {"stop": ("",)}, {"stop": "text"}, {"logprobs": 50}, {"best_of": 2}, {"max_tokens": 0},
     {"n": True}, {"max_tokens": 1.5}],
)  # fmt: skip
def test_a_bad_request_is_refused_at_once(engine, options):
    with pytest.raises(UsageError):
        engine.submit(ask(**options))


@pytest.mark.parametrize(
    "messages",
    [(), ({"role": "assistant", "content": "a"},), ({"role": "tool", "content": "a"},),
     ({"role": "user", "content": "\ud800"},), ({"role": "user", "content": 3},)],
)  # fmt: skip
def test_bad_turns(engine, messages):
    with pytest.raises(UsageError):
        engine.submit(Request(messages))


def test_an_answer_of_a_schema(engine):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    done = engine.generate(ask(max_tokens=60, n=4, constraint=Constraint("json_schema", schema)))
    for choice in done.choices:
        assert choice.valid is (choice.finish_reason == "stop")
    assert any(choice.valid for choice in done.choices)
