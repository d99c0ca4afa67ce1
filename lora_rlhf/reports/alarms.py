# SPDX-License-Identifier: Apache-2.0
"""Signs of over-optimisation and of sickness in PPO's log, in plain words.

No sign rests on one rollout: its mean over B episodes has a standard error of
`reward/score_std` / sqrt(B), which is seldom small beside a step of training. Levels are medians of
the last few lines. Changes are judged in standard errors taken from the scatter of the lines
themselves, which holds the drawing of prompts and of completions both and is there for every
metric. Gold rewards are for measuring only: nothing here reads `rewards/gold`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median
from typing import NamedTuple

from lora_rlhf.estimates import UNDEFINED

LATEST = 3
"""Lines whose median is a level: one odd rollout is no sign, two of three are."""

ENDS = 5
"""Lines at each end of the log between which a change is judged. The first ones are SFT's own
behaviour: the learning rate warms up, and at first only the value learns."""

WINDOW = 12, 50
"""A trend is that of the latter half of the log, of at least and at most so many lines: a peak
that is behind must not hide a decline (2210.10760: rewards rise first, then fall)."""

SIGMAS = 4.0
"""Standard errors that make a change. With the 8 degrees of freedom of 2 * ENDS lines, Student's t
is above 4 by chance in 1 of 500 looks, and there is a look at every update."""

EFFECT = 0.2
"""Size that a fall of the reward must have, in standard deviations of the score: Cohen's small."""

STAGNANT = 1 / 3
"""A held-out reward that certainly gains less than this share of the proxy's gain stagnates."""

KL_SEQUENCE = 30.0
"""Nats per sequence. A rule of thumb: no paper gives a bound, and the distance at which the gold
reward falls grows with the reward model (2210.10760). Twice what docs/metrics.md calls usual."""

KL_TOKEN = 0.5
"""Nats per token: the same for short completions. The entropy of text under a language model is
2 to 3 nats per token, and healthy runs of ours stay below 0.2."""

KL_RUNAWAY = 5.0
"""Nats per sequence above which growing growth is a sign; below it, it is just the start."""

KL_NEGATIVE = -1.0
"""KL is never negative; its k1 estimate, averaged over rollouts, is by noise of a few tenths."""

LENGTH = 0.5, 1.3
"""Mean length over that of the first lines, below and above which it drifted. 2310.03716: length
accounts for most of what PPO gains on several reward models."""

EOS = 0.5
"""Share of the first lines' eos rate that is left when it collapsed."""

REPETITION = 0.2
"""Share of repeated 4-grams. 1908.04319: below 0.01 in people's text, about 0.4 in greedy text that
loops."""

ENTROPY = 0.3
"""Share of the first lines' entropy that is left when it collapsed; healthy runs keep 0.7."""

CLIP_FRACTION = 0.2
"""Share of clipped tokens. 2402.14740: below 0.05 as a rule; several epochs may reach 0.2."""

APPROX_KL = 0.1
"""Nats per token between the policies before and after one update. Early stopping of PPO's
implementations is at 0.01 to 0.03; healthy runs of ours are below 0.004."""

RATIO_MAX = 20.0
"""Largest ratio of a token: rare tokens reach 5 in healthy runs, and more in bfloat16."""

RATIO_START = 0.1
"""|ratio - 1| on unchanged weights: half of what guards.py allows in bfloat16, its widest."""

VALUE_LINES = 20
"""Lines after which the values must foresee more than a constant would (explained variance)."""

VALUE_LOSS = 10.0
"""Times the value loss of the first line, and above the variance of the score: it blew up."""

SPREAD = 1e-6
"""Standard deviation of the score below which all episodes are alike: as in guards.gate_reward."""

_RATE = "a lower ppo.args.learning_rate (a third of it), or fewer num_iterations"
_KL = "a larger ppo.kl_coef, ppo.kl_target or ppo.kl_budget"

