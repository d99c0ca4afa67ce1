# SPDX-License-Identifier: Apache-2.0
"""Answers of base, SFT, policy and other adapters from one base in memory.

    engine = InferenceEngine.load(["runs/demo"])
    engine.generate(Request(({"role": "user", "content": "What is in the box?"},))).choices[0].text

One thread computes; any thread may ask. An answer with a seed is the same beside any others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from transformers import DynamicCache

from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.data.few_shot import completed, without_template
from lora_rlhf.data.filters import breaker
from lora_rlhf.errors import UsageError, first_line
from lora_rlhf.hub import targets
from lora_rlhf.models import loading, sampler, token_draw
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.models.plain_adapters import PlainAdapters
from lora_rlhf.recipe.schema import SEEDS, LoraSection, ModelSection, RewardSection
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import quiet
from lora_rlhf.training.reward import ensemble

from .structured import Constraint, Matcher

BEST_OF_N = "best-of-n"
MAX_SAMPLES = 128
"""Most samples of one request: answers times `best_of`."""

_MAX_LOGPROBS, _MAX_STOPS, _MAX_TOKENS = 20, 16, 512
_NO_LIMIT = 1 << 20  # of a context whose length the config does not name
_ROLES = ("system", "user", "assistant")

Turns = Sequence[dict[str, str]]


class PromptTooLong(UsageError):
    """A prompt that leaves no room for an answer in the context.

    A question of 9,000 tokens to a model of 8,192. Shorten it.
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
        logprobs: For each token its log-prob and so many most probable ones; None: none.
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


@dataclass(frozen=True)
class Model:
    """What answers: an adapter's sha256 ("" for the base itself) and what it is."""

    name: str
    adapter: str
    kind: str


@dataclass
class TokenLogprob:
    """A token with its log-prob under the model at temperature 1, and the most probable ones."""

    token: str
    id: int
    logprob: float
    top: list[tuple[str, float]]


@dataclass
class Choice:
    """One answer; `ids` holds its end token too, and `reward` is there if there is a reward model.

    `valid`: the answer has the form of the constraint; None without one.
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
        completion_tokens: Of all samples, also those that best-of-n did not choose.
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
    """New text of one answer."""

    index: int
    text: str


class Handle:
    """An answer in the making."""

    def __init__(self) -> None:
        self._future: Future[Completion] = Future()
        self._cancelled = threading.Event()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the completion; raises what went wrong."""
        return self._future.result(timeout)

    def cancel(self) -> None:
        """Stop after the current token; the completion has what is there, as `cancelled`."""
        self._cancelled.set()

    @property
    def done(self) -> bool:
        """True once there is a result or an error."""
        return self._future.done()

    def add_done_callback(self, call: Callable[[Handle], None]) -> None:
        """Call in the engine's thread when done; at once if it is."""
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
        if self._ended or (delta := self._queue.get()) is None:
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
        self._handle.cancel()


