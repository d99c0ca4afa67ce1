# SPDX-License-Identifier: Apache-2.0
"""Answers of a required form: a JSON schema, a regular expression, one of a list, or a grammar.

llguidance computes which tokens may come next; its limits on states, items and fuel bound the time
of a hostile schema or expression. `check` is independent of it where it can be: Python's JSON
parser, jsonschema and `regex`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from lora_rlhf import extras
from lora_rlhf.data import answer_format, sources
from lora_rlhf.errors import UsageError, first_line

Kind = Literal["json_schema", "regex", "choice", "grammar", "json"]

MAX_BYTES = 65_536
"""Longest schema, expression or grammar, as JSON."""

_WORDS = {"json_schema": "a JSON schema: an object or a bool", "regex": "a regular expression",
          "choice": "a list of texts", "grammar": "a grammar in Lark's syntax", "json": "nothing",
          }  # fmt: skip
_LIMITS = {"initial_lexer_fuel": 500_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000,
           "max_items_in_row": 2_000, "max_lexer_states": 50_000, "max_grammar_size": 100_000,
           "verbose_errors": False}  # fmt: skip
_TOKENIZERS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Constraint:
    """A form that an answer must have.

    Attributes:
        value: The schema, the expression, the choices or the grammar; None for any JSON.
    """

    kind: Kind
    value: Any = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(
                f"unknown constraint {self.kind!r:.80}", expected=", ".join(get_args(Kind))
            )
        right = {
            "json_schema": isinstance(self.value, dict | bool),
            "choice": _is_texts(self.value),
            "json": self.value is None,
        }
        if not right.get(self.kind, isinstance(self.value, str) and bool(self.value)):
            raise self._error(f"{type(self.value).__name__} {self.value!r:.60}")
        try:
            size = len(json.dumps(self.value).encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise self._error(first_line(error)) from None
        if size > MAX_BYTES:
            raise self._error(f"{size:,} bytes, at most {MAX_BYTES:,} are read")

    def _error(self, why: str) -> UsageError:
        return UsageError(
            f"the {self.kind} of the answer cannot be used: {why}", expected=_WORDS[self.kind]
        )

    @functools.cached_property
    def grammar(self) -> str:
        """The constraint as a grammar of llguidance.

        Raises:
            UsageError: It is invalid, or too large.
        """
        library = _library()
        matcher, value = library.LLMatcher, self.value
        try:
            if self.kind in ("json", "json_schema"):
                if self.kind == "json_schema":
                    answer_format.validate({"json_schema": value})
                schema = json.dumps({} if value is None else value)
                text = matcher.grammar_from_json_schema(schema, overrides=_JSON)
            elif self.kind == "regex":
                answer_format.validate({"regex": value})
                text = matcher.grammar_from_regex(value)
            elif self.kind == "choice":
                text = matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, value)))
            else:
                text = matcher.grammar_from_lark(value)
        except (ValueError, RecursionError) as error:
            raise self._error(first_line(error)) from None
        wrong = matcher.validate_grammar(text, limits=_limits())
        if wrong and not wrong.startswith("WARNING"):
            known = re.search("^error: (.+)", wrong, re.M)  # of a regex, below the grammar's lines
            raise self._error(known[1] if known else wrong[:300])
        return str(text)

    def matcher(self, tokenizer: Any, vocabulary: int, eos: Sequence[int]) -> Matcher:
        """Begin an answer in this form.

        Args:
            tokenizer: A fast tokenizer of transformers.
            vocabulary: Columns of the logits.
            eos: Ids that end an answer.

        Raises:
            UsageError: The constraint is invalid, or too large.
        """
        library = _library()
        key = (vocabulary, tuple(eos))
        known = _TOKENIZERS.setdefault(tokenizer, {})
        if key not in known:
            hf = extras.load("llguidance.hf", "a structured answer", "serve")
            known[key] = hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(eos))
        made = library.LLMatcher(known[key], self.grammar, limits=_limits(), log_level=0)
        if made.is_error():
            raise self._error(first_line(ValueError(made.get_error())))
        pieces = [known[key].tokenize_str(each) for each in _ENDERS]
        keys = _Keys() if self.kind in ("json", "json_schema") else None
        enders, read = [ids[-1] for ids in pieces], known[key].decode_bytes
        return Matcher(made, vocabulary, enders, eos[0], read, keys)

    def check(self, text: str) -> str | None:
        """Return the reason why a text is not in this form; None if it is."""
        if self.kind in ("json", "json_schema"):
            try:
                _strict_json(text)
            except (ValueError, RecursionError) as error:
                return f"not JSON: {first_line(error)}"
            if self.kind == "json":
                return None
            try:
                wrong = answer_format.problems(text, {"json_schema": self.value})
            except ValueError as error:
                wrong = [first_line(error)]
        elif self.kind == "regex":
            wrong = answer_format.problems(text, {"regex": self.value})
        elif self.kind == "choice":
            wrong = [] if text in self.value else [f"none of the {len(self.value)} choices"]
        else:
            wrong = [] if self._accepts(text) else ["not a text of the grammar"]
        return wrong[0] if wrong else None

    def _accepts(self, text: str) -> bool:
        library = _library()
        bytewise = library.LLTokenizer("byte")
        made = library.LLMatcher(bytewise, self.grammar, limits=_limits(), log_level=0)
        ids = bytewise.tokenize_bytes(text.encode("utf-8", "replace"))
        return bool(made.try_consume_tokens(ids) == len(ids) and made.is_accepting())


_JSON = {"whitespace_pattern": " ?", "whitespace_flexible": True, "coerce_one_of": True,
         "lenient": False}  # fmt: skip
"""At most one space where JSON allows any: a model could fill its answer with white space.

