# SPDX-License-Identifier: Apache-2.0
"""The chat-completions API in JSON: request bodies, answers and errors.

The names are those of OpenAI's reference; `structured_outputs` and `guided_*` are vLLM's, and ours
are `best_of`, `scored` and `reward`. A parameter that is not known, or does nothing, is refused.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from lora_rlhf.errors import UsageError, first_line

from .inference import Choice, Model, Request, TokenLogprob
from .structured import Constraint
from .usage_store import LONGEST_COMMENT

FILTERED = "content_filter"
"""The finish_reason of an answer that moderation blocked."""

_ROLES = {"developer": "system"}  # OpenAI's newer name


class ApiError(Exception):
    """A request that gets an error: its HTTP status and OpenAI's fields."""

    def __init__(
        self, status: int, message: str, code: str = "", param: str | None = None, retry: int = 0
    ) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        self.status, self.code = status, code
        self.headers = {"retry-after": str(retry)} if retry else {}
        self.body = {
            "error": {
                "message": message,
                "type": kind.get(status, "invalid_request_error" if status < 500 else "api_error"),
                "param": param,
                "code": code or None,
            }
        }


def refused(error: UsageError, code: str = "invalid_value") -> ApiError:
    """Return the API's error for one of ours, on one line."""
    expected = f"; expected: {error.expected}" if error.expected else ""
    return ApiError(400, error.given + expected, code)


class _Given(BaseModel):
    """A JSON object without unknown keys; null is the same as a key that is not there."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class _Part(_Given):
    type: Literal["text"]
    text: str


class _Message(_Given):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        parts = content if isinstance(content, list) else []
        kinds = [part.get("type") for part in parts if isinstance(part, dict)]
        if other := [kind for kind in kinds if kind != "text"]:
            raise ValueError(f"a part of type {other[0]!r:.40}: this server takes text only")
        return content

    def turn(self) -> dict[str, str]:
        text = self.content
        joined = text if isinstance(text, str) else "".join(part.text for part in text)
        return {"role": _ROLES.get(self.role, self.role), "content": joined}


class _JsonSchema(_Given):
    name: str = ""
    description: str = ""
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool = True  # the answer keeps to the schema in any case


class _ResponseFormat(_Given):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _StreamOptions(_Given):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Structured(_Given):
    json_: dict[str, Any] | bool | str | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


def _only(*values: object) -> Any:
    """Accept a parameter of OpenAI's at the values at which it changes nothing."""

    def check(value: Any) -> Any:
        if value not in values:
            raise ValueError(f"is not supported here, other than as {values[0]!r}")
        return value

    return AfterValidator(check)


_Zero = Annotated[float, _only(0)]
_Stop = Annotated[
    list[str], BeforeValidator(lambda given: [given] if type(given) is str else given)
]


class Chat(_Given):
    """The body of POST /v1/chat/completions."""

    messages: list[_Message] = Field(min_length=1)
    model: str = ""
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    best_of: int = Field(1, ge=1, le=128)
    scored: bool = False
    seed: int | None = None
    stop: _Stop = Field(default_factory=list)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: _ResponseFormat = _ResponseFormat(type="text")
    structured_outputs: _Structured = _Structured()
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str = ""  # the client's name for its user, which is not kept
    safety_identifier: str = ""  # OpenAI's newer name for it
    modalities: Annotated[list[str], _only(["text"])] = ["text"]
    frequency_penalty: _Zero = 0
    presence_penalty: _Zero = 0
    logit_bias: Annotated[dict[str, Any], _only({})] = Field(default_factory=dict)
    tools: Annotated[list[Any], _only([])] = Field(default_factory=list)
    tool_choice: Annotated[str, _only("none", "auto")] = "none"
    store: Annotated[bool, _only(False)] = False
    service_tier: Annotated[str, _only("auto", "default")] = "auto"

    @property
    def turns(self) -> tuple[dict[str, str], ...]:
        """The conversation, with texts that were given in parts put together."""
        return tuple(message.turn() for message in self.messages)

    def request(self) -> Request:
        """Return the request to the engine.

        Raises:
            ApiError: Parameters contradict each other, or a constraint is invalid.
        """
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ApiError(400, "max_tokens and max_completion_tokens differ", "invalid_value")
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs needs logprobs to be true"
            raise ApiError(400, message, "invalid_value", "top_logprobs")
        try:
            constraint = self._constraint()
        except UsageError as error:
            raise refused(error) from None
        return Request(
            self.turns,
            model=self.model,
            max_tokens=next(iter(limits), None),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            n=self.n,
            best_of=self.best_of,
            stop=tuple(self.stop),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            constraint=constraint,
            scored=self.scored,
        )

    def _constraint(self) -> Constraint | None:
        """Return the constraint on the answer.

        Raises:
            ApiError: There are several.
            UsageError: It is invalid.
        """
        form, ours, wanted = self.response_format, self.structured_outputs, []
        if form.type == "json_schema":
            if form.json_schema is None:
                message = "response_format of type json_schema has no json_schema"
                raise ApiError(400, message, "invalid_value", "response_format")
            wanted.append(Constraint("json_schema", form.json_schema.schema_))
        if form.type == "json_object" or ours.json_object:
            wanted.append(Constraint("json_schema", {"type": "object"}))
        for schema in (ours.json_, self.guided_json):
            if schema is not None:
                wanted.append(Constraint("json_schema", _schema(schema)))
        for regex in (ours.regex, self.guided_regex):
            wanted += [] if regex is None else [Constraint("regex", regex)]
        for choice in (ours.choice, self.guided_choice):
            wanted += [] if choice is None else [Constraint("choice", choice)]
        for grammar in (ours.grammar, self.guided_grammar):
            wanted += [] if grammar is None else [Constraint("grammar", grammar)]
        if len(wanted) > 1:
            message = "several constraints: " + ", ".join(one.kind for one in wanted)
            raise ApiError(400, message + "; expected one at most", "invalid_value")
        return wanted[0] if wanted else None