class _Text:
    """Tokens to text as they come: whole characters only, up to a stop text."""

    def __init__(self, base: BaseModel, stop: Sequence[str]) -> None:
        self._base, self._stop = base, stop
        self._ids: list[int] = []
        self._read = 0  # ids before it are decoded for good
        self._pending = ""  # text that may be the beginning of a stop text
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Add a token; returns text that is final."""
        self._ids.append(token)
        # The last final token stays in view, since white space depends on what precedes it.
        before = self._base.decode(self._ids[max(0, self._read - 1) : self._read])
        whole = self._base.decode(self._ids[max(0, self._read - 1) :])
        if whole.endswith("\ufffd") and len(self._ids) - self._read < 8:
            return ""  # bytes of a character that is not complete
        self._read = len(self._ids)
        return self._emit(whole[len(before) :], final=False)

    def finish(self) -> str:
        """Return what was held back."""
        before = self._base.decode(self._ids[max(0, self._read - 1) : self._read])
        whole = self._base.decode(self._ids[max(0, self._read - 1) :])
        self._read = len(self._ids)
        return self._emit(whole[len(before) :], final=True)

    def _emit(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._pending + new
        at = min((at for one in self._stop if (at := text.find(one)) >= 0), default=-1)
        if at >= 0:
            self.stopped, self._pending, out = True, "", text[:at]
        else:
            held = 0 if final else _overlap(text, self._stop)
            out, self._pending = text[: len(text) - held], text[len(text) - held :]
        self.text += out
        return out


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of the text that begins a stop text."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


@dataclass
class _Row:
    """One sample while it grows."""

    seed: int
    text: _Text
    matcher: Matcher | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Literal["stop", "length", "cancelled", ""] = ""
    reward: float | None = None


@dataclass
class _Job:
    """A request in work."""

    request: Request
    model: Model
    prompt: list[int]
    limit: int
    dropped: int
    seed: int
    best_of: int
    on_delta: Callable[[Delta], None] | None
    handle: Handle
    submitted: float
    begun: float = 0.0
    first: float = 0.0


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
        self._cache_name = sampler.cache_argument(base.causal)
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)

    @classmethod
    @quiet.libraries()
    def load(
        cls,
        targets_: Sequence[str | Path],
        *,
        base: str | None = None,
        load_in_4bit: bool = False,
    ) -> Self:
        """Load runs, RUN:policy, adapter folders and models, all of one base.

        Raises:
            UsageError: A name is unknown, or they have several bases.
        """
        named = targets.parse(list(map(str, targets_)), base=base, load_in_4bit=load_in_4bit)
        records = {t.run: Record.read(t.run) for t in named if t.run is not None}
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
            engine._add(target, alone=len(records) == 1 and len(named) <= 3)
        for folder, record in records.items():
            engine._add_reward(record, "" if len(records) == 1 else f"{folder.resolve().name}:")
        engine._thread.start()
        return engine

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
        if self._closed:
            raise UsageError("the engine is closed")
        job = self._prepared(request, on_delta)
        self._jobs.put(job)
        return job.handle

    def check(self, request: Request) -> None:
        """Raise the `UsageError` that `submit` would."""
        self._prepared(request, None)

    def count_tokens(self, messages: Turns) -> int:
        """Count the tokens of a prompt, those of the chat template included."""
        return len(self._encode(messages))

    def close(self) -> None:
        """Cancel what is in work and end the thread."""
        self._closed = True
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _prepared(self, request: Request, on_delta: Callable[[Delta], None] | None) -> _Job:
        name = request.model or self.default
        if name not in self.models:
            raise UsageError(f"unknown model {name!r}", expected=", ".join(self.models))
        best_of = self._best_of.get(name, 1) if request.best_of == 1 else request.best_of
        _check_values(request, best_of)
        if best_of > 1 and not self.has_reward:
            raise UsageError(
                f"best_of {best_of} without a reward model",
                expected="a run whose reward model is trained",
            )
        _check_turns(request.messages)
        prompt, dropped, limit = self._fitted(request)
        if request.constraint is not None:
            _ = request.constraint.grammar  # raises
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        return _Job(
            request,
            self.models[name],
            prompt,
            limit,
            dropped,
            seed,
            best_of,
            on_delta,
            Handle(),
            time.monotonic(),
        )

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
                f"the last turn has {len(ids):,} tokens with its frame",
                expected=f"fewer than the context has: {self.context:,}",
                remedy="shorten it",
            )
        return ids, dropped, min(wanted, self.context - len(ids))

    def _encode(self, turns: Turns) -> list[int]:
        clean = [{**turn, "content": self._plain(turn["content"])} for turn in turns]
        if not self.base.tokenizer.chat_template:
            return self.base.encode_prompt(without_template(clean, 0))
        try:
            return self.base.encode_prompt(clean)
        except Exception as error:  # a template may raise anything
            raise UsageError(
                f"the chat template refuses the conversation: {first_line(error)}",
                expected="user and assistant in turn; not every model takes a system turn",
            ) from None

    # ------------------------------------------------------------------------- work

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._closed:
                job.handle._future.set_exception(CancelledError())
                continue
            try:
                with self._lock:
                    completion = self._answer(job)
            except BaseException as error:
                job.handle._future.set_exception(error)
            else:
                job.handle._future.set_result(completion)

    @torch.inference_mode()
    def _answer(self, job: _Job) -> Completion:
        job.begun = time.monotonic()
        request = job.request
        rows = [self._row(job, i) for i in range(request.n * job.best_of)]
        with self._adapters.active(self._folders[job.model.name]):
            for index, row in enumerate(rows):
                self._grow(job, row, index)
        return self._finished(job, rows)

    def _row(self, job: _Job, index: int) -> _Row:
        matcher = None
        if job.request.constraint is not None:
            columns = self.base.causal.get_output_embeddings().weight.shape[0]
            matcher = job.request.constraint.matcher(
                self.base.tokenizer, columns, self.base.eos_ids
            )
        digest = hashlib.blake2b(f"{job.seed} {index}".encode(), digest_size=4).digest()
        return _Row(int.from_bytes(digest), _Text(self.base, job.request.stop), matcher)

    def _grow(self, job: _Job, row: _Row, index: int) -> None:
        cache = DynamicCache(config=self.base.causal.config)
        ids = job.prompt
        while not row.finish:
            out = self.base.causal(
                input_ids=torch.tensor([ids], device=self.base.device),
                **{self._cache_name: cache},
                use_cache=True,
                logits_to_keep=1,
            )
            logits = out.logits[:, -1].float()
            allowed = logits
            if row.matcher is not None:
                mask = torch.from_numpy(row.matcher.allowed()).to(logits.device)
                allowed = logits.masked_fill(~mask, -torch.inf)
            one = (job.request.temperature,), (job.request.top_p,), (row.seed,), (len(row.ids),)
            token = int(token_draw.draw(allowed.clone(), *one))
            self._accept(job, row, index, token, logits[0])
            ids = [token]

    def _accept(self, job: _Job, row: _Row, index: int, token: int, logits: torch.Tensor) -> None:
        """Add a token to a row, and tell the listener of its text."""
        job.first = job.first or time.monotonic()
        row.ids.append(token)
        if job.request.logprobs is not None:
            row.logprobs.append(self._logprob(logits, token, job.request.logprobs))
        if row.matcher is not None:
            row.matcher.consume(token)
        new = ""
        if token in self.base.eos_ids:
            row.finish = "stop"
        else:
            new = row.text.feed(token)
            if row.text.stopped or (row.matcher is not None and row.matcher.complete):
                row.finish = "stop"
            elif len(row.ids) >= job.limit:
                row.finish = "length"
        if job.handle._cancelled.is_set() or self._closed:
            row.finish = row.finish or "cancelled"
        if row.finish:
            new += row.text.finish()
        if new and job.on_delta is not None and job.best_of == 1:
            job.on_delta(Delta(index, new))

    def _logprob(self, logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
        logprobs = logits.log_softmax(dim=-1)
        top = logprobs.topk(count) if count else None
        most = (
            [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        )
        return TokenLogprob(
            self._name(token), token, float(logprobs[token]), [(self._name(i), p) for i, p in most]
        )

    def _name(self, token: int) -> str:
        return str(self.base.tokenizer.decode([token]))

    def _finished(self, job: _Job, rows: list[_Row]) -> Completion:
        request = job.request
        if self.has_reward and all(row.finish != "cancelled" for row in rows):
            answers = [[*(i for i in row.ids if i not in self.base.eos_ids)] for row in rows]
            rewards = self._rewards(job.prompt, answers)
            for row, reward in zip(rows, rewards, strict=True):
                row.reward = reward
        chosen = []
        for index in range(request.n):
            group = rows[index * job.best_of : (index + 1) * job.best_of]
            best = max(group, key=lambda row: -math.inf if row.reward is None else row.reward)
            chosen.append(best)
            if job.best_of > 1 and job.on_delta is not None and best.text.text:
                job.on_delta(Delta(index, best.text.text))
        now = time.monotonic()
        return Completion(
            [self._choice(job, row) for row in chosen],
            job.model.name,
            len(job.prompt),
            sum(len(row.ids) for row in rows),
            job.begun - job.submitted,
            (job.first or now) - job.submitted,
            now - job.submitted,
            job.dropped,
        )

    def _choice(self, job: _Job, row: _Row) -> Choice:
        text, constraint = row.text.text, job.request.constraint
        if not self.base.tokenizer.chat_template:
            text = completed(text)
        assert row.finish
        valid = None
        if constraint is not None:
            valid = row.finish == "stop" and constraint.check(text) is None
        logprobs = None if job.request.logprobs is None else row.logprobs
        return Choice(text, row.ids, row.finish, logprobs, row.reward, valid)

    # ---------------------------------------------------------------------- scoring

    def score(self, messages: Turns, texts: Sequence[str]) -> list[float]:
        """Return the reward of each answer, offsets included and an ensemble combined.

        Raises:
            UsageError: There is no reward model, or an answer does not fit the context.
        """
        prompt = self._encode(messages)
        answers = [self.base.encode_completion(text)[:-1] for text in texts]
        with self._lock:
            return self._rewards(prompt, answers)

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

    @torch.inference_mode()
    def per_token_kl(
        self, messages: Turns, ids: Sequence[int], model: str = "", against: str = "sft"
    ) -> list[float]:
        """Return KL(model || against) in nats at each token of an answer, before it was drawn."""
        name = model or self.default
        for one in (name, against):
            if one not in self.models:
                raise UsageError(f"unknown model {one!r}", expected=", ".join(self.models))
        if not ids:
            return []
        row = torch.tensor([[*self._encode(messages), *ids]], device=self.base.device)
        each = []
        with self._lock:
            for one in (name, against):
                with self._adapters.active(self._folders[one]):
                    out = self.base.causal(
                        input_ids=row, use_cache=False, logits_to_keep=len(ids) + 1
                    )
                each.append(out.logits[0, :-1].double().log_softmax(dim=-1))
        return [float(x) for x in (each[0].exp() * (each[0] - each[1])).sum(dim=-1).clamp(min=0)]


def _section(target: targets.Target, records: dict[Path, Record]) -> ModelSection:
    """Return a target's base; a run's at the precision of its training."""
    if target.base is None:
        raise UsageError(
            f"{target.name} is a server, and nothing of it can be loaded",
            expected="a run, RUN:policy, an adapter folder, a model folder or a Hub id",
        )
    if target.run is None:
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
            raise UsageError(f"{name} {value!r:.40}", expected=f"{low:g} to {high:,g}")
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
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"a turn is not valid Unicode: half of a surrogate pair at {error.start}",
                remedy="give the text in UTF-8",
            ) from None
    if not messages or messages[-1]["role"] != "user":
        raise UsageError("the conversation does not end with a turn of the user")