MEANINGS = {
    "nan": ("a loss, reward or gradient is no number, and so is what follows from it",
            f"{_RATE}; look for a reward function that returns NaN"),
    "over_optimised": ("the reward model is being exploited: what it pays for is no longer what "
                       "another one, trained on other comparisons, finds better",
                       f"ppo.watch: best keeps the policy of the peak; {_KL}; reward.ensemble"),
    "held_out_flat": ("the gain may be peculiar to the reward model that is optimised",
                      "read the samples; fewer ppo.updates, or a larger ppo.kl_coef"),
    "kl_high": ("the policy is far from the SFT model, where the reward model was never taught",
                f"{_KL}; {_RATE}; fewer ppo.updates"),
    "kl_accelerating": ("the policy runs away from the SFT model: the penalty does not hold it",
                        f"{_KL}; {_RATE}"),
    "kl_negative": ("samples do not come from the distribution that log-probs are computed of",
                    "plain sampling: look at the generation config of the base model"),
    "length_up": ("a reward that goes by length is the usual reason",
                  "stages.reward.accuracy_by_length of the record; comparisons whose better "
                  "completion is the shorter one"),
    "length_down": ("completions shrink to what is safe, or the reward pays for being short",
                    "read the samples; a larger ppo.kl_coef"),
    "eos_collapse": ("completions are cut off at max_completion_length instead of ending",
                     "a larger ppo.missing_eos_penalty or ppo.kl_coef"),
    "repetition": ("completions loop: the policy degenerates, whatever the reward says",
                   f"{_KL}; comparisons in which loops lose"),
    "entropy_collapse": ("the policy says the same thing always, and explores no more",
                         "a larger ppo.kl_coef, ppo.entropy_coef, or a lower learning rate"),
    "clip_fraction": ("much of what is learned is cut off: updates are too large", _RATE),
    "update_too_large": ("one update moves the policy too far from the one that made its samples",
                         _RATE),
    "ratio_max": ("single tokens change out of all proportion in one update", _RATE),
    "ratio_start": ("log-probs of unchanged weights differ between two forwards, so that every "
                    "ratio is wrong",
                    "model.dtype: float32 or bfloat16; report it with record.json"),
    "skipped": ("micro-batches were left out, their mean ratio being too large to learn from",
                _RATE),
    "value_loss": ("the values diverge, and advantages with them",
                   "a lower ppo.value_learning_rate, or ppo.normalize_reward: true"),
    "explained_variance": ("the values foresee the returns worse than a constant, so that they "
                           "add noise to the advantages",
                           "more ppo.value_warmup_updates, a higher ppo.value_learning_rate, "
                           "more episodes per rollout"),
    "no_spread": ("all episodes score alike: there is nothing to learn from",
                  "a reward that tells completions apart; more varied prompts"),
}  # fmt: skip
"""For every sign: what it means, and what to try."""

SERIOUS = {
    "nan", "over_optimised", "kl_high", "kl_accelerating", "eos_collapse", "repetition",
    "entropy_collapse", "update_too_large",
}  # fmt: skip
"""Those that training on will only make worse, so that it is right to stop or to pull back."""

_HIGHEST = {
    "policy/ratio_max": RATIO_MAX, "policy/clip_fraction": CLIP_FRACTION,
    "policy/approx_kl": APPROX_KL, "policy/ratio_start": RATIO_START,
}  # fmt: skip


class Sign(NamedTuple):
    """What was seen; `serious` ones are acted upon as `ppo.watch` says.

    Attributes:
        name: A key of `MEANINGS`.
        message: All of it: the numbers, what they mean, what to try.
        what: The numbers alone.
    """

    name: str
    message: str
    serious: bool = True
    what: str = ""


class Change(NamedTuple):
    """A level before and after, and their difference in standard errors."""

    before: float
    after: float
    sigmas: float


class Trend(NamedTuple):
    """A straight line through a series: what it gains from end to end, and the standard error."""

    gain: float
    error: float
    lines: int

    @property
    def sigmas(self) -> float:
        """The gain in standard errors; a perfect line has infinitely many."""
        return _sigmas(self.gain, self.error)


def signs(lines: Sequence[dict[str, float]]) -> list[Sign]:
    """The signs that hold at the last of PPO's log lines, given the ones before."""
    return [
        Sign(name, f"{what}: {MEANINGS[name][0]}; try {MEANINGS[name][1]}", name in SERIOUS, what)
        for check in _CHECKS
        for name, what in check(lines)
    ]


