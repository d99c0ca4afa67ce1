# SPDX-License-Identifier: Apache-2.0
"""The thread that computes answers: jobs join and leave one batch between two tokens."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lora_rlhf.errors import UsageError
from lora_rlhf.models import token_draw
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.models.decode_batch import DecodeBatch, Group

from .structured import Matcher

_LONGEST_CHARACTER = 8  # tokens: four bytes, and some for tokenizers with rarer pieces


class QueueFull(UsageError):
    """More requests wait than the engine's `max_waiting`.

    Ask again later.
    """


@dataclass
class TokenLogprob:
    """A token with its log-prob under the model at temperature 1, and the most probable ones."""

    token: str
    id: int
    logprob: float
    top: list[tuple[str, float]]


class GrowingText:
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
        new = self._new()
        if new.endswith("\ufffd") and len(self._ids) - self._read < _LONGEST_CHARACTER:
            return ""  # bytes of a character that is not complete
        self._read = len(self._ids)
        return self._emit(new, final=False)

    def finish(self) -> str:
        """Return what was held back."""
        new = self._new()
        self._read = len(self._ids)
        return self._emit(new, final=True)

    def _new(self) -> str:
        """Decode the unread tokens after the last one read, on which their white space depends."""
        start = max(0, self._read - 1)
        whole = self._base.decode(self._ids[start:])
        return whole[len(self._base.decode(self._ids[start : self._read])) :]

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
class Row:
    """One sample while it grows."""

    index: int
    seed: int
    text: GrowingText
    matcher: Matcher | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    streamed: int = 0  # tokens that the listener has heard of
    finish: Literal["stop", "length", "cancelled", ""] = ""


@dataclass
class Job:
    """Samples of one prompt.

    Attributes:
        adapter: PEFT's name of it, or `stacked_lora.BASE`.
        limit: Tokens of the longest answer.
        whole: End structured answers in their form before the limit cuts them.
        on_text: Called with a row's index, its new text, and the log-probs of the tokens since.
        done: Makes the result when all rows have ended.
    """

    prompt: list[int]
    adapter: str
    limit: int
    rows: list[Row]
    temperature: float
    top_p: float
    logprobs: int | None
    whole: bool
    on_text: Callable[[int, str, list[TokenLogprob]], None] | None
    done: Callable[[Job], Any]
    future: Future[Any] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    submitted: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    first: float = 0.0
    group: Group | None = None
    pieces: Iterator[tuple[Group, Tensor]] | None = None

    @property
    def cells(self) -> int:
        """Tokens that its cache may come to hold."""
        return len(self.rows) * (len(self.prompt) + self.limit)

    @property
    def live(self) -> list[Row]:
        """Rows that are still growing, in the order of the group's rows."""
        return [row for row in self.rows if not row.finish]


