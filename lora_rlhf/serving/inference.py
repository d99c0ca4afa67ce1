# SPDX-License-Identifier: Apache-2.0
"""Answers of base, SFT, policy and other adapters from one base in memory.

    engine = InferenceEngine.load(["runs/demo"])
    engine.generate(Request(({"role": "user", "content": "What is in the box?"},))).choices[0].text

One thread computes; any thread may ask. Requests for different adapters are computed together, and
an answer with a seed is the same beside any others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.data.few_shot import without_template
from lora_rlhf.data.filters import breaker
from lora_rlhf.errors import UsageError, check_unicode, first_line
from lora_rlhf.hub import targets
from lora_rlhf.models import loading
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.models.decode_batch import DecodeBatch
from lora_rlhf.models.memory import kv_tokens
from lora_rlhf.models.plain_adapters import PlainAdapters, peft_name
from lora_rlhf.models.stacked_lora import BASE
from lora_rlhf.recipe.schema import SEEDS, LoraSection, ModelSection, RewardSection
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import quiet
from lora_rlhf.training.reward import ensemble

from .structured import Constraint
from .worker import GrowingText, Job, QueueFull, Row, TokenLogprob, Worker, seed_of

__all__ = [
    "Choice", "Completion", "Delta", "Handle", "InferenceEngine", "Model", "PromptTooLong",
    "QueueFull", "Request", "Stream", "TokenLogprob",
]  # fmt: skip

BEST_OF_N = "best-of-n"
MAX_SAMPLES = 128
"""Most samples of one request: answers times `best_of`."""

_MAX_LOGPROBS, _MAX_STOPS, _MAX_TOKENS = 20, 16, 512
_NO_LIMIT = 1 << 20  # of a context whose length the config does not name
_ROLES = ("system", "user", "assistant")
_NEXT = "\nInstruction:"  # where a base model without a chat template begins another one

Turns = Sequence[dict[str, str]]


class PromptTooLong(UsageError):
    """A prompt that leaves no room for an answer in the context.

    A prompt of 9,000 tokens for a context of 8,192. Shorten it.
    """


@dataclass(frozen=True)
class Request:
    """A conversation to be continued.

    Attributes:
        messages: Turns with `role` and `content`; the last is the user's.
        model: A name in `InferenceEngine.models`; empty: the default.
        max_tokens: None: the engine's `max_tokens`.
        temperature: 0 is greedy.
        top_p: Probability of the nucleus that is drawn from.
        seed: None: another one each time.
        n: Answers returned.
        best_of: Samples for each answer; the one with the highest reward is returned.
        stop: Texts before which an answer ends.
        logprobs: How many of the most probable tokens come with each token's log-prob; None: no
            log-probs.
        whole: End a structured answer early, but valid, where `max_tokens` would cut it; its
            finish_reason is "length".
        scored: Compute the answers' rewards; best-of-n always does.
    """

    messages: tuple[dict[str, str], ...]
    model: str = ""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    n: int = 1
    best_of: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    whole: bool = True
    scored: bool = False


@dataclass(frozen=True)
class Model:
    """A model that answers: its adapter's sha256 ("" for the base itself) and its kind."""

    name: str
    adapter: str
    kind: str


@dataclass
class Choice:
    """One answer.

    Attributes:
        ids: Its tokens, with the end token.
        reward: With `scored` or best-of-n.
        valid: True if it satisfies the constraint; None without one.
    """

    text: str
    ids: list[int]
    finish_reason: Literal["stop", "length", "cancelled"]
    logprobs: list[TokenLogprob] | None
    reward: float | None
    valid: bool | None = None


@dataclass
class Completion:
    """The answers to a request, and what they cost; times count from `submit`.

    Attributes:
        completion_tokens: Tokens of all samples, also of those that best-of-n did not choose.
        queue_s: Seconds until the prompt was computed.
        dropped_turns: Messages cut off the history, by whole turns, so that it fits the context.
    """

    choices: list[Choice]
    model: str
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float
    seconds: float
    dropped_turns: int


@dataclass(frozen=True)
class Delta:
    """New text of one answer, and the log-probs of its tokens if the request wants them.

    Tokens without text of their own, such as the end token, come with the next piece or are only
    in the completion.
    """

    index: int
    text: str
    logprobs: Sequence[TokenLogprob] = ()


