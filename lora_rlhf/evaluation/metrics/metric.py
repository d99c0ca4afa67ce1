# SPDX-License-Identifier: Apache-2.0
"""One metric: its name, its meaning, and the number of one prompt's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lora_rlhf.evaluation.prompt_sets import Row

Better = Literal["higher", "lower", "neither"]

Errors = tuple[tuple[int, int], tuple[int, int]]
"""Sensitivity and specificity of what decides, each as (right, n) on people's labels."""


class OptionScorer(Protocol):
    """Log-probabilities under one target, with nothing sampled."""

    def logprobs(self, context: str, continuations: Sequence[str]) -> Sequence[float]:
        """Return the natural log of P(continuation | context), summed over its tokens.

        Tokens are split as lm-eval does: those of context + continuation, less those of context.
        """
        ...

    def text_logprob(self, text: str) -> float:
        """Return the natural log of the probability of a whole text, summed over its tokens.

        The first token follows the prefix token (BOS, or EOS), as in lm-eval's empty context.
        """
        ...


@dataclass(frozen=True)
class Metric:
    """One number for each prompt, and how its mean is read.

    `score` takes the sampled answer; `ask` takes log-probabilities instead, and samples nothing. A
    metric has one of the two. None means that the metric does not apply, or cannot decide.
    """

    name: str
    meaning: str  # one plain line, with unit and denominator
    better: Better
    share: bool  # values lie between 0 and 1
    score: Callable[[Row, str], float | None] | None = None
    ask: Callable[[Row, OptionScorer], float | None] | None = None
    scale: float = 1  # 1000: printed per 1,000 prompts
    needs: tuple[str, ...] = ()  # keys of Row.reference
    source: str = ""  # paper and equation
    reads_prompt: bool = True  # False: it asks for texts of the reference alone
    judge: dict[str, Any] | None = None  # what decides if it can err, as in the report's judges
    errors: Errors | None = None  # its errors, if the mean is corrected for them
