# SPDX-License-Identifier: Apache-2.0
"""The chat-completions API on one base: base, SFT, policy and other adapters, chosen per request.

A request needs the server's key, and its Host must be the server's own. Nothing of a conversation
is stored or logged, but for the text of an answer that somebody gives a thumb. Docs: docs/use.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lora_rlhf import extras
from lora_rlhf.errors import LoraRlhfError, UsageError, first_line
from lora_rlhf.redaction import printable
from lora_rlhf.runtime import interrupts
from lora_rlhf.runtime.local_server import LOOPBACK, LocalServer, is_loopback, knows_host

from . import chat_protocol as protocol
from . import usage_store
from .chat_protocol import ApiError
from .inference import Completion, Delta, Handle, InferenceEngine, Model, QueueFull, Request
from .usage_store import UsageStore, Use

_NEEDS = ("the API server", "serve")
applications: Any = extras.load("starlette.applications", *_NEEDS)
prometheus: Any = extras.load("prometheus_client", *_NEEDS)
requests: Any = extras.load("starlette.requests", *_NEEDS)
responses: Any = extras.load("starlette.responses", *_NEEDS)
routing: Any = extras.load("starlette.routing", *_NEEDS)

prometheus.disable_created_metrics()  # dates of counters, which would double the page

KEY = "LORA_RLHF_API_KEY"
"""Variable with the key of the server; `evaluate` sends it to servers that it asks."""

SHORTEST_KEY = 16
CLOSED = 499
"""Status of a request whose client hung up, as nginx counts it; nobody receives it."""

_BODY_SECONDS = 30.0  # for a client to send its request, or to read an error
_KEPT = 10_000_000  # characters of answers that may still get a thumb
_OBJECT = 300  # bytes that an empty text takes with what holds it
_UNWRITTEN = 1_000  # requests that wait for the usage store; with their prompts
_REFUSED_BODY_SECONDS = 1.0  # for the body of a request that gets 429, to learn its model
_THREADS = 8  # that read prompts, compile grammars and moderate
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def _draining() -> ApiError:
    """Make the error anew: one that was raised keeps its frames, and with them engine and texts."""
    return ApiError(503, "the server is shutting down", "draining", retry=30)


@dataclass(frozen=True)
class Access:
    """Address and key of a server.

    Args:
        key: Empty: the one in `variable`, or a new one.
    """

    host: str = LOOPBACK
    port: int = 0
    key: str = field(default="", repr=False)
    variable: str = KEY

    def __post_init__(self) -> None:
        key = self.key or os.environ.get(self.variable, "")
        if not key and not is_loopback(self.host):
            raise UsageError(
                f"{self.host} can be reached from other machines, and there is no key",
                expected=f"{LOOPBACK}, or a key for the clients",
                remedy=f"set {self.variable}, or leave --host out and let clients come through an "
                "SSH tunnel",
            )
        if key and not (len(key) >= SHORTEST_KEY and key.isascii() and key.isprintable()):
            raise UsageError(
                f"the key in {self.variable} has {len(key)} characters",
                expected=f"{SHORTEST_KEY} or more, ASCII that can be printed",
            )
        object.__setattr__(self, "key", key or secrets.token_urlsafe(32))

    def admits(self, authorization: str) -> bool:
        """Return True for the right key."""
        scheme, _, given = authorization.partition(" ")
        right = secrets.compare_digest(given.strip().encode(), self.key.encode())
        return right and scheme.lower() == "bearer"


@dataclass(frozen=True)
class Limits:
    """Bounds of one request and of all.

    Args:
        body: Bytes of a request.
        prompt: Tokens; None: as many as the context has.
        answer: Tokens; None: as many as the context leaves.
        queue: Requests in work and waiting.
        seconds: For one request, with its wait.
        drain: Seconds that running requests get after a signal.
    """

    body: int = 1_000_000
    prompt: int | None = None
    answer: int | None = None
    queue: int = 64
    seconds: float = 300.0
    drain: float = 30.0


class _Metrics:
    """Counters for Prometheus."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()

        def made(kind: str, name: str, text: str, *labels: str, **options: Any) -> Any:
            options["registry"] = self.registry
            return getattr(prometheus, kind)(f"lora_rlhf_{name}", text, labels, **options)

        self.requests = made("Counter", "requests", "Requests by status.", "model", "status")
        self.tokens = made("Counter", "tokens", "Tokens of prompts and answers.", "model", "kind")
        self.blocked = made("Counter", "blocked", "Requests that moderation blocked.", "model")
        self.invalid = made("Counter", "invalid", "Structured answers that are not valid.", "model")
        self.thumbs = made("Counter", "thumbs", "Thumbs.", "model", "thumb")
        self.lost = made("Counter", "unrecorded", "Requests that the store could not take.")
        self.active = made("Gauge", "active", "Requests in work and waiting.")
        self.times = {
            key: made("Histogram", f"{key}_seconds", text, "model", buckets=_BUCKETS)
            for key, text in (
                ("queue", "Wait until a prompt is computed."),
                ("first_token", "Until the first token."),
                ("total", "Until the answer is complete."),
            )
        }

    def count(self, use: Use) -> None:
        """Count one request."""
        self.requests.labels(use.model, use.status).inc()
        self.blocked.labels(use.model).inc(use.blocked)
        self.invalid.labels(use.model).inc(use.valid is False)
        if use.completion_tokens:
            self.tokens.labels(use.model, "prompt").inc(use.prompt_tokens)
            self.tokens.labels(use.model, "completion").inc(use.completion_tokens)
            self.times["queue"].labels(use.model).observe(use.queue_s)
            self.times["total"].labels(use.model).observe(use.seconds)
            if use.first_token_s is not None:
                self.times["first_token"].labels(use.model).observe(use.first_token_s)