class Handle:
    """A request that is being answered."""

    def __init__(self, future: Future[Completion], cancelled: threading.Event) -> None:
        self._future, self._cancelled = future, cancelled

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the completion; raises the error if the request failed."""
        return self._future.result(timeout)

    def cancel(self) -> None:
        """Stop after the current token; the text so far becomes the completion, as `cancelled`."""
        self._cancelled.set()

    @property
    def done(self) -> bool:
        """True once there is a result or an error."""
        return self._future.done()

    def add_done_callback(self, call: Callable[[Handle], None]) -> None:
        """Call a function in the engine's thread when done, or at once if it is done already."""
        self._future.add_done_callback(lambda _: call(self))


class Stream:
    """Deltas of a request; closing it cancels. `completion` is there after the last."""

    def __init__(self, submit: Callable[[Callable[[Delta], None]], Handle]) -> None:
        self._queue: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
        self._handle = submit(self._queue.put)
        self._handle.add_done_callback(lambda _: self._queue.put(None))
        self._ended = False

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        if self._ended:
            raise StopIteration
        if (delta := self._queue.get()) is None:
            self._ended = True
            self._handle.result(0)
            raise StopIteration
        return delta

    @property
    def completion(self) -> Completion:
        """The completion; waits for it."""
        return self._handle.result()

    def close(self) -> None:
        """Cancel what is not generated yet."""
        self._ended = True
        self._handle.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):  # the request was not refused
            self._handle.cancel()


