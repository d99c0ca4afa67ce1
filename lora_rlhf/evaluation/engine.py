# SPDX-License-Identifier: Apache-2.0
"""Answers and log-probabilities of all targets that share a base, which is loaded once.

Adapters are switched by PEFT; nothing is loaded again between two targets on one base.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_rlhf.data.few_shot import completed, without_template
from lora_rlhf.data.filters import breaker
from lora_rlhf.errors import NonFiniteError
from lora_rlhf.hub.targets import Target
from lora_rlhf.models import sampler
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.models.plain_adapters import PlainAdapters, right_padded
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.runtime import environment

from .prompt_sets import Row
from .suite import Suite

TIMED = 8
"""Prompts that are answered one at a time for the latency."""


@dataclass
class Answer:
    """One answer: its text, its tokens with the end, and whether it ended by itself."""

    text: str
    tokens: int
    finished: bool


@dataclass
class Cost:
    """Speed of a target's answers; memory is the device's peak, None on a CPU."""

    p50_s: float
    p95_s: float
    first_token_s: float | None
    tokens_per_second: float
    peak_bytes: int | None

    def report(self, price_per_hour: float | None) -> dict[str, float | None]:
        """Return the figures, with the price of 1,000 answers one at a time."""
        price = None if price_per_hour is None else 1000 * self.p50_s / 3600 * price_per_hour
        return {**asdict(self), "per_1000": price}


def cost_of(
    spent: Sequence[float], first_token_s: float | None, tokens: int, peak_bytes: int | None
) -> Cost:
    """Compute speed and latency from the seconds of each answer."""
    last = len(spent) - 1
    return Cost(
        p50_s=statistics.median(spent),
        p95_s=sorted(spent)[min(last, round(0.95 * last))],
        first_token_s=first_token_s,
        tokens_per_second=tokens / max(sum(spent), 1e-9),
        peak_bytes=peak_bytes,
    )


class Engine:
    """The targets of one base.

    Args:
        section: The base model.
        targets: Targets on it; their adapters are loaded here.
    """

    def __init__(self, section: ModelSection, targets: Sequence[Target]) -> None:
        self.base = BaseModel.load(section, LoraSection())
        self.adapters = PlainAdapters(self.base)
        self._plain = breaker(self.base.tokenizer)
        for target in targets:
            self.add(target)

    def add(self, target: Target) -> None:
        """Load a target's adapter onto the base, if it has one."""
        if target.adapter is not None:
            self.adapters.load(str(target.adapter.resolve()), target.adapter)

    @property
    def identity(self) -> list[Any]:
        """All of the base and of this machine that an answer depends on."""
        base = self.base
        loaded = [base.fingerprint, str(base.causal.dtype), base.is_4bit, base.device.type]
        return [*loaded, base.tokenizer.chat_template, base.eos_ids, environment.versions()]

    def active(self, target: Target | None) -> contextlib.AbstractContextManager[None]:
        """Make a target's adapter the active one; None or a model: the base itself."""
        folder = target.adapter if target else None
        return self.adapters.active(str(folder.resolve()) if folder else None)

    # --------------------------------------------------------------------- answers

    def encode(self, target: Target, prompt: str | list[dict[str, str]]) -> list[int]:
        """Encode a prompt: by the chat template, or as text with examples for a bare model."""
        if self.base.tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            clean = [{**turn, "content": self._plain(turn["content"])} for turn in turns]
            return self.base.encode_prompt(clean)
        return self.base.encode_prompt(self._plain(without_template(prompt, target.few_shot)))

    def answer(self, target: Target, rows: Sequence[Row], suite: Suite) -> list[Answer]:
        """Answer every row, in their order."""
        prompts = [self.encode(target, row.prompt) for row in rows]
        with self.active(target):
            sampled = sampler.sample(
                self.base,
                prompts,
                max_new_tokens=suite.max_new_tokens,
                temperature=suite.temperature,
                batch_size=suite.batch_size,
                seed=suite.seed,
            )
        bare = not self.base.tokenizer.chat_template
        answers = []
        for one in sampled:
            finished = bool(one.ids) and one.ids[-1] in self.base.eos_ids
            text = self.base.decode(one.ids)
            tokens = len(one.ids)
            if bare and (cut := completed(text)) != text:
                text, finished, tokens = cut, True, len(self.base.encode_completion(cut))
            answers.append(Answer(text, tokens, finished))
        return answers

    @property
    def context(self) -> float:
        """Tokens that the base's context has room for; infinite if its config names no limit."""
        config = self.base.causal.config.get_text_config()
        most: int | None = getattr(config, "max_position_embeddings", None)
        return most or math.inf

    def too_long(self, target: Target, rows: Sequence[Row], suite: Suite) -> str | None:
        """Return the reason if the longest prompt and its answer would not fit the context."""
        longest = max(len(self.encode(target, row.prompt)) for row in rows) + suite.max_new_tokens
        if longest <= self.context:
            return None
        room = f"the context has {self.context:,}"
        return f"a prompt with its answer needs {longest:,} tokens, and {room}"

    def measure(self, target: Target, rows: Sequence[Row], suite: Suite) -> Cost:
        """Time answers one at a time, after one to warm up."""
        prompts = [self.encode(target, row.prompt) for row in rows[:TIMED]]
        on_gpu = self.base.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        spent, tokens, first = [], 0, []
        with self.active(target):
            for ids in (prompts[0], *prompts):
                once: dict[str, Any] = {
                    "temperature": suite.temperature,
                    "batch_size": 1,
                    "seed": suite.seed,
                }
                start = time.perf_counter()
                sampler.sample(self.base, [ids], max_new_tokens=1, **once)
                first.append(time.perf_counter() - start)
                start = time.perf_counter()
                [one] = sampler.sample(
                    self.base, [ids], max_new_tokens=suite.max_new_tokens, **once
                )
                spent.append(time.perf_counter() - start)
                tokens += len(one.ids) * (len(spent) > 1)
        spent, first = spent[1:], first[1:]
        peak = int(torch.cuda.max_memory_allocated()) if on_gpu else None
        return cost_of(spent, statistics.median(first), tokens, peak)

    # ------------------------------------------------------------ log-probabilities

    def options(self, target: Target | None) -> Options:
        """Return the scorer of log-probabilities of texts under a target."""
        return Options(self, target)

    # ---------------------------------------------------------------------- rewards

    def rewards(
        self, name: str, prompts: Sequence[Any], texts: Sequence[str], batch_size: int
    ) -> list[float | None]:
        """Score answers with a loaded reward model: its head at the end token, plus its offset.

        None for an answer that does not fit the context with its prompt.
        """
        bare = Target("", "model")
        rows = [
            self.encode(bare, prompt) + self.base.encode_completion(text)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        fits = [i for i, ids in enumerate(rows) if len(ids) <= self.context]
        scored = self.adapters.scores(name, [rows[i] for i in fits], batch_size) if fits else []
        known = dict(zip(fits, scored, strict=True))
        return [known.get(i) for i in range(len(rows))]


class Options:
    """Log-probabilities of texts under one target, tokenized as lm-eval does."""

    def __init__(self, engine: Engine, target: Target | None, batch_size: int = 8) -> None:
        self.engine, self.target, self.batch_size = engine, target, batch_size

    def logprobs(self, context: str, continuations: Sequence[str]) -> Sequence[float]:
        """Sum ln P(token) over each continuation after the context."""
        return self._of([self._pair(context, each) for each in continuations])

    def text_logprob(self, text: str) -> float:
        """Sum ln P(token) over a text, from the beginning-of-text token on."""
        return self._of([([self._prefix()], self._encode(text))])[0]

    @torch.no_grad()
    def next_token(self, contexts: Sequence[list[int]], texts: Sequence[str]) -> list[list[float]]:
        """Return ln P of the first token of each text after each context, one forward a context."""
        out: list[list[float]] = [[] for _ in contexts]
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            logprobs = self.next_logprobs([contexts[i] for i in part], texts)
            for i, row in zip(part, logprobs.tolist(), strict=True):
                out[i] = row
        return out

    def next_logprobs(self, contexts: Sequence[list[int]], texts: Sequence[str]) -> torch.Tensor:
        """(contexts, texts) of ln P of the first token of each text, with gradients."""
        base, wanted = self.engine.base, [self._encode(text)[0] for text in texts]
        with self.engine.active(self.target):
            ids, mask = right_padded(contexts, base)
            states = base.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            ends = states.last_hidden_state[torch.arange(len(contexts)), mask.sum(dim=1) - 1]
            logits = base.causal.get_output_embeddings()(ends).float()
            logprobs: torch.Tensor = logits.log_softmax(-1)[:, wanted]
            return logprobs

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Split where lm-eval does: spaces at the context's end belong to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation = context[-spaces:] + continuation
            context = context[:-spaces]
        if not context:
            return [self._prefix()], self._encode(continuation)
        first = self._encode(context)
        return first, self._encode(context + continuation)[len(first) :]

    def _encode(self, text: str) -> list[int]:
        tokenizer = self.engine.base.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _prefix(self) -> int:
        tokenizer = self.engine.base.tokenizer
        bos = tokenizer.bos_token_id
        return int(tokenizer.eos_token_id if bos is None else bos)

    @torch.no_grad()
    def _of(self, pairs: list[tuple[list[int], list[int]]]) -> Sequence[float]:
        base, sums = self.engine.base, [0.0] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        with self.engine.active(self.target):
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                ids, mask = right_padded([sum(pairs[i], []) for i in part], base)
                logits = base.causal(input_ids=ids, attention_mask=mask, use_cache=False).logits
                for row, i in enumerate(part):
                    context, continuation = pairs[i]
                    span = slice(len(context) - 1, len(context) + len(continuation) - 1)
                    logprobs = logits[row, span].float().log_softmax(-1)
                    wanted = torch.tensor(continuation, device=logits.device).unsqueeze(1)
                    sums[i] = float(logprobs.gather(1, wanted).sum())
        return finite("a text's log-probability", sums)


def finite(what: str, values: Sequence[float]) -> Sequence[float]:
    """Return the values.

    Raises:
        NonFiniteError: One is NaN or infinite.
    """
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(
            f"{what} is {next(x for x in values if not math.isfinite(x))}",
            expected="finite numbers",
            remedy="check the model's weights, or load it in another dtype",
        )
    return values
