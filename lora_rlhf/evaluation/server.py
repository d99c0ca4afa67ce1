# SPDX-License-Identifier: Apache-2.0
"""A chat-completions server as a target or a judge, through huggingface_hub's client."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from huggingface_hub import InferenceClient

from lora_rlhf.errors import SetupError, UsageError, first_line
from lora_rlhf.hub.targets import Target
from lora_rlhf.redaction import safe
from lora_rlhf.runtime import interrupts

from .engine import TIMED, Answer, Cost, cost_of
from .prompt_sets import Row, Turns
from .suite import Suite

KEY = "LORA_RLHF_API_KEY"
"""Variable with the token of a server that is not Hugging Face's."""

_SECONDS = 120.0
_AT_ONCE = 4


_HUGGING_FACE = re.compile(
    r"https://(?:[\w-]+\.)*(?:huggingface\.co|huggingface\.cloud|hf\.space)(?::\d+)?(?:/|\Z)"
)


def _token_for(url: str) -> str | None:
    """Return the token for a server; None, for Hugging Face's hosts, is the user's token there.

    Of itself the client sends that token to every host.
    """
    return None if _HUGGING_FACE.match(url) else os.environ.get(KEY) or "none"


class Server:
    """Answers from `URL#model`; its token is never written anywhere."""

    def __init__(self, target: Target) -> None:
        url, _, self._model = (target.url or "").partition("#")
        if not self._model:
            raise UsageError(f"{url} names no model", expected=f"{url}#model")
        self._client = InferenceClient(base_url=url, timeout=_SECONDS, token=_token_for(url))
        self.identity = safe(str(target.url))

    def answer(
        self,
        target: Target,
        rows: Sequence[Row],
        suite: Suite,
        known: dict[str, dict[str, Any]] | None = None,
        save: Callable[[], object] = lambda: None,
    ) -> list[Answer]:
        """Answer every row, in their order.

        Args:
            known: Row id -> answer of an earlier process; new answers are added.
            save: Called after every few answers, to keep `known`.

        Raises:
            SetupError: Rows have no answer, after all were asked, or the server is gone.
        """
        known = {} if known is None else known
        missing = [row for row in rows if row.id not in known]
        failed: list[SetupError] = []
        for start in range(0, len(missing), 2 * _AT_ONCE):
            interrupts.stop_if_requested()
            part = missing[start : start + 2 * _AT_ONCE]
            made = self._each(lambda row: self._one(row, suite), part)
            known |= {
                row.id: asdict(one)
                for row, one in zip(part, made, strict=True)
                if isinstance(one, Answer)
            }
            save()
            errors = [one for one in made if isinstance(one, SetupError)]
            failed += errors
            if len(errors) == len(part):
                break  # the server is gone
        if failed:
            raise SetupError(
                f"{failed[0].given}; {len(rows) - sum(row.id in known for row in rows)} of "
                f"{len(rows)} rows have no answer",
                expected="a chat-completions server",
                remedy="check the server, and run the same command again: all other answers are "
                "kept",
            ) from failed[0].__cause__
        return [Answer(**known[row.id]) for row in rows]

    def ask(self, texts: Sequence[str], max_tokens: int) -> list[str | SetupError]:
        """Return greedy replies to texts, or why there is none."""
        made = self._each(lambda text: self._reply(text, max_tokens, 0.0, 0, "a question"), texts)
        return [one.text if isinstance(one, Answer) else one for one in made]

    def _each(
        self, reply: Callable[[Any], Answer], requests: Sequence[Any]
    ) -> list[Answer | SetupError]:
        def tried(one: Any) -> Answer | SetupError:
            try:
                return reply(one)
            except SetupError as error:
                return error

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(tried, requests))

    def measure(self, target: Target, rows: Sequence[Row], suite: Suite) -> Cost:
        """Time answers one at a time; the first token is not seen, as answers are not streamed."""
        spent, tokens = [], 0
        for row in rows[:TIMED]:
            start = time.perf_counter()
            tokens += self._one(row, suite).tokens
            spent.append(time.perf_counter() - start)
        return cost_of(spent, None, tokens, None)

    def _one(self, row: Row, suite: Suite) -> Answer:
        shape = (suite.max_new_tokens, suite.temperature, suite.seed)
        return self._reply(row.prompt, *shape, f"row {row.id}")

    def _reply(
        self, prompt: Turns, max_tokens: int, temperature: float, seed: int, what: str
    ) -> Answer:
        turns: list[Any] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        )
        try:
            made = self._client.chat_completion(
                turns,
                model=self._model,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
            )
            [choice] = made.choices
            text = choice.message.content
            if not isinstance(text, str):
                raise ValueError(f"the answer is {text!r:.80}, not a text")
            tokens = made.usage.completion_tokens if made.usage else len(text.split())
        except Exception as error:  # the client raises many classes
            raise SetupError(
                f"{self.identity} gave no answer to {what}: {first_line(error)}",
                expected="a chat-completions server",
                remedy="check the server, and run the same command again",
            ) from error
        return Answer(text, int(tokens), choice.finish_reason == "stop")