class Thumb(_Given):
    """The body of POST /v1/feedback."""

    completion_id: str = Field(min_length=1, max_length=100)
    thumb: Literal["up", "down"]
    comment: str = Field("", max_length=LONGEST_COMMENT)
    choice: int | None = Field(None, ge=0, lt=128)  # needed if there are several answers


def _schema(given: dict[str, Any] | bool | str) -> Any:
    """Return a schema that may be given as JSON text."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the schema is not JSON: {first_line(error)}") from None


def parse(raw: bytes, body: type[BaseModel] = Chat) -> Any:
    """Return the body of a request.

    Raises:
        ApiError: It is not as the API has it; the first problem is named.
    """
    try:
        given = json.loads(raw)
        json.dumps(given, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        message = f"the body is not JSON in UTF-8: {ascii(first_line(error))[1:-1]}"
        raise ApiError(400, message, "invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body is not a JSON object", "invalid_value")
    try:
        return body.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(map(str, problem["loc"]))[:200]
    if problem["type"] == "extra_forbidden":
        raise ApiError(400, f"unknown parameter {param!r}", "unknown_parameter", param)
    why = problem["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"{param}: {why}", "invalid_value", param)


# ------------------------------------------------------------------------------ answers


class _Counted(Protocol):
    prompt_tokens: int
    completion_tokens: int


def usage(counted: _Counted | None) -> dict[str, int]:
    """Return the tokens of a completion; none of a prompt that was blocked."""
    prompt, answer = (counted.prompt_tokens, counted.completion_tokens) if counted else (0, 0)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def frame(name: str, created: float, model: Model, chunk: bool) -> dict[str, Any]:
    """Return what a completion and its chunks share; the fingerprint is that of the adapter."""
    return {
        "id": name,
        "object": "chat.completion.chunk" if chunk else "chat.completion",
        "created": int(created),
        "model": model.name,
        "system_fingerprint": f"fp_{model.adapter[:12] or 'base'}",
    }


class StreamedLogprobs:
    """Log-probs of a streamed answer, each sent with the text of its token and never before.

    Attributes:
        sent: Tokens whose log-probs were sent.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Sequence[TokenLogprob]]] = deque()
        self._written = self._shown = self.sent = 0

    def add(self, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """Take a piece that the model wrote; moderation may show it later."""
        self._written += len(text)
        self._waiting.append((self._written, logprobs))

    def shown(self, text: str) -> list[TokenLogprob]:
        """Return the log-probs that may go with text which is shown now."""
        self._shown += len(text)
        ready: list[TokenLogprob] = []
        while self._waiting and self._waiting[0][0] <= self._shown:
            ready += self._waiting.popleft()[1]
        self.sent += len(ready)
        return ready


def chosen(index: int, choice: Choice | None, chunk: bool, streamed: int = 0) -> dict[str, Any]:
    """Return one answer, or the last chunk of it; None is an answer that was blocked.

    Args:
        streamed: Tokens whose log-probs went with earlier chunks; the rest go with this one.
    """
    text = "" if choice is None or chunk else choice.text
    whole = {"message": {"role": "assistant", "content": text, "refusal": None}}
    made: dict[str, Any] = {"index": index, **({"delta": {}} if chunk else whole)}
    if choice is None:
        return {**made, "logprobs": None, "finish_reason": FILTERED}
    left = choice.logprobs and choice.logprobs[streamed:]
    made["logprobs"] = _tokens(left or None if chunk else left)
    made["finish_reason"] = "length" if choice.finish_reason == "length" else "stop"
    ours = {"reward": choice.reward, "valid": choice.valid}
    return made | {name: value for name, value in ours.items() if value is not None}


def piece(
    index: int, delta: Mapping[str, str], logprobs: Sequence[TokenLogprob] = ()
) -> dict[str, Any]:
    """Return a chunk's new text of one answer."""
    tokens = _tokens(logprobs or None)
    return {"index": index, "delta": dict(delta), "logprobs": tokens, "finish_reason": None}


def _tokens(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    return {"content": [*map(_token, logprobs)], "refusal": None}


def _token(given: TokenLogprob) -> dict[str, Any]:
    def entry(token: str, logprob: float) -> dict[str, Any]:
        # JSON has no infinity: OpenAI's value for a token that cannot come.
        return {"token": token, "logprob": max(logprob, -9999.0), "bytes": [*token.encode()]}

    top = [entry(*one) for one in given.top]
    return {**entry(given.token, given.logprob), "top_logprobs": top}


def event(data: Any) -> bytes:
    """Return a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode(errors="replace")


def models(given: Sequence[Model], created: float) -> list[dict[str, Any]]:
    """Return the models as GET /v1/models lists them."""
    shared = {"object": "model", "created": int(created), "owned_by": "lora-rlhf"}
    return [
        {"id": m.name, **shared, "kind": m.kind, "adapter_sha256": m.adapter or None} for m in given
    ]