class InferenceEngine:
    """Models on one base, and the thread that computes their answers; see `load`.

    Attributes:
        models: By name.
        default: Name of the model that answers where a request names none.
        context: Tokens of a prompt and its answer together.
        max_tokens: Longest answer where a request names none.
    """

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.models: dict[str, Model] = {}
        self.default = ""
        config = base.causal.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or _NO_LIMIT)
        self.max_tokens = min(_MAX_TOKENS, self.context // 2)
        self._adapters = PlainAdapters(base)
        self._folders: dict[str, str | None] = {}  # model -> adapter as loaded
        self._best_of: dict[str, int] = {}  # model -> samples for each answer
        self._reward: tuple[list[str], RewardSection] | None = None
        self._plain = breaker(base.tokenizer)
        self._encoding = threading.Lock()  # it sets how the tokenizer reads control tokens
        self._batch: DecodeBatch
        self._worker: Worker

    @classmethod
    @quiet.libraries()
    def load(
        cls,
        targets_: Sequence[str | Path],
        *,
        base: str | None = None,
        load_in_4bit: bool = False,
        sharing: bool = True,
        max_rows: int = 32,
        max_waiting: int = 256,
    ) -> Self:
        """Load runs, RUN:policy, adapter folders and models, all of one base.

        Args:
            base: Base of the adapters whose config names none that can be loaded.
            load_in_4bit: Quantise a base that does not come from a run.
            sharing: An answer has the same bits whatever is computed beside it and before it.
                False: one request at a time is up to twice as fast on a CPU in float32, and what a
                prompt has in common with the model's last one is not computed again. For one
                conversation, not for several people.
            max_rows: Samples computed together.
            max_waiting: Requests that wait for room; more are refused with `QueueFull`.

        Raises:
            UsageError: A name is unknown, or they have several bases.
        """
        texts = list(map(str, targets_))
        named = targets.parse(texts, base=base, load_in_4bit=load_in_4bit, servers=False)
        named = targets.distinct(named)
        targets.check_text(named)
        records = {t.run: Record.read(t.run) for t in named if t.run is not None}
        labels = {t.run: t.name.rpartition(":")[0] for t in named}
        sections = [_section(target, records) for target in named]
        places = {(loading.local_folder(s) or s.id, s.load_in_4bit) for s in sections}
        if len(places) > 1:
            raise UsageError(
                "several bases: "
                + ", ".join(sorted(f"{at}" + " in 4 bits" * b for at, b in places)),
                expected="models, adapters and runs of one base, which is loaded once",
                remedy="name those of one base only",
            )
        engine = cls(BaseModel.load(sections[0], LoraSection()))
        for target in named:
            engine._add(target, alone=len(records) == 1)
        for folder, record in records.items():
            engine._add_reward(record, "" if len(records) == 1 else f"{labels[folder]}:")
        loaded = {one: None for one in engine._folders.values() if one is not None}
        engine._batch = DecodeBatch(engine.base, [peft_name(one) for one in loaded])
        if not sharing:
            engine._batch.least_rows = 1
        cells = kv_tokens(engine.base.causal)
        if not sharing:
            engine._batch.kept_tokens = min(engine.context, cells // 4)
        engine._worker = Worker(
            engine.base, engine._batch, max_rows=max_rows, max_cells=cells, max_waiting=max_waiting
        )
        return engine

    @property
    def why_single(self) -> str:
        """Why requests are not computed together; empty: they are."""
        return self._batch.why_single

    def _add(self, target: targets.Target, alone: bool) -> None:
        """Add a target under its name; a run's models have short names if it is the only one."""
        kind = target.name.rpartition(":")[2] if target.run else target.kind
        if target.run and (kind == "base" or alone):
            name = kind
        else:
            name = targets.apart(target.name, list(self.models))
        if "base" not in self.models:
            self.models["base"], self._folders["base"] = Model("base", "", "base"), None
        if target.kind == "model" or name == "base":
            self.default = self.default or "base"
            return
        assert target.adapter is not None
        folder = str(target.adapter.resolve())
        self._adapters.load(folder, target.adapter)
        weights = sha256(target.adapter / "adapter_model.safetensors")
        self.models[name], self._folders[name] = Model(name, weights, kind), folder
        self.default = name

    def _add_reward(self, record: Record, prefix: str) -> None:
        """Add a run's reward models, of the first run that has them, and its best of n."""
        recipe, sft = record.recipe(), f"{prefix}sft"
        self.max_tokens = min(
            ppo_stage.completion_limit(recipe, recipe.algorithm), self.context // 2
        )
        entry = record.data["stages"].get("reward", {})
        if self._reward is not None or not record.done("reward") or "adapter_sha256" not in entry:
            return
        members = list(ensemble.roles(recipe.reward))
        for role in members:
            self._adapters.load_scorer(role, record.verified(f"adapters/{role}"))
        self._reward = members, recipe.reward
        if sft in self.models:
            name = f"{prefix}{BEST_OF_N}"
            self.models[name] = dataclasses.replace(self.models[sft], name=name, kind=BEST_OF_N)
            self._folders[name], self._best_of[name] = self._folders[sft], recipe.best_of_n.n
            if recipe.algorithm == "best_of_n":
                self.default = name

    @property
    def has_reward(self) -> bool:
        """True if answers can be scored."""
        return self._reward is not None

    # --------------------------------------------------------------------- requests

    def generate(self, request: Request) -> Completion:
        """Answer a request."""
        return self.submit(request).result()

    def stream(self, request: Request) -> Stream:
        """Answer a request piece by piece; of best-of-n only the chosen answers come, whole."""
        return Stream(lambda put: self.submit(request, put))

    def submit(self, request: Request, on_delta: Callable[[Delta], None] | None = None) -> Handle:
        """Queue a request; `on_delta` is called in the engine's thread.

        Raises:
            UsageError: The request cannot be answered.
        """
        job = self._job(request, on_delta)
        self._worker.submit(job)
        return Handle(job.future, job.cancelled)

    def check(self, request: Request) -> None:
        """Raise the `UsageError` that `submit` would."""
        self._job(request, None)

    def count_tokens(self, messages: Turns) -> int:
        """Count the tokens of a prompt, those of the chat template included."""
        return len(self._encode(messages))

    def rendered(self, messages: Turns) -> str:
        """Return a prompt as the model sees it: cut to the context, control tokens included."""
        ids, *_ = self._fitted(Request(tuple(messages)))
        return str(self.base.tokenizer.decode(ids))

    def forget(self) -> None:
        """Drop the keys and values that are kept of earlier prompts, without `sharing`."""
        self._worker.call(self._batch.forget)

    def close(self) -> None:
        """Cancel running requests, which raise CancelledError, and end the thread."""
        self._worker.close()

    def _job(self, request: Request, on_delta: Callable[[Delta], None] | None) -> Job:
        name = request.model or self.default
        self._check_model(name)
        best_of = self._best_of.get(name, 1) if request.best_of == 1 else request.best_of
        _check_values(request, best_of)
        if (best_of > 1 or request.scored) and not self.has_reward:
            raise UsageError(
                "best of n and rewards need a reward model",
                expected="a run whose reward model is trained",
            )
        _check_turns(request.messages)
        prompt, dropped, limit = self._fitted(request)
        if best_of > 1 or request.scored:  # the reward model reads an end token as well
            limit = max(1, min(limit, self.context - len(prompt) - 1))
        count = request.n * best_of
        if (cells := count * (len(prompt) + limit)) > self._worker.max_cells:
            raise UsageError(
                f"{count} samples of {len(prompt) + limit:,} tokens",
                expected=f"at most {self._worker.max_cells:,} tokens, which fit the memory",
                remedy=f"ask for less than {cells:,}: a smaller n, best_of or max_tokens",
            )
        stop = request.stop if self.base.tokenizer.chat_template else (*request.stop, _NEXT)
        on_text = None
        if on_delta is not None and best_of == 1:
            listener = on_delta
            on_text = lambda *piece: listener(Delta(*piece))  # noqa: E731
        return Job(
            prompt,
            self._adapter(name),
            limit,
            self._rows(request, count, stop),
            request.temperature,
            request.top_p,
            request.logprobs,
            request.whole,
            on_text,
            functools.partial(self._completion, request, name, best_of, dropped, on_delta),
        )

    def _adapter(self, name: str) -> str:
        folder = self._folders[name]
        return BASE if folder is None else peft_name(folder)

    def _check_model(self, name: str) -> None:
        if name not in self.models:
            raise UsageError(f"unknown model {name!r:.80}", expected=", ".join(self.models))

    def _fitted(self, request: Request) -> tuple[list[int], int, int]:
        """Encode a request; returns its ids, the messages left out, and the longest answer."""
        turns, wanted = list(request.messages), request.max_tokens or self.max_tokens
        dropped = 0
        while len(ids := self._encode(turns)) + wanted > self.context:
            first = int(turns[0]["role"] == "system")
            # Cut up to the next turn of the user.
            later = [i for i in range(first + 1, len(turns)) if turns[i]["role"] == "user"]
            if not later:
                break
            dropped += later[0] - first
            del turns[first : later[0]]
        if len(ids) >= self.context:
            raise PromptTooLong(
                f"the last turn has {len(ids):,} tokens, with those of the chat template",
                expected=f"fewer than the context has: {self.context:,}",
                remedy="shorten it",
            )
        return ids, dropped, min(wanted, self.context - len(ids))

    def _encode(self, turns: Turns) -> list[int]:
        clean = [{**turn, "content": self._plain(turn["content"])} for turn in turns]
        bare = not self.base.tokenizer.chat_template
        try:
            with self._encoding:
                return self.base.encode_prompt(
                    without_template(clean, 0) if bare else clean, cached=False
                )
        except Exception as error:  # a template may raise anything
            raise UsageError(
                f"the chat template refuses the conversation: {first_line(error)}",
                expected="user and assistant in turn; not every model takes a system turn",
            ) from None

    # ------------------------------------------------------------------------- work

    def _rows(self, request: Request, count: int, stop: Sequence[str]) -> list[Row]:
        matcher = None
        if request.constraint is not None:
            columns = self.base.causal.get_output_embeddings().weight.shape[0]
            matcher = request.constraint.matcher(self.base.tokenizer, columns, self.base.eos_ids)
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        return [
            Row(i, seed_of(seed, i), GrowingText(self.base, stop), matcher and matcher.copy())
            for i in range(count)
        ]

    def _completion(
        self,
        request: Request,
        model: str,
        best_of: int,
        dropped: int,
        on_delta: Callable[[Delta], None] | None,
        job: Job,
    ) -> Completion:
        """Choose among the samples of a finished job, in the worker's thread."""
        rows, cut = job.rows, any(row.finish == "cancelled" for row in job.rows)
        rewards: list[float] | list[None] = [None] * len(rows)
        if (best_of > 1 or request.scored) and not cut:
            answers = [[i for i in row.ids if i not in self.base.eos_ids] for row in rows]
            rewards = self._rewards(job.prompt, answers)
        choices = [
            Choice(
                row.text.text,
                row.ids,
                row.finish or "cancelled",
                None if request.logprobs is None else row.logprobs,
                reward,
                _is_valid(request.constraint, row),
            )
            for row, reward in zip(rows, rewards, strict=True)
        ]
        groups = [choices[i : i + best_of] for i in range(0, len(choices), best_of)]
        chosen = [max(group, key=_rank) for group in groups]
        if best_of > 1 and on_delta is not None:
            for index, choice in enumerate(chosen):
                on_delta(Delta(index, choice.text, choice.logprobs or ()))
        now = time.monotonic()
        return Completion(
            chosen,
            model,
            len(job.prompt),
            sum(len(row.ids) for row in rows),
            (job.begun or now) - job.submitted,
            (job.first or now) - job.submitted,
            now - job.submitted,
            dropped,
        )

    # ---------------------------------------------------------------------- scoring

    def score(self, messages: Turns, texts: Sequence[str]) -> list[float]:
        """Return the reward of each answer, offsets included and an ensemble combined.

        Raises:
            UsageError: There is no reward model, or an answer does not fit the context.
        """
        prompt = self._encode(messages)
        with self._encoding:
            answers = [self.base.encode_completion(t, cached=False)[:-1] for t in texts]
        scores: list[float] = self._worker.call(lambda: self._rewards(prompt, answers))
        return scores

    def _rewards(self, prompt: list[int], answers: Sequence[list[int]]) -> list[float]:
        """Score answers without their end token, which is added."""
        if self._reward is None:
            raise UsageError("there is no reward model", expected="a run whose reward is trained")
        rows = [[*prompt, *ids, self.base.tokenizer.eos_token_id] for ids in answers]
        if (longest := max(map(len, rows))) > self.context:
            raise PromptTooLong(
                f"a prompt with its answer has {longest:,} tokens",
                expected=f"at most {self.context:,}",
            )
        members, section = self._reward
        each = [self._adapters.scores(role, rows, 8) for role in members]
        return [float(x) for x in ensemble.combine(each, section)]

    def per_token_kl(
        self, messages: Turns, ids: Sequence[int], model: str = "", against: str = "sft"
    ) -> list[float]:
        """Return KL(model || against) in nats at each token of an answer, before it was drawn."""
        names = (model or self.default, against)
        for name in names:
            self._check_model(name)
        if not ids:
            return []
        row = [*self._encode(messages), *ids]
        adapters = [
            BASE if one is None else peft_name(one) for one in map(self._folders.get, names)
        ]

        def compute() -> list[Tensor]:
            return [self._batch.logits(row, adapter, len(ids) + 1)[:-1] for adapter in adapters]

        ours, other = (one.double().log_softmax(dim=-1) for one in self._worker.call(compute))
        return [float(x) for x in (ours.exp() * (ours - other)).sum(dim=-1).clamp(min=0)]


def _is_valid(constraint: Constraint | None, row: Row) -> bool | None:
    if constraint is None:
        return None
    ended = row.finish == "stop" or (row.matcher is not None and row.matcher.forced)
    return ended and constraint.check(row.text.text) is None


def _rank(choice: Choice) -> tuple[bool, float]:
    """Order samples: those of the required form first, then by their reward."""
    return choice.valid is not False, -math.inf if choice.reward is None else choice.reward


def _section(target: targets.Target, records: dict[Path, Record]) -> ModelSection:
    """Return a target's base; a run's at the precision of its training."""
    if target.run is None:
        assert target.base is not None
        return target.base
    record = records[target.run]
    return record.model_section(record.recipe())


def _check_values(request: Request, best_of: int) -> None:
    """Check the numbers of a request."""
    ranges: tuple[tuple[str, Any, float, float, Any], ...] = (
        ("max_tokens", request.max_tokens, 1, _NO_LIMIT, int),
        ("temperature", request.temperature, 0, 100, (int, float)),
        ("top_p", request.top_p, 1e-6, 1, (int, float)),
        ("seed", request.seed, 0, SEEDS - 1, int),
        ("n", request.n, 1, MAX_SAMPLES, int),
        ("best_of", best_of, 1, MAX_SAMPLES, int),
        ("logprobs", request.logprobs, 0, _MAX_LOGPROBS, int),
    )
    for name, value, low, high, kind in ranges:
        if value is None and name in ("max_tokens", "seed", "logprobs"):
            continue
        # Not a comparison alone: NaN is in no range.
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or not low <= value <= high:
            raise UsageError(f"{name} {value!r:.40}", expected=f"{low:,} to {high:,}")
    if request.n * best_of > MAX_SAMPLES:
        raise UsageError(
            f"{request.n} answers of {best_of} samples", expected=f"at most {MAX_SAMPLES} samples"
        )
    if best_of > 1 and request.temperature == 0:
        raise UsageError(
            f"best_of {best_of} at temperature 0",
            expected="samples that differ",
            remedy="set the temperature to 1",
        )
    stop = request.stop
    texts = isinstance(stop, tuple) and all(isinstance(one, str) and one for one in stop)
    if not texts or len(stop) > _MAX_STOPS:
        raise UsageError(f"stop {stop!r:.60}", expected=f"up to {_MAX_STOPS} texts, none empty")


def _check_turns(messages: Turns) -> None:
    """Check the turns of a conversation."""
    for turn in messages:
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(content, str) or turn.get("role") not in _ROLES:
            raise UsageError(
                f"a turn {turn!r:.80}", expected=f"a role ({', '.join(_ROLES)}) and its content"
            )
        check_unicode(content, "a turn")
    if not messages or messages[-1]["role"] != "user":
        raise UsageError("the conversation does not end with a turn of the user")
    if not messages[-1]["content"].strip():
        raise UsageError("the last turn of the user is empty", expected="a prompt with some text")