def seed_of(seed: int, index: int) -> int:
    """Return the seed of a request's sample, below 2^32."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest)


class Worker:
    """Computes jobs in the order in which they came, as many at once as there is room for.

    Args:
        max_rows: Samples in the batch; a larger job gets the batch to itself.
        max_cells: Tokens in the caches of all samples.
        max_waiting: Jobs that may wait to begin.
    """

    def __init__(
        self,
        base: BaseModel,
        batch: DecodeBatch,
        *,
        max_rows: int,
        max_cells: int,
        max_waiting: int,
    ) -> None:
        self._base, self._batch = base, batch
        self._eos = set(base.eos_ids)
        self.max_rows, self.max_cells, self.max_waiting = max_rows, max_cells, max_waiting
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._prefilling: deque[Job] = deque()
        self._active: list[Job] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFull: Too many wait.
            UsageError: The worker is closed.
        """
        with self._wake:
            self._check_open()
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait", remedy="ask again in some seconds"
                )
            self._waiting.append(job)
            self._wake.notify()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the thread, between two tokens; returns its result."""
        if threading.current_thread() is self._thread:
            return function()
        future: Future[Any] = Future()
        with self._wake:
            self._check_open()
            self._calls.append((function, future))
            self._wake.notify()
        return future.result()

    def close(self) -> None:
        """End the thread after the current token; running jobs end with CancelledError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the engine is closed")

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._await_work():
                self._prefill()
                if self._active:
                    self._step()
        finally:  # also after an error of ours, so that nobody goes on waiting
            with self._wake:
                self._closed = True
            for job in [*self._waiting, *self._prefilling, *self._active]:
                _fail(job, CancelledError())
            for _, future in self._calls:
                future.set_exception(CancelledError())

    def _step(self) -> None:
        """Compute one token of all active jobs."""
        jobs, self._active = self._active, []
        try:
            tokens = [[row.ids[-1] for row in job.live] for job in jobs]
            logits = self._batch.step([_group(job) for job in jobs], tokens)
        except Exception as error:  # out of memory, for example
            for job in jobs:
                _fail(job, error)
        else:
            self._draw(jobs, logits)

    def _await_work(self) -> bool:
        """Wait for work, admit jobs and run calls; returns False once closed."""
        with self._wake:
            while not (
                self._closed or self._calls or self._waiting or self._prefilling or self._active
            ):
                self._wake.wait()
            calls, self._calls = self._calls, deque()
            dropped = [job for job in self._waiting if job.cancelled.is_set()]
            self._waiting = deque(job for job in self._waiting if not job.cancelled.is_set())
            while self._waiting and self._has_room(self._waiting[0]):
                self._prefilling.append(self._waiting.popleft())
        for job in dropped:
            self._complete(job)
        for function, future in calls:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
        return not self._closed

    def _has_room(self, job: Job) -> bool:
        inside = [*self._prefilling, *self._active]
        rows = sum(len(one.rows) for one in inside) + len(job.rows)
        cells = sum(one.cells for one in inside) + job.cells
        return not inside or (rows <= self.max_rows and cells <= self.max_cells)

    def _prefill(self) -> None:
        """Compute one piece of the first prompt that is not complete."""
        if not self._prefilling:
            return
        job = self._prefilling[0]
        try:
            if job.pieces is None:
                job.begun = time.monotonic()
                job.pieces = self._batch.begin(job.prompt, job.adapter, len(job.rows))
            job.group, logits = next(job.pieces)
        except Exception as error:
            self._prefilling.popleft()
            _fail(job, error)
            return
        if job.cancelled.is_set():
            self._prefilling.popleft()
            self._complete(job)
        elif job.group.length == len(job.prompt):
            self._prefilling.popleft()
            self._draw([job], logits.expand(len(job.rows), -1))

    def _draw(self, jobs: list[Job], logits: Tensor) -> None:
        """Draw the next token of all rows; the jobs that go on become active."""
        allowed, kept, at = logits, [], 0
        for job in jobs:
            rows = job.live
            try:
                for offset, row in enumerate(rows):
                    if row.matcher is not None:
                        allowed = allowed.clone() if allowed is logits else allowed
                        mask = torch.from_numpy(row.matcher.allowed()).to(logits.device)
                        allowed[at + offset].masked_fill_(~mask, -torch.inf)
                kept.append((job, rows, at))
            except Exception as error:
                _fail(job, error)
            at += len(rows)
        live = [(job, row, at + i) for job, rows, at in kept for i, row in enumerate(rows)]
        if not live:
            return
        try:
            tokens = token_draw.draw(
                allowed[[at for _, _, at in live]],
                [job.temperature for job, _, _ in live],
                [job.top_p for job, _, _ in live],
                [row.seed for _, row, _ in live],
                [len(row.ids) for _, row, _ in live],
            ).tolist()
        except Exception as error:  # out of memory, for example
            for job, _, _ in kept:
                _fail(job, error)
            return
        drawn = dict(zip((at for _, _, at in live), tokens, strict=True))
        for job, rows, at in kept:
            try:
                for offset, row in enumerate(rows):
                    self._accept(job, row, drawn[at + offset], logits[at + offset])
                if going := [i for i, row in enumerate(rows) if not row.finish]:
                    if len(going) < len(rows):
                        _group(job).keep(going)
                    self._active.append(job)
            except Exception as error:  # of the listener
                _fail(job, error)
                continue
            if not going:
                self._complete(job)

    def _accept(self, job: Job, row: Row, token: int, logits: Tensor) -> None:
        """Add a token to a row, and tell the listener of its text."""
        job.first = job.first or time.monotonic()
        if row.matcher is not None:
            token = self._unrepeated(job, row, token, logits)
        if row.matcher is not None and job.whole:
            token = row.matcher.within(token, job.limit - len(row.ids))
        row.ids.append(token)
        if job.logprobs is not None:
            row.logprobs.append(self._logprob(logits, token, job.logprobs))
        if row.matcher is not None:
            row.matcher.consume(token)
        new = ""
        if token in self._eos:
            row.finish = "stop"
        else:
            new = row.text.feed(token)
            if row.text.stopped or (row.matcher is not None and row.matcher.complete):
                row.finish = "stop"
            elif len(row.ids) >= job.limit:
                row.finish = "length"
        if row.finish == "stop" and row.matcher is not None and row.matcher.forced:
            row.finish = "length"
        if job.cancelled.is_set():
            row.finish = row.finish or "cancelled"
        if row.finish:
            new += row.text.finish()
        if new and job.on_text is not None:
            since, row.streamed = row.logprobs[row.streamed :], len(row.logprobs)
            job.on_text(row.index, new, since)

    def _unrepeated(self, job: Job, row: Row, token: int, logits: Tensor) -> int:
        """Draw again, without the token, while it would end a JSON key for the second time."""
        left = None
        assert row.matcher is not None
        while row.matcher.repeats(token):
            if left is None:
                mask = torch.from_numpy(row.matcher.allowed()).to(logits.device)
                left = logits.masked_fill(~mask, -torch.inf)
            left[token] = -torch.inf
            if not bool(left.isfinite().any()):
                break
            one = [job.temperature], [job.top_p], [row.seed], [len(row.ids)]
            token = int(token_draw.draw(left.unsqueeze(0).clone(), *one))
        return token

    def _logprob(self, logits: Tensor, token: int, count: int) -> TokenLogprob:
        logprobs = logits.log_softmax(dim=-1)
        top = logprobs.topk(count) if count else None
        most = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else []
        name = self._base.tokenizer.decode
        return TokenLogprob(
            str(name([token])),
            token,
            float(logprobs[token]),
            [(str(name([i])), p) for i, p in most],
        )

    def _complete(self, job: Job) -> None:
        if job.group is not None and job.group.length >= len(job.prompt):
            try:
                self._batch.keep(job.group, job.rows[0].ids if len(job.rows) == 1 else [])
            except RuntimeError:  # no memory: the next prompt is computed whole
                self._batch.forget()
        job.group = job.pieces = None
        for row in job.live:
            row.finish = "cancelled"
        try:
            result = job.done(job)
        except Exception as error:
            _fail(job, error)
        else:
            job.future.set_result(result)


def _group(job: Job) -> Group:
    assert job.group is not None
    return job.group


def _fail(job: Job, error: BaseException) -> None:
    job.group = job.pieces = None
    job.future.set_exception(error)