def history(lines: Sequence[dict[str, float]]) -> list[tuple[int, Sign]]:
    """Every sign that held at some update, once, with the first such update (from 0)."""
    found: dict[str, tuple[int, Sign]] = {}
    for update in range(len(lines)):
        for sign in signs(lines[: update + 1]):
            found.setdefault(sign.name, (update, sign))
    return list(found.values())


def series(lines: Sequence[dict[str, float]], name: str) -> list[float]:
    """The finite values of a metric, in the order of the lines that have it."""
    values = (line.get(name) for line in lines)
    return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]


def change(values: Sequence[float], ends: int = ENDS) -> Change | None:
    """Of the mean of the last lines against that of the first: Student's two-sample t."""
    if len(values) < 2 * ends:
        return None
    first, last = values[:ends], values[-ends:]
    before, after = fmean(first), fmean(last)
    squares = sum((v - before) ** 2 for v in first) + sum((v - after) ** 2 for v in last)
    error = math.sqrt(squares / (2 * ends - 2) * 2 / ends)
    return Change(before, after, _sigmas(after - before, error))


def trend(values: Sequence[float]) -> Trend | None:
    """Least squares over the latter half of the series; its error from the residuals.

    The noise is taken to be at least what the differences of neighbours show over the whole series
    (von Neumann 1941): ten points that happen to lie on a line are no proof of one.
    """
    least, most = WINDOW
    if len(values) < least:
        return None
    y = values[-min(max(len(values) // 2, least), most) :]
    n, centre = len(y), (len(y) - 1) / 2
    spread = sum((x - centre) ** 2 for x in range(n))
    mean = fmean(y)
    slope = sum((x - centre) * v for x, v in enumerate(y)) / spread
    residual = sum((v - mean - slope * (x - centre)) ** 2 for x, v in enumerate(y)) / (n - 2)
    steps = [b - a - slope for a, b in itertools.pairwise(values)]
    variance = max(residual, fmean(step**2 for step in steps) / 2)
    return Trend(slope * (n - 1), math.sqrt(variance / spread) * (n - 1), n)


def _sigmas(difference: float, error: float) -> float:
    if error > 1e-12:
        return difference / error
    return math.copysign(math.inf, difference) if abs(difference) > 1e-12 else 0.0


def _level(lines: Sequence[dict[str, float]], name: str) -> float | None:
    """The median of the latest lines, or None where there are too few."""
    values = series(lines[-LATEST:], name)
    return median(values) if len(values) == LATEST else None


# --- the checks: each yields (name, the numbers) -------------------------------------------------

_Found = Iterator[tuple[str, str]]


def _nan(lines: Sequence[dict[str, float]]) -> _Found:
    last = lines[-1] if lines else {}
    bad = [
        k
        for k, v in last.items()
        if isinstance(v, float)
        and not math.isfinite(v)
        and k not in UNDEFINED
        and not k.startswith("rewards/")
    ]
    if bad:
        yield "nan", f"{', '.join(bad)} = {', '.join(str(last[k]) for k in bad)}"


def _rewards(lines: Sequence[dict[str, float]]) -> _Found:
    """The proxy rises; the held-out reward, which nothing optimises, does not follow."""
    proxy = trend(series(lines, "reward/score"))
    other = trend(series(lines, "rewards/held_out"))
    spread = _level(lines, "reward/score_std")
    if proxy and proxy.sigmas > SIGMAS and other and spread:
        numbers = (
            f"over the last {proxy.lines} updates the reward gained {proxy.gain:+.3g} "
            f"(standard error {proxy.error:.2g}) and the held-out reward {other.gain:+.3g} "
            f"({other.error:.2g})"
        )
        if other.sigmas < -SIGMAS and other.gain < -EFFECT * spread:
            yield "over_optimised", numbers
        elif other.gain + SIGMAS * other.error < STAGNANT * proxy.gain:
            yield "held_out_flat", numbers
    if spread is not None and spread <= SPREAD:
        yield "no_spread", f"reward/score_std was {spread:.2g} over the last {LATEST} updates"


def _kl(lines: Sequence[dict[str, float]]) -> _Found:
    sequence, token = _level(lines, "kl/sequence"), _level(lines, "kl/k1")
    if sequence is not None and (sequence > KL_SEQUENCE or (token or 0.0) > KL_TOKEN):
        per_token = f" ({token:.2g} per token)" if token is not None else ""
        yield (
            "kl_high",
            (
                f"KL to SFT is {sequence:.3g} nats per sequence{per_token}; "
                f"{KL_SEQUENCE:g}, or {KL_TOKEN:g} per token, is much"
            ),
        )
    if sequence is not None and sequence < KL_NEGATIVE:
        yield "kl_negative", f"KL to SFT is estimated at {sequence:.3g} nats per sequence"
    values = series(lines[-4 * LATEST :], "kl/sequence")
    if len(values) == 4 * LATEST:
        a, b, c = (median(values[i : i + 4]) for i in (0, 4, 8))
        # Exponential growth passes, a straight line or a parabola from 0 does not.
        if c > KL_RUNAWAY and c > 2 * b and c - b > 2 * (b - a):
            yield (
                "kl_accelerating",
                f"KL to SFT went {a:.3g}, {b:.3g}, {c:.3g} (medians of 4 updates)",
            )


def _completions(lines: Sequence[dict[str, float]]) -> _Found:
    least, most = LENGTH
    length = change(series(lines, "completions/length"))
    ended = change(series(lines, "completions/eos_rate"))
    looped = change(series(lines, "completions/repetition"))
    if length and length.sigmas > SIGMAS and length.after > most * length.before:
        cut = f", and {1 - ended.after:.0%} are cut off" if ended and ended.after < 1 else ""
        yield (
            "length_up",
            (f"completions grew from {length.before:.3g} to {length.after:.3g} tokens{cut}"),
        )
    if length and length.sigmas < -SIGMAS and length.after < least * length.before:
        yield (
            "length_down",
            (f"completions shrank from {length.before:.3g} to {length.after:.3g} tokens"),
        )
    if ended and ended.sigmas < -SIGMAS and ended.after < EOS * ended.before:
        yield (
            "eos_collapse",
            (f"{ended.after:.0%} of completions end by themselves, at first {ended.before:.0%}"),
        )
    if looped and looped.sigmas > SIGMAS and looped.after > max(REPETITION, 2 * looped.before):
        yield (
            "repetition",
            (f"{looped.after:.0%} of 4-grams are repeated, at first {looped.before:.1%}"),
        )


def _policy(lines: Sequence[dict[str, float]]) -> _Found:
    entropy = change(series(lines, "policy/entropy"))
    if entropy and entropy.sigmas < -SIGMAS and entropy.after < ENTROPY * entropy.before:
        yield (
            "entropy_collapse",
            (f"entropy fell from {entropy.before:.3g} to {entropy.after:.3g} nats per token"),
        )
    for name, key in (
        ("clip_fraction", "policy/clip_fraction"),
        ("update_too_large", "policy/approx_kl"),
        ("ratio_max", "policy/ratio_max"),
        ("ratio_start", "policy/ratio_start"),
    ):
        level = _level(lines, key)
        if level is not None and level > _HIGHEST[key]:
            yield name, f"{key} is {level:.3g}, above {_HIGHEST[key]:g}"
    skipped = series(lines[-1:], "policy/skipped")
    if skipped and skipped[0] > 0:
        yield "skipped", f"{skipped[0]:.0%} of the last update's micro-batches were left out"


def _value(lines: Sequence[dict[str, float]]) -> _Found:
    losses, spread = series(lines, "value/loss"), _level(lines, "reward/score_std")
    if len(losses) > LATEST and spread is not None:
        before, after = losses[0], fmean(losses[-LATEST:])
        if after > max(VALUE_LOSS * before, spread**2):
            yield "value_loss", f"value/loss rose from {before:.3g} to {after:.3g}"
    foreseen = series(lines, "value/explained_variance")
    if len(foreseen) >= VALUE_LINES:
        late = median(foreseen[-VALUE_LINES // 2 :])
        if late < 0:
            yield (
                "explained_variance",
                (f"value/explained_variance is {late:.2g} after {len(foreseen)} updates"),
            )


_CHECKS: tuple[Callable[[Sequence[dict[str, float]]], _Found], ...] = (
    _nan, _rewards, _kl, _completions, _policy, _value,
)  # fmt: skip
