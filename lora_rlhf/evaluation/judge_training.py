# SPDX-License-Identifier: Apache-2.0
"""A language-model judge trained on people's labels: a LoRA on the choice between A and B.

The labels are split by prompt: three fifths train the LoRA, one calibrates its log-odds (Platt
1999), and one, which neither has seen, gives the judge's record.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lora_rlhf.errors import DataError
from lora_rlhf.hub.targets import Target
from lora_rlhf.runs.disk import write_atomically
from lora_rlhf.runs.samples import prompt_text
from lora_rlhf.runtime import interrupts

from .engine import Engine, finite
from .judge_validation import Labelled
from .language_judges import CALIBRATION, LanguageModel

RANK, LEARNING_RATE, BATCH = 16, 3e-4, 8
_TOKENS = 1024
"""Tokens of a forward, padding included; a batch takes several."""

FEWEST = 50
"""Prompts that training, calibration and test need together."""


def split(
    labelled: Sequence[Labelled], seed: int, source: str
) -> tuple[list[Labelled], list[Labelled], list[Labelled]]:
    """Split labels by prompt: three fifths to train, one to calibrate, one to test.

    Raises:
        DataError: There are too few prompts on which people decided.
    """
    decided = [one for one in labelled if one.majority is not None]
    prompts = sorted({prompt_text(one.row.prompt) for one in decided})
    if len(prompts) < FEWEST:
        raise DataError(
            f"people decided on answers to {len(prompts)} prompts of {source}",
            expected=f"{FEWEST} or more, to train, calibrate and test on different ones",
        )
    random.Random(seed).shuffle(prompts)
    fifth = {prompt: 5 * i // len(prompts) for i, prompt in enumerate(prompts)}
    parts: tuple[list[Labelled], list[Labelled], list[Labelled]] = ([], [], [])
    for one in decided:
        parts[max(fifth[prompt_text(one.row.prompt)] - 2, 0)].append(one)
    return parts


def train(
    engine: Engine,
    labelled: Sequence[Labelled],
    folder: Path,
    *,
    epochs: int,
    seed: int,
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Train a LoRA on the engine's base, save it, and take it off; 0 epochs change nothing.

    An epoch shows every pair once, in a random order.
    """
    judge = LanguageModel("", engine, Target("", "model"))
    pairs = [_both(judge, one) for one in labelled]
    pairs = [both for both in pairs if max(len(ids) for ids, _ in both) <= engine.context]
    steps_an_epoch = -(-len(pairs) // BATCH)
    steps, rng = epochs * steps_an_epoch, random.Random(seed)
    torch.manual_seed(seed)
    with engine.adapters.training(RANK, folder) as weights:
        optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, max(steps, 1))
        for step in range(steps):
            interrupts.stop_if_requested()
            start = step % steps_an_epoch * BATCH
            if start == 0:
                rng.shuffle(pairs)
            batch = [rng.choice(both) for both in pairs[start : start + BATCH]]
            loss = _backward(judge, batch)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            say(f"judge: step {step + 1} of {steps}, loss {loss:.3f}")


def _backward(judge: LanguageModel, batch: Sequence[tuple[list[int], int]]) -> float:
    """Add the gradients of the mean loss of a batch, and return the loss.

    It is the cross entropy among the two letters: the probability of other tokens is no matter.
    """
    options, loss = judge.engine.options(judge.target), 0.0
    for part in _within(batch, _TOKENS):
        logprobs = options.next_logprobs([ids for ids, _ in part], judge.options())
        better = torch.tensor([label for _, label in part], device=logprobs.device)
        of_part = cross_entropy(logprobs, better, reduction="sum") / len(batch)
        of_part.backward()
        loss += of_part.item()
    finite("the loss of the judge", [loss])
    return loss


def _within(
    batch: Sequence[tuple[list[int], int]], most: int
) -> Iterator[list[tuple[list[int], int]]]:
    """Yield the batch in parts of few padded tokens."""
    part: list[tuple[list[int], int]] = []
    for one in sorted(batch, key=lambda one: len(one[0])):
        if part and (len(part) + 1) * len(one[0]) > most:
            yield part
            part = []
        part.append(one)
    yield part


def _both(judge: LanguageModel, one: Labelled) -> list[tuple[list[int], int]]:
    """Encode a pair in both orders, each with the index of the letter of the better answer."""
    label = int(not one.majority)
    return [
        (judge.ask(one.row.prompt, one.first, one.second), label),
        (judge.ask(one.row.prompt, one.second, one.first), 1 - label),
    ]


def calibrate(judge: LanguageModel, labelled: Sequence[Labelled], folder: Path) -> None:
    """Fit scale and offset of the log-odds that A is better, and keep both beside the adapter."""
    both_orders = judge.odds(
        [o.row.prompt for o in labelled],
        [o.first for o in labelled],
        [o.second for o in labelled],
    )
    odds, better = [], []
    for pair, one in zip(both_orders, labelled, strict=True):
        if pair is not None:
            odds += [pair[0], -pair[1]]  # of the answer shown as A
            better += [one.majority or 0.0, 1 - (one.majority or 0.0)]
    judge.scale, judge.offset = platt(odds, better)
    content = {"scale": judge.scale, "offset": judge.offset, "n": len(odds) // 2}
    write_atomically(folder / CALIBRATION, json.dumps(content, indent=1) + "\n")


def platt(odds: Sequence[float], outcomes: Sequence[float]) -> tuple[float, float]:
    """Fit P(1) = sigmoid(scale * odds + offset) by Newton's method, with Platt's targets.

    A scale below 0 would turn the verdicts of a judge without knowledge round; it becomes 0.
    """
    x = np.stack([np.asarray(odds, np.float64), np.ones(len(odds))], axis=1)
    y, spread = np.asarray(outcomes, np.float64), float(np.std(x[:, 0])) or 1.0
    x[:, 0] /= spread
    positive = y.sum()
    high, low = (positive + 1) / (positive + 2), 1 / (len(y) - positive + 2)
    wanted, weights = np.where(y == 1, high, low), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(2)
        weights = weights - np.linalg.solve(curvature, x.T @ (p - wanted))
    return max(float(weights[0]) / spread, 0.0), float(weights[1])
