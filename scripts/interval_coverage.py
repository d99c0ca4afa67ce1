# SPDX-License-Identifier: Apache-2.0
"""Coverage of every kind of 95 % interval that an evaluation prints, by simulated evaluations.

Each case draws evaluations of n prompts with a known truth and counts the intervals that include
it. `python scripts/interval_coverage.py` prints the table of docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lora_rlhf import estimates
from lora_rlhf.estimates import Estimate

Drawn = Iterator[tuple[Estimate, float]]
Case = Callable[[np.random.Generator, int], Drawn]
"""(random state, prompts) -> the intervals of one evaluation, each with its truth."""

SIZES = (30, 100, 400)
SENSITIVITY, SPECIFICITY = (70, 76), (360, 374)  # labels of the refusal detector
RESAMPLES = 1_000


def share(p: float) -> Case:
    """A share of prompts, such as incidents."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        yield estimates.wilson(int(rng.binomial(n, p)), n), p

    return draw


def mean(kind: str) -> Case:
    """A mean: lengths (skewed), or rewards from -1 to 1 of which most are 1."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        if kind == "lengths":
            yield estimates.mean_interval(rng.gamma(2.0, 10.0, n)), 20.0
        else:
            yield estimates.mean_interval(rng.choice((-1, 0, 1), n, p=(0.1, 0.1, 0.8))), 0.7

    return draw


def shares_of_answers(p: float) -> Case:
    """A mean of shares within answers, such as repetition: a share p of answers loops."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        values = np.where(rng.random(n) < p, rng.uniform(0.2, 1.0, n), 0.0)
        yield estimates.mean_of_shares(values), 0.6 * p

    return draw


def clustered_share(p: float) -> Case:
    """Accuracy on pairs of completions, four pairs of a prompt, with the prompt as cluster."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        own = rng.beta(4 * p, 4 * (1 - p), n).repeat(4)
        yield estimates.share_interval(rng.random(4 * n) < own, np.arange(n).repeat(4).tolist()), p

    return draw


def difference_of_scores(kind: str) -> Case:
    """A paired difference of scores: both models see the prompt's difficulty."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        hard = rng.normal(0, 1, n)
        gap = rng.normal(0.2, 1, n) if kind == "normal" else rng.exponential(1, n) - 0.8
        yield estimates.paired_difference(hard + gap, hard, 1, RESAMPLES), 0.2

    return draw


def difference_of_shares(p: float, gains: float, losses: float) -> Case:
    """A paired difference of shares: of all prompts `gains` become 1, and `losses` become 0."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        rest = 1 - gains - losses
        before = rng.choice((0, 1, 2, 3), n, p=(gains, losses, rest * p, rest * (1 - p)))
        a, b = np.isin(before, (0, 2)), np.isin(before, (1, 2))
        yield estimates.paired_difference(a, b, 1, RESAMPLES), gains - losses

    return draw


def difference_of_wins(*chances: float) -> Case:
    """A paired difference of win rates with ties: chances of changes by -1, -1/2, 0, 1/2 and 1."""
    steps = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        gap = rng.choice(steps, n, p=chances)
        before = np.where(gap == 0, rng.choice((0, 0.5, 1), n), np.where(gap == 0.5, 0.5, gap < 0))
        yield estimates.paired_difference(before + gap, before, 1, RESAMPLES), steps @ chances

    return draw


def win_rate(p: float, ties: float) -> Case:
    """A win rate: a share p of the verdicts that are no ties is won."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        outcomes = rng.choice((1, 0, 0.5), n, p=((1 - ties) * p, (1 - ties) * (1 - p), ties))
        yield estimates.win_rate(outcomes, np.full(n, 0.5)), (1 - ties) * p + ties / 2

    return draw


def win_rate_at_equal_length(theta: float, slope: float) -> Case:
    """A length-controlled win rate: the log-odds are theta + slope tanh(d / 10)."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        gap = rng.normal(5, 10, n)
        odds = theta + slope * np.tanh(gap / 10)
        won = rng.random(n) < 1 / (1 + np.exp(-odds))
        found = estimates.length_controlled_win_rate(won, np.full(n, 0.5), gap, np.zeros(n))
        yield found, 1 / (1 + math.exp(-theta))

    return draw


def ratings(*quality: float) -> Case:
    """Bradley-Terry ratings above the first model, from verdicts on all pairs."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        models = len(quality)
        wins = np.zeros((n, models, models))
        for i in range(models):
            for j in range(i):
                won = rng.random(n) < 1 / (1 + math.exp(quality[j] - quality[i]))
                wins[:, i, j], wins[:, j, i] = won, ~won
        table = estimates.bradley_terry(wins, 1, RESAMPLES)
        for i in range(1, models):
            yield table[i][0], quality[i] - quality[0]

    return draw


