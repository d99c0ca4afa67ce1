# SPDX-License-Identifier: Apache-2.0
"""A chat-completions server as a target, through huggingface_hub's client."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub import InferenceClient

from lora_rlhf.errors import SetupError, UsageError, first_line
from lora_rlhf.redaction import safe

from .engine import TIMED, Answer, Cost, cost_of
from .prompt_sets import Row
from .suite import Suite
from .targets import Target

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

    def answer(self, target: Target, rows: Sequence[Row], suite: Suite) -> list[Answer]:
        """Answer every row, in their order."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda row: self._one(row, suite), rows))

    def measure(self, target: Target, rows: Sequence[Row], suite: Suite) -> Cost:
        """Time answers one at a time; the first token is not seen, as answers are not streamed."""
        spent, tokens = [], 0
        for row in rows[:TIMED]:
            start = time.perf_counter()
            tokens += self._one(row, suite).tokens
            spent.append(time.perf_counter() - start)
        return cost_of(spent, None, tokens, None)

    def _one(self, row: Row, suite: Suite) -> Answer:
        turns: list[Any] = (
            [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        )
        try:
            made = self._client.chat_completion(
                turns,
                model=self._model,
                max_tokens=suite.max_new_tokens,
                temperature=suite.temperature,
                seed=suite.seed,
            )
            [choice] = made.choices
            text = choice.message.content
            if not isinstance(text, str):
                raise ValueError(f"the answer is {text!r:.80}, not a text")
            tokens = made.usage.completion_tokens if made.usage else len(text.split())
        except Exception as error:  # the client raises many classes
            raise SetupError(
                f"{self.identity} gave no answer to row {row.id}: {first_line(error)}",
                expected="a chat-completions server",
                remedy="check the server, and run the same command again: answers of other "
                "targets are kept",
            ) from error
        return Answer(text, int(tokens), choice.finish_reason == "stop")
