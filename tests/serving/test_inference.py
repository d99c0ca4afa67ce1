# SPDX-License-Identifier: Apache-2.0
"""The inference engine: streams, stops, seeds, log-probs, history, errors, answers in a batch."""

import dataclasses
import random
import shutil
import threading
from concurrent.futures import CancelledError

import pytest
import torch

from lora_rlhf.data import tokenization
from lora_rlhf.errors import UsageError
from lora_rlhf.models import token_draw
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.models.plain_adapters import PlainAdapters
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.serving import loaded_run
from lora_rlhf.serving.inference import (
    Delta,
    InferenceEngine,
    PromptTooLong,
    QueueFull,
    Request,
)
from lora_rlhf.serving.structured import Constraint

ASK = ({"role": "user", "content": "What is in the box?"},)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "boolean"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The tiny model and two random adapters of different ranks, one on some modules only."""
    base = BaseModel.load(ModelSection(id="tiny"), LoraSection())
    folders = [tmp_path_factory.mktemp("adapters") / name for name in ("first", "second")]
    for number, folder in enumerate(folders):
        if number:
            base.target_modules = ["q_proj", "down_proj"]
        torch.manual_seed(number)
        with PlainAdapters(base).training(4 + 4 * number, folder) as weights:
            for weight in weights:
                torch.nn.init.normal_(weight, std=0.05)
    made = InferenceEngine.load(["tiny", *folders], base="tiny")
    yield made
    made.close()


def ask(**options) -> Request:
    return Request(ASK, **{"model": "base", "max_tokens": 12, "seed": 1, **options})


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

    def test_log_probs_of_the_stream_are_those_of_the_completion(self, engine):
        stream = engine.stream(ask(n=2, max_tokens=40, logprobs=1, stop=("e",)))
        parts = list(stream)
        for index, choice in enumerate(stream.completion.choices):
            told = [one for d in parts if d.index == index for one in d.logprobs]
            assert told and told == choice.logprobs[: len(told)]
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
        with torch.no_grad(), engine._adapters.active(None):
            expected = engine.base.causal(ids).logits[0].float().log_softmax(-1)
        start = ids.shape[1] - len(choice.ids)
        for at, one in enumerate(choice.logprobs):
            row = expected[start + at - 1]
            assert one.logprob == pytest.approx(float(row[one.id]), abs=1e-4)
            top = row.topk(2).values.tolist()
            assert [p for _, p in one.top] == pytest.approx(top, abs=1e-4)

    def test_a_stream_ends_where_its_loop_closes_it(self, engine):
        stream = engine.stream(ask(max_tokens=200, seed=3, temperature=5.0))
        for _ in stream:
            stream.close()

    def test_no_conversation_is_kept(self, engine):
        tokenization._CACHE.pop(engine.base.tokenizer, None)
        engine.generate(ask())
        assert not tokenization._CACHE.get(engine.base.tokenizer)

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
    with pytest.raises(UsageError) as refused:
        engine.submit(ask(**options))
    if "seed" in options:
        assert refused.value.expected == "0 to 4,294,966,295"


@pytest.mark.parametrize(
    "messages",
    [(), ({"role": "assistant", "content": "a"},), ({"role": "tool", "content": "a"},),
     ({"role": "user", "content": "\ud800"},), ({"role": "user", "content": 3},)],
)  # fmt: skip
def test_bad_turns(engine, messages):
    with pytest.raises(UsageError):
        engine.submit(Request(messages))


def test_an_answer_of_a_schema(engine):
    form = Constraint("json_schema", SCHEMA)
    for options in ({"max_tokens": 60}, {"max_tokens": 60, "temperature": 4.0}):
        for choice in engine.generate(ask(n=4, constraint=form, **options)).choices:
            assert choice.valid and choice.finish_reason == "stop"
    free = {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 3}
    form = Constraint("json_schema", free)
    done = engine.generate(ask(n=20, max_tokens=40, constraint=form, temperature=0.7))
    assert all("twice" not in (form.check(choice.text) or "") for choice in done.choices)
    text = Constraint("regex", "[a-z]{2}[a-z ]*;")
    [ended] = engine.generate(ask(constraint=text, temperature=3.0)).choices
    assert ended.valid and ended.finish_reason == "length" and ended.text.endswith(";")
    [cut] = engine.generate(ask(constraint=text, temperature=3.0, whole=False)).choices
    assert cut.valid is False and cut.finish_reason == "length"


def mixed(engine, count: int) -> list[Request]:
    """Requests of every kind, each with its seed."""
    rng, words = random.Random(0), "where is the red box".split()
    constraints = [Constraint("json_schema", SCHEMA), Constraint("choice", ["red", "green"]),
                   Constraint("regex", "[a-z]{3,9}( [a-z]+)*")]  # fmt: skip
    return [
        Request(
            ({"role": "user", "content": " ".join(rng.choices(words, k=rng.randint(1, 40)))},),
            model=rng.choice(list(engine.models)),
            max_tokens=rng.randint(1, 30),
            temperature=rng.choice([0, 0.7, 1.0, 1.5]),
            top_p=rng.choice([1.0, 1.0, 0.8]),
            seed=rng.randrange(1000),
            n=rng.choice([1, 1, 1, 2, 3]),
            stop=rng.choice([(), (), ("the", "e."), (" ",)]),
            logprobs=rng.choice([None, None, 1]),
            constraint=rng.choice([None, None, *constraints]),
        )
        for _ in range(count)
    ]


def differing(engine, count: int) -> int:
    """Count the requests whose choices differ between the batch and the request alone."""
    requests = mixed(engine, count)
    order = random.Random(1).sample(range(count), count)
    handles = {i: engine.submit(requests[i]) for i in order}
    together = {i: handle.result() for i, handle in handles.items()}
    return sum(engine.generate(requests[i]).choices != together[i].choices for i in range(count))


class TestBatch:
    def test_an_answer_is_that_of_the_request_alone(self, engine):
        assert engine.why_single == ""
        assert differing(engine, 16) == 0

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_a_thousand(self, engine):
        engine._worker.max_waiting = 1000
        assert differing(engine, 1000) == 0

    def test_an_adapter_is_pefts(self, engine):
        for name in ("first", "second"):
            choice = engine.generate(ask(model=name, temperature=0, logprobs=0)).choices[0]
            prompt = engine.base.encode_prompt(list(ASK))
            with torch.no_grad(), engine._adapters.active(engine._folders[name]):
                logits = engine.base.causal(torch.tensor([prompt + choice.ids])).logits[0]
            expected = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
            wanted = expected.gather(1, torch.tensor(choice.ids).unsqueeze(1)).squeeze(1)
            got = torch.tensor([one.logprob for one in choice.logprobs])
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)

    def test_the_models_differ(self, engine):
        names = ["base", "first", "second"]
        assert list(engine.models) == names and engine.default == "second"
        first = [engine.generate(ask(model=n, logprobs=3, max_tokens=1)).choices[0] for n in names]
        assert len({str(choice.logprobs[0].top) for choice in first}) == 3
        ids = engine.generate(ask()).choices[0].ids
        assert max(engine.per_token_kl(ASK, ids, "first", against="base")) > 0.01
        assert max(engine.per_token_kl(ASK, ids, "first", against="first")) == 0

    def test_samples_are_those_of_one_more(self, engine):
        two, three = (engine.generate(ask(n=n)).choices for n in (2, 3))
        assert two == three[:2] and three[1] != three[2]

    def test_the_queue_has_a_bound(self, engine):
        free, held = threading.Event(), threading.Event()
        blocked = engine.submit(ask(), lambda _: (held.set(), free.wait(20)))
        held.wait(20)
        engine._worker.max_waiting, before = 1, engine._worker.max_waiting
        try:
            waiting = engine.submit(ask())
            with pytest.raises(QueueFull):
                engine.submit(ask())
        finally:
            free.set()
            engine._worker.max_waiting = before
        assert blocked.result(20).choices == waiting.result(20).choices

    def test_a_listener_that_fails_ends_its_request_alone(self, engine):
        def fail(_: Delta) -> None:
            raise BrokenPipeError

        broken, good = engine.submit(ask(), fail), engine.submit(ask())
        with pytest.raises(BrokenPipeError):
            broken.result(20)
        assert good.result(20).choices == engine.generate(ask()).choices

    def test_an_error_of_the_draw_is_that_of_its_jobs_only(self, engine, monkeypatch):
        monkeypatch.setattr(token_draw, "draw", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit(ask()).result(20)
        monkeypatch.undo()
        assert engine.submit(ask()).result(20).choices

    def test_nobody_waits_for_a_thread_that_has_died(self, monkeypatch):
        made = InferenceEngine.load(["tiny"])
        monkeypatch.setattr(made._worker, "_draw", lambda *_: 1 / 0)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        handles = [made.submit(ask()) for _ in range(2)]
        with pytest.raises((CancelledError, ZeroDivisionError)):
            handles[1].result(20)
        with pytest.raises(UsageError, match="closed"):
            made.submit(ask())

    def test_closing_ends_all(self):
        made = InferenceEngine.load(["tiny"])
        handle = made.submit(ask(max_tokens=200, temperature=5.0))
        made.close()
        with pytest.raises(CancelledError):
            handle.result(20)
        with pytest.raises(UsageError, match="closed"):
            made.submit(ask())


def test_runs_whose_folders_have_one_name(runs, tmp_path):
    """`chat sweeps/a/seed-0 sweeps/b/seed-0`: each SFT stays with its policy; twice is once."""
    run = runs.after("ppo")
    other = tmp_path / run.name
    shutil.copytree(run, other)
    engine = InferenceEngine.load([run, other, f"{run}:sft", other / ".." / other.name])
    engine.close()
    name = run.name
    assert [*engine.models] == [
        "base",
        *(f"{name}:sft", f"{name}:policy", f"{name} 2:sft", f"{name} 2:policy"),
        f"{name}:best-of-n",
    ]


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt_is_refused(engine, tmp_path, text):
    with pytest.raises(UsageError, match="the last turn of the user is empty"):
        engine.submit(Request(({"role": "user", "content": text},)))
    with pytest.raises(UsageError, match="the prompt is empty"):  # before the run is read
        loaded_run.generate(tmp_path, text)


def test_half_of_a_character_in_a_turn_is_refused(engine):
    turns = ({"role": "system", "content": "cut \ud83d"}, {"role": "user", "content": "Hello"})
    with pytest.raises(UsageError, match="a turn is not valid Unicode: half of a surrogate pair"):
        engine.submit(Request(turns))


@pytest.mark.parametrize("role", ["reward", "value"])
def test_an_adapter_that_writes_no_text_is_refused(runs, role):
    folder = runs.after("ppo") / "adapters" / role
    with pytest.raises(UsageError, match=f"{role} scores answers and writes none"):
        InferenceEngine.load([folder], base="tiny")


def test_best_of_n(runs):
    engine = InferenceEngine.load([runs.after("ppo")])
    try:
        assert list(engine.models) == ["base", "sft", "policy", "best-of-n"]
        turns = ({"role": "user", "content": "w5 w6 w7"},)
        request = Request(turns, model="sft", n=2, best_of=3, seed=1, max_tokens=6)
        chosen = engine.generate(request)
        flat = engine.generate(dataclasses.replace(request, n=6, best_of=1, scored=True))
        rewards = [choice.reward for choice in flat.choices]
        assert [c.reward for c in chosen.choices] == [max(rewards[:3]), max(rewards[3:])]
        assert chosen.completion_tokens == flat.completion_tokens
        scored = engine.score(turns, [choice.text for choice in flat.choices])
        assert scored == pytest.approx(rewards, abs=1e-5)
        long = ({"role": "user", "content": "w5 " * engine.context},)
        while engine.count_tokens(long) > engine.context - 4:
            long = ({"role": "user", "content": long[0]["content"][3:]},)
        full = Request(long, model="base", seed=1, n=8, scored=True, max_tokens=4)
        choices = engine.generate(full).choices  # an end token is read after the longest ones too
        assert any(choice.finish_reason == "length" for choice in choices)
    finally:
        engine.close()


class TestOneConversation:
    @pytest.fixture(scope="class")
    def alone(self):
        made = InferenceEngine.load(["tiny"], sharing=False)
        yield made
        made.close()

    @staticmethod
    def computed(engine, monkeypatch):
        counts, forward = [], engine._batch._forward

        def counted(ids, *rest):
            counts.append(len(ids[0]))
            return forward(ids, *rest)

        monkeypatch.setattr(engine._batch, "_forward", counted)
        return counts

    def test_a_turn_computes_only_what_is_new(self, alone, engine, monkeypatch):
        turns, counts = [], self.computed(alone, monkeypatch)
        for number in range(3):
            turns.append({"role": "user", "content": f"What is in box {number}?"})
            request = Request(tuple(turns), model="base", max_tokens=8, temperature=0)
            counts.clear()
            answer = alone.generate(request)
            assert answer.choices[0].ids == engine.generate(request).choices[0].ids
            turns.append({"role": "assistant", "content": answer.choices[0].text})
            new = counts[0]
            assert new == answer.prompt_tokens if number == 0 else new < answer.prompt_tokens / 2
        alone.forget()
        counts.clear()
        alone.generate(request)
        assert counts[0] == answer.prompt_tokens

    def test_an_answer_arrives_though_there_is_no_memory_to_keep_it(self, alone, monkeypatch):
        def full(*_):
            raise torch.OutOfMemoryError("no memory")

        first = alone.generate(ask(temperature=0)).choices[0].ids
        monkeypatch.setattr(alone._batch, "keep", full)
        assert alone.generate(ask(temperature=0)).choices[0].ids == first
        assert alone._batch._kept == {}
        assert alone.generate(ask(temperature=0)).choices[0].ids == first

    def test_a_shared_engine_keeps_nothing(self, engine):
        engine.generate(ask())
        assert engine._batch._kept == {} and engine._batch.kept_tokens == 0

    def test_a_stopped_answer_and_an_earlier_question(self, alone, monkeypatch):
        alone.forget()
        counts = self.computed(alone, monkeypatch)
        with alone.stream(ask(max_tokens=200, temperature=5.0)) as stream:
            next(stream)
        assert stream.completion.choices[0].finish_reason in ("cancelled", "length")
        counts.clear()
        again = alone.generate(ask(temperature=0))  # another question at the same place
        assert counts[0] == 1
        alone.forget()
        assert alone.generate(ask(temperature=0)).choices[0].ids == again.choices[0].ids