def corrected_share(p: float) -> Case:
    """A share that is corrected for a detector's errors; its labels are drawn too."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        se, sp = (right / labels for right, labels in (SENSITIVITY, SPECIFICITY))
        found = rng.binomial(n, p * se + (1 - p) * (1 - sp))
        yield estimates.corrected_share(int(found), n, *_labels(rng, se, sp)), p

    return draw


def corrected_difference(a: float, b: float) -> Case:
    """A paired difference of such shares."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        se, sp = (right / labels for right, labels in (SENSITIVITY, SPECIFICITY))
        hard = rng.random(n)
        seen = [np.where(hard < p, rng.random(n) < se, rng.random(n) < 1 - sp) for p in (a, b)]
        raw = estimates.paired_difference(*seen, 1, RESAMPLES)
        yield estimates.corrected_difference(raw, *_labels(rng, se, sp)), a - b

    return draw


def _labels(
    rng: np.random.Generator, se: float, sp: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    return (
        (int(rng.binomial(SENSITIVITY[1], se)), SENSITIVITY[1]),
        (int(rng.binomial(SPECIFICITY[1], sp)), SPECIFICITY[1]),
    )


def with_people(p: float, bias: float) -> Case:
    """A win rate by people on n prompts and a judge on 400 more, who says yes too often."""

    def draw(rng: np.random.Generator, n: int) -> Drawn:
        people = rng.random(n + 400) < p
        judge = np.where(rng.random(n + 400) < 0.2, rng.random(n + 400) < bias, people)
        yield estimates.prediction_powered(people[:n], judge[:n], judge[n:]), p

    return draw


CASES: dict[str, dict[str, Case]] = {
    "share of prompts (Wilson)": {f"p = {p}": share(p) for p in (0.02, 0.1, 0.5, 0.95)},
    "mean (Student's t)": {kind: mean(kind) for kind in ("lengths", "rewards")},
    "mean of shares in answers": {f"p = {p}": shares_of_answers(p) for p in (0.05, 0.3, 0.9)},
    "clustered share": {f"p = {p}": clustered_share(p) for p in (0.1, 0.6, 0.9)},
    "paired difference of scores (BCa)": {k: difference_of_scores(k) for k in ("normal", "skewed")},
    "paired difference of shares (Tango)": {
        "all equal but 2 %": difference_of_shares(0.5, 0.02, 0.0),
        "5 % gained, 5 % lost": difference_of_shares(0.05, 0.05, 0.05),
        "10 % gained, 2 % lost": difference_of_shares(0.5, 0.1, 0.02),
        "30 % gained, 20 % lost": difference_of_shares(0.5, 0.3, 0.2),
    },
    "paired difference of win rates (Tango)": {
        "half of the wins changed": difference_of_wins(0.1, 0.15, 0.5, 0.2, 0.05),
        "20 % changed": difference_of_wins(0.02, 0.06, 0.8, 0.08, 0.04),
        "5 % changed": difference_of_wins(0.0, 0.01, 0.95, 0.02, 0.02),
        "10 % from or to ties": difference_of_wins(0.0, 0.05, 0.9, 0.05, 0.0),
    },
    "win rate": {
        "50 %, no ties": win_rate(0.5, 0.0),
        "60 %, 40 % ties": win_rate(0.6, 0.4),
        "90 %, no ties": win_rate(0.9, 0.0),
        "50 %, 90 % ties": win_rate(0.5, 0.9),
        "98 %, 10 % ties": win_rate(0.98, 0.1),
    },
    "win rate at equal length": {
        "50 %": win_rate_at_equal_length(0.0, 1.0),
        "80 %": win_rate_at_equal_length(math.log(4), 1.0),
        "95 %": win_rate_at_equal_length(math.log(19), 1.0),
    },
    "Bradley-Terry ratings": {"close": ratings(0, 0.2, 0.4), "far": ratings(0, 1.0, 2.5)},
    "share corrected for a detector": {f"p = {p}": corrected_share(p) for p in (0.02, 0.2, 0.9)},
    "difference of corrected shares": {
        "0.2 and 0.2": corrected_difference(0.2, 0.2),
        "0.3 and 0.2": corrected_difference(0.3, 0.2),
        "0.9 and 0.6": corrected_difference(0.9, 0.6),
    },
    "people and a judge": {
        "judge fair": with_people(0.6, 0.6),
        "judge says yes": with_people(0.6, 1.0),
        "nearly always": with_people(0.95, 1.0),
    },
}
"""Kind of interval -> case -> its simulation."""


def coverage(case: Case, n: int, evaluations: int = 1_000, seed: int = 0) -> float:
    """Return the share of intervals that include the truth; one without limits includes all."""
    rng = np.random.default_rng([seed, n])
    inside = [
        found["low"] is None
        or found["high"] is None
        or found["low"] - 1e-12 <= truth <= found["high"] + 1e-12
        for _ in range(evaluations)
        for found, truth in case(rng, n)
    ]
    return float(np.mean(inside))


def rows(evaluations: int) -> Iterator[tuple[Any, ...]]:
    """Yield kind, case and coverage at each size."""
    for kind, cases in CASES.items():
        for name, case in cases.items():
            yield kind, name, *(coverage(case, n, evaluations) for n in SIZES)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=1_000)
    print(f"| interval | case | {' | '.join(f'n = {n}' for n in SIZES)} |")
    print(f"|---|---|{'---|' * len(SIZES)}")
    for kind, name, *found in rows(parser.parse_args().evaluations):
        cells = (f"{100 * x:.1f}" if 0.93 <= x <= 0.97 else f"**{100 * x:.1f}**" for x in found)
        print(f"| {kind} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