`oneOf` is followed as `anyOf`, and checked as `oneOf` at the end.
"""


_ENDERS = '"z}])"01,:anftu-@./;!?>|\n'
"""Characters to try, in this order, on the way to the end; the first two: where both may come."""

_LONGEST_ENDING = 256


class _Keys:
    """The keys of the JSON objects that are open, as bytes come; a grammar cannot compare them."""

    def __init__(self) -> None:
        self._open: list[set[str] | None] = []  # None: a list
        self._string: bytearray | None = None
        self._escaped = self._before_key = False

    def feed(self, data: bytes) -> bool:
        """Read on; returns False if a key ends that its object has already."""
        for byte in data:
            if self._string is not None:
                if byte == ord('"') and not self._escaped:
                    text, self._string = bytes(self._string), None
                    if self._before_key and self._open and not self._new(text):
                        return False
                    continue
                self._escaped = byte == ord("\\") and not self._escaped
                self._string.append(byte)
            elif byte == ord('"'):
                self._string = bytearray()
            elif byte in b"{[":
                self._open.append(set() if byte == ord("{") else None)
                self._before_key = byte == ord("{")
            elif byte in b"}]":
                self._open = self._open[:-1]
                self._before_key = False
            elif byte == ord(","):
                self._before_key = bool(self._open) and self._open[-1] is not None
            elif byte == ord(":"):
                self._before_key = False
        return True

    def _new(self, text: bytes) -> bool:
        known, key = self._open[-1], text.decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            key = json.loads(f'"{key}"')
        if known is None or key in known:
            return known is None
        known.add(key)
        return True


class Matcher:
    """The state of one answer: which tokens may come next.

    Attributes:
        forced: The answer was ended because its tokens ran out.
    """

    def __init__(
        self,
        matcher: Any,
        vocabulary: int,
        enders: Sequence[int],
        eos: int,
        read: Callable[[list[int]], bytes],
        keys: _Keys | None,
    ) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._enders, self._eos, self._bytes, self._keys = enders, eos, read, keys
        self._ending: list[int] | None = None
        self._watched: int | None = None  # tokens left from which the ending is looked at
        self.forced = False

    def copy(self) -> Matcher:
        """Return an independent copy of the state."""
        state = self._matcher.deep_copy()
        keys = copy.deepcopy(self._keys)
        return Matcher(state, self._vocabulary, self._enders, self._eos, self._bytes, keys)

    def allowed(self) -> Any:
        """(V,) bool, as numpy: the tokens that may come next.

        Raises:
            UsageError: The form became too large to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)
        self._sound()
        return mask

    def consume(self, token: int) -> None:
        """Advance by a token that was allowed.

        Raises:
            UsageError: The form became too large to follow.
        """
        self._matcher.consume_token(token)
        if self._keys is not None:
            self._keys.feed(self._bytes([token]))
        self._sound()  # a matcher that failed says that it stopped, as at the end of an answer

    def _sound(self) -> None:
        if self._matcher.is_error():
            raise UsageError(
                "the form of the answer cannot be followed: "
                + first_line(ValueError(self._matcher.get_error())),
                remedy="simplify the schema, the expression or the grammar",
            )

    def repeats(self, token: int) -> bool:
        """Tell if a token would end a key that its JSON object has already."""
        if self._keys is None:
            return False
        return not copy.deepcopy(self._keys).feed(self._bytes([token]))

    def within(self, token: int, left: int) -> int:
        """Return the token to take: another one where the rest would not fit `left` tokens.

        From then on the answer takes a short way to its end; the shortest for most forms.
        """
        if self._ending:
            return self._ending.pop(0)
        if self._watched is None:
            self._watched = 12 + 2 * len(self._way_out(_LONGEST_ENDING) or ())
        if left > self._watched:
            return token
        ahead = self.copy()
        ahead.consume(token)
        if ahead.complete or ahead._way_out(left - 1) is not None:
            return token
        self._ending = self._way_out(left)
        if self._ending is None:
            return token
        self.forced = True
        return self._ending.pop(0) if self._ending else self._eos

    def _way_out(self, most: int) -> list[int] | None:
        """Find up to `most` tokens after which the answer may end."""
        way = self._way(most, varied=False)
        return self._way(most, varied=True) if way is None else way

    def _way(self, most: int, varied: bool) -> list[int] | None:
        """Try the first character that may come, or `varied`: the one used least often so far."""
        state, way, used = self.copy(), list[int](), Counter[int]()
        while not state.valid:
            step = state._matcher.compute_ff_tokens()
            if not step:
                mask, (quote, letter, *others) = state.allowed(), self._enders
                inside = mask[quote] and mask[letter]  # a string, in which brackets are text
                string = [letter if state.repeats(quote) else quote]
                known = [i for i in (string if inside else others) if mask[i]]
                known.sort(key=used.__getitem__ if varied else lambda _: 0)
                step = known[:1] or [int(mask.argmax())]
                used.update(step)
            way += step
            if len(way) > most or not state._matcher.consume_tokens(step):
                return None
            if state._keys is not None and not state._keys.feed(self._bytes(step)):
                return None
        return way

    @property
    def complete(self) -> bool:
        """True if nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def valid(self) -> bool:
        """True if the answer may end here."""
        return bool(self._matcher.is_accepting())


def _is_texts(value: Any) -> bool:
    listed = isinstance(value, list | tuple) and bool(value)
    return listed and all(isinstance(one, str) and one for one in value)


def _strict_json(text: str) -> Any:
    """Parse JSON (RFC 8259); also refuse equal keys, NaN, and half of a surrogate pair."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    value = json.loads(text, object_pairs_hook=sources.unique_keys, parse_constant=constant)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    return value


def _library() -> Any:
    return extras.load("llguidance", "a structured answer", "serve")


def _limits() -> Any:
    return _library().LLParserLimits(**_LIMITS)