@dataclass
class _Kept:
    """A completion that may get a thumb."""

    model: Model
    turns: Sequence[dict[str, str]]
    answers: list[str]

    @property
    def size(self) -> int:
        texts = [*(turn["content"] for turn in self.turns), *self.answers]
        return sum(map(len, texts)) + _OBJECT * (1 + len(texts))


class _Guard:
    """ASGI middleware that checks Host and key, refuses while draining, and protects answers."""

    def __init__(self, app: Any, api: Api, access: Access) -> None:
        self.app, self.api, self.access = app, api, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        try:
            self._check(requests.Request(scope))
        except ApiError as error:
            await _response(error)(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    def _check(self, request: Any) -> None:
        access, given = self.access, request.headers
        shared = not is_loopback(access.host)
        if not knows_host(given.get("host", ""), access.host, access.port, shared=shared):
            message = "the request's Host is not this server's: use the base URL that it printed"
            raise ApiError(403, message, "unknown_host")
        if request.url.path == "/health":
            return
        if not access.admits(given.get("authorization", "")):
            message = "the key is missing or wrong: send `Authorization: Bearer KEY`"
            raise ApiError(401, message, "invalid_api_key")
        if self.api.draining and request.url.path != "/metrics":
            raise _draining()


def _response(error: ApiError) -> Any:
    headers = dict(error.headers)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return responses.JSONResponse(error.body, status_code=error.status, headers=headers)


class Api:
    """The answers to requests: computed by an engine, counted in a usage store."""

    def __init__(
        self,
        engine: InferenceEngine,
        limits: Limits,
        store: UsageStore | None = None,
        moderation: Any = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.engine, self.limits, self.store = engine, limits, store
        self.moderation, self.say = moderation, say
        self.metrics, self.created = _Metrics(), time.time()
        self.draining, self.active, self.mean_seconds = False, 0, 1.0
        self.handles: set[Handle] = set()
        self.pool = ThreadPoolExecutor(_THREADS, "api")
        self._writer, self._room = ThreadPoolExecutor(1, "usage"), threading.Semaphore(_UNWRITTEN)
        self.unrecorded = 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._size = 0

    def application(self, access: Access) -> Any:
        """Return the ASGI application."""
        routes = [
            routing.Route("/health", self._health),
            routing.Route("/metrics", self._prometheus),
            routing.Route("/v1/models", self._models),
            routing.Route("/v1/models/{name:path}", self._model),
            routing.Route("/v1/feedback", self._feedback, methods=["POST"]),
            routing.Route("/v1/chat/completions", _Endpoint(self), methods=["POST"]),
        ]

        async def failed(request: Any, error: Any) -> Any:
            if isinstance(error, ApiError):
                return _response(error)
            status = getattr(error, "status_code", 500)
            if status == 500:
                self.say(_placed(error))
            texts = {
                404: f"there is no {request.url.path:.100}",
                405: f"{request.method} does nothing here",
            }
            return _response(ApiError(status, texts.get(status, "the server failed")))

        handlers = dict.fromkeys((ApiError, 404, 405, Exception), failed)
        app = applications.Starlette(routes=routes, exception_handlers=handlers)
        return _Guard(app, self, access)

    async def _health(self, _: Any) -> Any:
        state, status = ("draining", 503) if self.draining else ("ok", 200)
        return responses.JSONResponse({"status": state}, status_code=status)

    async def _prometheus(self, _: Any) -> Any:
        self.metrics.active.set(self.active)
        text = prometheus.generate_latest(self.metrics.registry)
        return responses.Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    async def _models(self, _: Any) -> Any:
        data = protocol.models([*self.engine.models.values()], self.created)
        return responses.JSONResponse({"object": "list", "data": data})

    async def _model(self, request: Any) -> Any:
        model = self.named(request.path_params["name"])
        return responses.JSONResponse(protocol.models([model], self.created)[0])

    async def _feedback(self, request: Any) -> Any:
        given = protocol.parse(await self.body(request), protocol.Thumb)
        if self.store is None:
            raise ApiError(404, "this server keeps no thumbs: it was started with --no-usage")
        name, kept = given.completion_id, self._kept.get(given.completion_id)
        if kept is None and not await self.threaded(self.store.knows, name):
            raise ApiError(404, "no completion has this id", "not_found", "completion_id")
        choice, count = given.choice or 0, len(kept.answers) if kept else 128
        if choice >= count or (given.choice is None and kept and count > 1):
            message = f"choice: expected the index of the answer, 0 to {count - 1}"
            raise ApiError(400, message, "invalid_value", "choice")
        about: dict[str, Any] = {"choice": choice}
        if kept is not None:
            about |= {"messages": kept.turns, "answer": kept.answers[choice]}
            about |= {"model": kept.model.name, "version": kept.model.adapter}
        save = functools.partial(self.store.thumb, **about)
        await self.threaded(save, name, given.thumb == "up", given.comment)
        self.metrics.thumbs.labels(about.get("model", ""), given.thumb).inc()
        return responses.JSONResponse(
            {"completion_id": name, "choice": choice, "text_stored": kept is not None}
        )

    def named(self, name: str) -> Model:
        """Return a model by its name; an empty one is the default."""
        try:
            return self.engine.models[name or self.engine.default]
        except KeyError:
            known = ", ".join(self.engine.models)
            message = f"the model {name!r:.100} does not exist; there are: {known}"
            raise ApiError(404, message, "model_not_found", "model") from None

    async def threaded(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call a function that takes time in another thread."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, call, *args)

    def model_of(self, body: bytes) -> Model | None:
        """Return the model that a refused body asks for; None if it names none that is here."""
        try:
            return self.named(str(json.loads(body).get("model", "")))
        except (ValueError, RecursionError, AttributeError, ApiError):
            return None

    async def body(self, request: Any, seconds: float | None = None) -> bytes:
        """Read a body, which must say that it is JSON: other sites' pages cannot without CORS."""
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise ApiError(415, "the content type is not `Content-Type: application/json`")
        raw, most, seconds = bytearray(), self.limits.body, seconds or _BODY_SECONDS
        too_long = ApiError(413, f"the body has over {most:,} bytes", "body_too_large")
        if int(request.headers.get("content-length") or 0) > most:
            raise too_long
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    raw += part
                    if len(raw) > most:
                        raise too_long
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {seconds:g} s") from None
        return bytes(raw)

    def fitted(self, wanted: Request) -> Request:
        """Return the request with its longest answer, within the limits; it takes time.

        The engine would cut the history of a conversation that is too long; an API says so.
        """
        limits, context = self.limits, self.engine.context
        try:
            tokens = self.engine.count_tokens(wanted.messages)
        except UsageError as error:
            raise protocol.refused(error) from None
        if limits.prompt is not None and tokens > limits.prompt:
            message = f"the prompt has {tokens:,} tokens; this server takes {limits.prompt:,}"
            raise ApiError(413, message, "prompt_too_large", "messages")
        most, room = limits.answer or context, context - tokens
        answer = wanted.max_tokens or max(1, min(self.engine.max_tokens, most, room))
        if answer > most:
            message = f"max_tokens {answer:,}; this server gives {most:,}"
            raise ApiError(400, message, "invalid_value", "max_tokens")
        if answer > room:
            message = f"the context has {context:,} tokens; prompt {tokens:,}, answer {answer:,}"
            raise ApiError(400, message, "context_length_exceeded", "messages")
        return replace(wanted, max_tokens=answer)

    def keep(self, name: str, kept: _Kept) -> None:
        """Keep an answer in memory until newer ones need the room."""
        self._kept[name] = kept
        self._size += kept.size
        while self._size > _KEPT:
            self._size -= self._kept.popitem(last=False)[1].size

    def record(self, use: Use) -> None:
        """Count a request and store it, without waiting for the disk."""
        self.metrics.count(use)
        if use.completion_tokens:
            self.mean_seconds += 0.1 * (use.seconds - self.mean_seconds)
        if self.store is None:
            return
        if self._room.acquire(blocking=False):
            self._writer.submit(self._write, use)
        else:  # the disk hangs, or is far too slow
            self._lost(f"the usage store is behind by {_UNWRITTEN:,} requests, and misses some")

    def _write(self, use: Use) -> None:
        try:
            self.store.record(use)  # type: ignore[union-attr]
        except LoraRlhfError as error:
            self._lost(first_line(error))
        finally:
            self._room.release()

    def _lost(self, why: str) -> None:
        """Count a request that is not stored; tell the first one, and at the end their number."""
        self.unrecorded += 1
        self.metrics.lost.inc()
        if self.unrecorded == 1:
            self.say(why)

    def close(self) -> None:
        """Cancel what is running, and wait for the last writes."""
        for handle in [*self.handles]:
            handle.cancel()
        self.pool.shutdown(cancel_futures=True)
        self._writer.shutdown()
        if self.unrecorded:
            self.say(f"requests that the usage store misses: {self.unrecorded:,}")


class _Endpoint:
    """POST /v1/chat/completions."""

    def __init__(self, api: Api) -> None:
        self.api = api

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        api, answer = self.api, _Answer(self.api, send)
        request, raw, full = requests.Request(scope, receive), b"", api.active >= api.limits.queue
        api.active += not full
        try:
            if full:
                with contextlib.suppress(ApiError):
                    raw = await api.body(request, _REFUSED_BODY_SECONDS)
                retry = max(1, math.ceil(api.mean_seconds))
                raise ApiError(429, f"{api.active} requests are in work", "queue_full", retry=retry)
            raw = await api.body(request)
            answer.chat = protocol.parse(raw)
            await _unless_closed(answer.run(), receive)
        except ApiError as error:
            await answer.fail(error, scope, receive)
        except requests.ClientDisconnect:
            answer.status = CLOSED
        except asyncio.CancelledError:  # a second signal, or the end of the time to drain
            await answer.fail(_draining(), scope, receive)
        except Exception as error:
            api.say(_placed(error))
            await answer.fail(ApiError(500, "the model failed", "engine"), scope, receive)
        finally:
            api.active -= not full
            answer.model = answer.model or api.model_of(raw)
            api.record(answer.use())


def _placed(error: BaseException) -> str:
    """Return class and place of an error; its message could hold text of a conversation."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"unexpected {type(error).__name__}{at}"


async def _unless_closed(work: Any, receive: Any) -> None:
    """Await the work; cancel it if the client hangs up.

    Raises:
        ClientDisconnect: It has.
    """

    async def closed() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    both = asyncio.ensure_future(work), asyncio.ensure_future(closed())
    try:
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in both:
            task.cancel()
    if both[0] not in done:
        await asyncio.wait(both[:1])
        raise requests.ClientDisconnect
    await both[0]


class _Answer:
    """One request on its way: from the parsed body to the last byte."""

    chat: protocol.Chat | None = None
    model: Model | None = None
    completion: Completion | None = None
    started = False  # the status is sent

    def __init__(self, api: Api, send: Any) -> None:
        self.api, self.send = api, send
        self.id, self.created, self.begun = usage_store.new_id(), time.time(), time.monotonic()
        self.status = 200
        self.blocked: set[int] = set()  # answers; all of them if it was the prompt
        self.logprobs: dict[int, protocol.StreamedLogprobs] = defaultdict(protocol.StreamedLogprobs)

    def use(self) -> Use:
        """Return the numbers of the request."""
        done, chat = self.completion, self.chat
        valid = (
            [choice.valid for choice in done.choices if choice.valid is not None] if done else []
        )
        return Use(
            self.id,
            "serve",
            self.model.name if self.model else "",
            self.model.adapter if self.model else "",
            self.status,
            done.prompt_tokens if done else 0,
            done.completion_tokens if done else 0,
            queue_s=done.queue_s if done else 0.0,
            first_token_s=done.first_token_s if done else None,
            seconds=time.monotonic() - self.begun,
            blocked=bool(self.blocked),
            valid=all(valid) if valid else None,
            prompt=chat.turns if chat else (),
            created=self.created,
        )

    async def fail(self, error: ApiError, scope: Any, receive: Any) -> None:
        """Send an error, as an event if the stream has begun; a client must read it in time."""
        self.status = error.status
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BODY_SECONDS):
                if not self.started:
                    await _response(error)(scope, receive, self.send)
                else:
                    await self._push(error.body)
                    await self._end()

    async def run(self) -> None:
        """Generate and send.

        Raises:
            ApiError: The request is refused, or takes too long.
        """
        api, chat = self.api, self.chat
        assert chat is not None
        self.model = api.named(chat.model)
        wanted = await api.threaded(lambda: api.fitted(chat.request()))
        try:
            async with asyncio.timeout(api.limits.seconds):
                if not await api.threaded(self._passes, chat):
                    self.blocked = {*range(wanted.n)}
                    await self._send_whole(None)
                elif chat.stream:
                    await self._stream(wanted)
                else:
                    await self._whole(wanted)
        except TimeoutError:
            retry = max(1, math.ceil(api.mean_seconds))
            message = f"the answer took over {api.limits.seconds:g} s"
            raise ApiError(503, message, "timeout", retry=retry) from None
        except QueueFull:  # of jobs whose clients hung up
            retry = max(1, math.ceil(api.mean_seconds))
            raise ApiError(429, "too many requests wait", "queue_full", retry=retry) from None
        except UsageError as error:
            raise protocol.refused(error) from None

    def _passes(self, chat: protocol.Chat) -> bool:
        """Moderate the prompt and the turns before it."""
        if self.api.moderation is None:
            return True
        *earlier, prompt = (turn["content"] for turn in chat.turns)
        check = self.api.moderation.check  # of all earlier turns at once: the client wrote them all
        if earlier and check("\n".join(earlier), "history").action == "block":
            return False
        return bool(check(prompt, "prompt").action != "block")

    async def _submit(self, wanted: Request, put: Callable[[Delta | None], None]) -> Handle:
        """Hand the request to the engine; one that comes back too late is cancelled."""
        on_delta = put if self.chat is not None and self.chat.stream else None
        submit = asyncio.ensure_future(self.api.threaded(self.api.engine.submit, wanted, on_delta))
        try:
            handle: Handle = await asyncio.shield(submit)
        except asyncio.CancelledError:
            submit.add_done_callback(lambda f: f.exception() or f.result().cancel())
            raise
        self.api.handles.add(handle)
        handle.add_done_callback(lambda _: put(None))
        return handle

    async def _whole(self, wanted: Request) -> None:
        """Answer in one piece."""
        async for _ in self._deltas(wanted):
            pass
        completion, moderation = self.completion, self.api.moderation
        assert completion is not None
        if moderation is not None:
            prompt = wanted.messages[-1]["content"]
            for index, choice in enumerate(completion.choices):
                check = moderation.check, choice.text, "answer", prompt
                if (await self.api.threaded(*check)).action == "block":
                    self.blocked.add(index)
        await self._send_whole(completion)

    async def _deltas(self, wanted: Request) -> Any:
        """Yield what the engine generates; cancels it when left. `completion` is there then."""
        waiting: asyncio.Queue[Delta | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(delta: Delta | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(waiting.put_nowait, delta)

        handle = await self._submit(wanted, put)
        try:
            while (delta := await waiting.get()) is not None:
                yield delta
                if len(self.blocked) == wanted.n:
                    handle.cancel()
            self.completion = handle.result(0)
        except CancelledError:  # of the engine, which is closed
            raise _draining() from None
        finally:
            handle.cancel()
            self.api.handles.discard(handle)
        cut = [i for i, c in enumerate(self.completion.choices) if c.finish_reason == "cancelled"]
        if {*cut} - self.blocked:
            raise _draining()

    def _keep(self, completion: Completion) -> None:
        assert self.model is not None and self.chat is not None
        texts = ["" if i in self.blocked else c.text for i, c in enumerate(completion.choices)]
        if self.api.store is not None:
            self.api.keep(self.id, _Kept(self.model, self.chat.turns, texts))

    def _choices(self, completion: Completion | None, chunk: bool) -> list[dict[str, Any]]:
        assert self.chat is not None
        made: Sequence[Any] = completion.choices if completion else [None] * self.chat.n
        return [
            protocol.chosen(i, None if i in self.blocked else choice, chunk, self.logprobs[i].sent)
            for i, choice in enumerate(made)
        ]

    async def _send_whole(self, completion: Completion | None) -> None:
        """Send all answers; None: the prompt was blocked."""
        assert self.model is not None and self.chat is not None
        if completion is not None:
            self._keep(completion)
        if self.chat.stream:
            await self._begin()
            await self._finish(completion)
            return
        body = protocol.frame(self.id, self.created, self.model, False)
        body |= {"choices": self._choices(completion, False), "usage": protocol.usage(completion)}
        self.started = True
        await responses.JSONResponse(body)({"type": "http"}, None, self.send)

    # ------------------------------------------------------------------------ streaming

    async def _stream(self, wanted: Request) -> None:
        """Answer piece by piece, each sentence after it has passed moderation."""
        api, prompt = self.api, wanted.messages[-1]["content"]
        gates = [api.moderation.gate(prompt) for _ in range(wanted.n)] if api.moderation else []
        async with contextlib.aclosing(self._deltas(wanted)) as deltas:
            async for delta in deltas:
                if not self.started:
                    await self._begin()
                self.logprobs[delta.index].add(delta.text, delta.logprobs)
                await self._show(delta.index, delta.text, gates, "feed")
        if not self.started:
            await self._begin()
        for index in range(len(gates)):
            await self._show(index, None, gates, "finish")
        assert self.completion is not None
        self._keep(self.completion)
        await self._finish(self.completion)

    async def _show(
        self, index: int, text: str | None, gates: list[Any], step: Literal["feed", "finish"]
    ) -> None:
        """Send the part of an answer that may be seen now."""
        if index in self.blocked:
            return
        if gates:
            from .moderation import Blocked

            given = () if text is None else (text,)
            try:
                text = await self.api.threaded(getattr(gates[index], step), *given)
            except Blocked:
                self.blocked.add(index)
                return
        if text:
            logprobs = self.logprobs[index].shown(text)
            await self._chunk([protocol.piece(index, {"content": text}, logprobs)])

    async def _begin(self) -> None:
        assert self.chat is not None
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        self.started = True
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        for index in range(self.chat.n):
            await self._chunk([protocol.piece(index, {"role": "assistant", "content": ""})])

    async def _finish(self, completion: Completion | None) -> None:
        """Send the last chunk of each answer, the usage if it is wanted, and the end."""
        assert self.chat is not None
        for choice in self._choices(completion, True):
            await self._chunk([choice])
        if self.chat.stream_options.include_usage:
            await self._chunk([], usage=protocol.usage(completion))
        await self._end()

    async def _chunk(self, choices: list[Any], **more: Any) -> None:
        assert self.model is not None
        frame = protocol.frame(self.id, self.created, self.model, True)
        await self._push({**frame, "choices": choices, **more})

    async def _push(self, data: Any) -> None:
        body = {"type": "http.response.body", "body": protocol.event(data), "more_body": True}
        await self.send(body)

    async def _end(self) -> None:
        await self._push("[DONE]")
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})


class ApiServer(LocalServer):
    """The API on an open port; `run` serves until a signal and drains, `start` in a thread.

    Attributes:
        key: The key that clients send.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        access: Access | None = None,
        limits: Limits | None = None,
        *,
        store: UsageStore | None = None,
        moderation: Any = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        access = access or Access()
        super().__init__(access.host, access.port, _NEEDS)
        self.engine, self.key = engine, access.key
        self.api = Api(engine, limits or Limits(), store, moderation, say)
        application = self.api.application(replace(access, port=self.port))
        self._serves(application, timeout_graceful_shutdown=3)
        self._server.handle_exit = self._signalled
        self._second = ""

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"{self.address}v1"

    def lines(self) -> list[str]:
        """Return sentences that say how to use the server; a key of the user's is not shown."""
        given = f"the one in {KEY}" if os.environ.get(KEY) == self.key else self.key
        models = ", ".join(self.engine.models)
        return [f"base URL {self.url}", f"key {given}", f"models {models}", "Ctrl-C ends it"]

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        """Drain after the first signal; stop at once after the second."""
        if not self.api.draining:
            self.api.draining = True
            self.api.say(
                f"{signal.Signals(number).name}: {self.api.active} running requests get "
                f"{self.api.limits.drain:g} s; again to stop at once"
            )
            threading.Thread(target=self._drain, daemon=True).start()
        else:
            self._second = signal.Signals(number).name
            self._server.force_exit = self._server.should_exit = True

    def _drain(self) -> None:
        """Wait for running requests, up to the limit, and end the server."""
        end = time.monotonic() + self.api.limits.drain
        while self.api.active and time.monotonic() < end and not self._server.should_exit:
            time.sleep(0.05)
        self._server.should_exit = True

    def run(self) -> None:
        """Serve until a signal.

        Raises:
            Interrupted: A second signal came.
        """
        super().run()
        if self._second:
            raise interrupts.Interrupted(self._second)

    def stop(self) -> None:
        """Refuse new requests, let running ones end, and end the thread."""
        self.api.draining = True
        self._drain()
        super().stop()

    def close(self) -> None:
        """Close engine and store."""
        self.api.close()
        self.engine.close()
        if self.api.store is not None:
            self.api.store.close()


def serve(
    *targets: str | Path,
    host: str = LOOPBACK,
    port: int = 0,
    key: str = "",
    base: str | None = None,
    load_in_4bit: bool = False,
    usage: str | Path | None = None,
    moderation: str | Path = "default",
    moderation_log: Path | None = None,
    limits: Limits | None = None,
) -> ApiServer:
    """Load models and return their server, ready for `with`, `start` or `run`.

    Args:
        targets: Runs, RUN:policy, adapters and models, all of one base.
        key: Empty: LORA_RLHF_API_KEY, or a new one, which is `key` of the result.
        usage: File for numbers and thumbs; default: none.
        moderation: A policy file, `default` or `off`.
        moderation_log: File for its decisions, as JSON Lines.
    """
    access = Access(host, port, key)
    from .moderation import Moderation

    guard = Moderation.opened(moderation, moderation_log)
    limits = limits or Limits()
    engine = InferenceEngine.load(
        targets, base=base, load_in_4bit=load_in_4bit, max_waiting=limits.queue
    )
    store = usage_store.opened(None if usage is None else Path(usage))
    return ApiServer(engine, access, limits, store=store, moderation=guard, say=_say)


def _say(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")
