# SPDX-License-Identifier: Apache-2.0
"""Signs of over-optimisation and of failing training in PPO's log, with their meaning and remedy.

No sign rests on a single rollout: the standard error of its mean over B episodes,
`reward/score_std` / sqrt(B), is seldom small compared with the effect of one update. Levels are
medians of the last lines. Changes are judged in standard errors, estimated from the scatter of the
lines, which covers the sampling of both prompts and completions and exists for every metric.
Gold rewards are for measuring only: no sign reads `rewards/gold`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from statistics import fmean, linear_regression, median, variance
from typing import NamedTuple

from lora_rlhf.estimates import UNDEFINED

LATEST = 3
"""Number of lines whose median is a level, so that one unusual rollout is no sign."""

ENDS = 5
"""Lines at each end of the log between which a change is judged. The first lines show SFT: the
learning rate warms up, and at first only the value model is trained."""

WINDOW = 12, 50
"""Fewest and most lines of a trend. It covers the latter half of the log: rewards first rise and
then fall (2210.10760), and the rise must not hide the fall."""

SIGMAS = 4.0
"""Standard errors above which a difference is a change. With the 8 degrees of freedom of 2 * ENDS
lines, Student's t exceeds 4 by chance in 1 of 500 tests, and there is a test at every update."""

EFFECT = 0.2
"""Smallest relevant fall of the reward, in standard deviations of the score: Cohen's small
effect."""

STAGNANT = 1 / 3
"""Share of the proxy's gain below which a held-out reward stagnates, beyond statistical doubt."""

KL_SEQUENCE = 30.0
"""Nats per sequence. A rule of thumb, twice the usual value of docs/metrics.md: no paper gives a
bound, and the KL at which the gold reward falls grows with the reward model (2210.10760)."""

KL_TOKEN = 0.5
"""Nats per token, the limit for short completions. The entropy of text under a language model is
2 to 3 nats per token, and our healthy runs stay below 0.2."""

KL_RUNAWAY = 5.0
"""Nats per sequence above which accelerating growth is a sign; a run starts with such growth."""

KL_NEGATIVE = -1.0
"""Nats per sequence. KL is never negative, but its k1 estimate may be a few tenths below 0."""

LENGTH = 0.5, 1.3
"""Ratios of the mean length to that of the first lines below and above which it has drifted.
2310.03716: length accounts for most of PPO's gain on several reward models."""

EOS = 0.5
"""Share of the first lines' eos rate below which it has collapsed."""

REPETITION = 0.2
"""Share of repeated 4-grams. 1908.04319: below 0.01 in human text, 0.4 in looping greedy text."""

ENTROPY = 0.3
"""Share of the first lines' entropy below which it has collapsed; healthy runs keep 0.7."""

CLIP_FRACTION = 0.2
"""Share of clipped tokens. 2402.14740: below 0.05 as a rule; several epochs may reach 0.2."""

APPROX_KL = 0.1
"""Nats per token between the policies before and after one update. PPO implementations stop early
at 0.01 to 0.03; our healthy runs are below 0.004."""

RATIO_MAX = 20.0
"""Largest ratio of a token: rare tokens reach 5 in healthy runs, and more in bfloat16."""

RATIO_START = 0.1
"""|ratio - 1| on unchanged weights: half of the tolerance of `identities` in bfloat16."""

VALUE_LINES = 20
"""Lines after which values must predict returns better than a constant (explained variance)."""

VALUE_LOSS = 10.0
"""Factor over the value loss of the first line above which it has diverged, if it also exceeds the
variance of the score."""

SPREAD = 1e-6
"""Standard deviation of the score below which all episodes score alike, as in `reward_gate`."""

_RATE = "lower ppo.args.learning_rate (to a third) or num_iterations"
_KL = "raise ppo.kl_coef, or set ppo.kl_target or ppo.kl_budget"

MEANINGS = {
    "nan": ("a loss, reward or gradient is not finite, and so is everything computed from it",
            f"{_RATE}; look for a reward function that returns NaN"),
    "over_optimised": ("the policy exploits the reward model: a second reward model, trained on "
                       "other comparisons, finds its answers worse",
                       f"set ppo.watch: best, which keeps the policy of the peak; {_KL}; use "
                       "reward.ensemble"),
    "held_out_flat": ("the gain may exist only for the reward model that is optimised",
                      "read the samples; lower ppo.updates, or raise ppo.kl_coef"),
    "kl_high": ("the policy is far from SFT, where the reward model was never trained",
                f"{_KL}; {_RATE}; lower ppo.updates"),
    "kl_accelerating": ("the policy runs away from SFT, and the KL penalty does not hold it",
                        f"{_KL}; {_RATE}"),
    "kl_negative": ("samples do not come from the distribution whose log-probs are computed",
                    "use plain sampling: check the generation config of the base model"),
    "length_up": ("usually the reward depends on length",
                  "read stages.reward.accuracy_by_length in the record; add comparisons in which "
                  "the shorter completion is better"),
    "length_down": ("the policy avoids risk with short answers, or the reward favours them",
                    "read the samples; raise ppo.kl_coef"),
    "eos_collapse": ("completions are cut off at max_completion_length instead of ending",
                     "raise ppo.missing_eos_penalty or ppo.kl_coef"),
    "repetition": ("completions loop: the policy degenerates, whatever its reward",
                   f"{_KL}; add comparisons in which looping answers lose"),
    "entropy_collapse": ("the policy always gives the same answers and no longer explores",
                         "raise ppo.kl_coef or ppo.entropy_coef, or lower the learning rate"),
    "clip_fraction": ("updates are too large, so that clipping discards much of them", _RATE),
    "update_too_large": ("one update moves the policy too far from the one that made its samples",
                         _RATE),
    "ratio_max": ("one update changes the probability of single tokens far too much", _RATE),
    "ratio_start": ("log-probs of unchanged weights differ between two forwards, so that every "
                    "ratio is wrong",
                    "set model.dtype to float32 or bfloat16; report it with record.json"),
    "skipped": ("micro-batches were left out, because their mean ratio was too large", _RATE),
    "value_loss": ("the values diverge, and the advantages with them",
                   "lower ppo.value_learning_rate, or set ppo.normalize_reward: true"),
    "explained_variance": ("the values predict returns worse than a constant would, and add noise "
                           "to the advantages",
                           "raise ppo.value_warmup_updates, ppo.value_learning_rate or the number "
                           "of episodes per rollout"),
    "no_spread": ("all episodes have the same score, so there is nothing to learn from",
                  "use a reward that distinguishes completions, and more varied prompts"),
}  # fmt: skip
"""Sign -> meaning and remedy."""

SERIOUS = {
    "nan", "over_optimised", "kl_high", "kl_accelerating", "eos_collapse", "repetition",
    "entropy_collapse", "update_too_large",
}  # fmt: skip
"""Signs that get worse with further training: stop, or return to an earlier policy."""

_HIGHEST = {
    "clip_fraction": ("policy/clip_fraction", CLIP_FRACTION),
    "update_too_large": ("policy/approx_kl", APPROX_KL),
    "ratio_max": ("policy/ratio_max", RATIO_MAX),
    "ratio_start": ("policy/ratio_start", RATIO_START),
}
"""Sign -> its metric, and the highest level of a healthy run."""

Logged = Sequence[dict[str, float]]
"""Lines of PPO's log, one per update."""


class Sign(NamedTuple):
    """A sign of trouble; `ppo.watch` decides how a run reacts to serious ones."""

    name: str  # a key of MEANINGS
    message: str  # the numbers, their meaning and the remedy
    serious: bool = True
    what: str = ""  # only the numbers


class Change(NamedTuple):
    """A level before and after, and their difference in standard errors."""

    before: float
    after: float
    sigmas: float


class Trend(NamedTuple):
    """The gain of a fitted line from its first to its last point, with its standard error."""

    gain: float
    error: float
    lines: int

    @property
    def sigmas(self) -> float:
        """The gain in standard errors; infinite without residuals."""
        return _sigmas(self.gain, self.error)


def signs(lines: Logged) -> list[Sign]:
    """The signs that hold at the last line, given the lines before it."""
    return [
        Sign(name, f"{what}: {why}; to do: {remedy}", name in SERIOUS, what)
        for check in (_nan, _rewards, _kl, _completions, _policy, _value)
        for name, what in check(lines)
        for why, remedy in [MEANINGS[name]]
    ]


def history(lines: Logged) -> list[tuple[int, Sign]]:
    """Every sign that ever held, with its first update (from 0)."""
    first: dict[str, tuple[int, Sign]] = {}
    for update in range(len(lines)):
        for sign in signs(lines[: update + 1]):
            first.setdefault(sign.name, (update, sign))
    return list(first.values())


def series(lines: Logged, name: str) -> list[float]:
    """The finite values of a metric, in the order of the lines that have it."""
    values = (line.get(name) for line in lines)
    return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]


def change(values: Sequence[float], ends: int = ENDS) -> Change | None:
    """Compare the means of the first and last values: Student's t, equal sample sizes."""
    if len(values) < 2 * ends:
        return None
    first, last = values[:ends], values[-ends:]
    error = math.sqrt((variance(first) + variance(last)) / ends)
    before, after = fmean(first), fmean(last)
    return Change(before, after, _sigmas(after - before, error))


def trend(values: Sequence[float]) -> Trend | None:
    """Fit a line to the latter half of the series; the standard error is that of the residuals.

    The variance of the noise is at least the one estimated from differences of neighbours over the
    whole series (von Neumann 1941), because a few points may lie on a line by chance.
    """
    least, most = WINDOW
    if len(values) < least:
        return None
    y = values[-min(max(len(values) // 2, least), most) :]
    n = len(y)
    slope, intercept = linear_regression(range(n), y)
    residual = sum((v - intercept - slope * x) ** 2 for x, v in enumerate(y)) / (n - 2)
    steps = [b - a - slope for a, b in itertools.pairwise(values)]
    noise = max(residual, fmean(step**2 for step in steps) / 2)
    spread = n * (n**2 - 1) / 12  # the sum of (x - mean)^2 over 0 ... n - 1
    return Trend(slope * (n - 1), math.sqrt(noise / spread) * (n - 1), n)


def _sigmas(difference: float, error: float) -> float:
    if error > 1e-12:
        return difference / error
    return math.copysign(math.inf, difference) if abs(difference) > 1e-12 else 0.0


def _level(lines: Logged, name: str) -> float | None:
    """The median of the latest lines, or None if there are too few."""
    values = series(lines[-LATEST:], name)
    return median(values) if len(values) == LATEST else None


_Signs = Iterator[tuple[str, str]]
"""Name and numbers of each sign."""


def _nan(lines: Logged) -> _Signs:
    bad = [
        f"{key} = {value}"
        for key, value in (lines[-1] if lines else {}).items()
        if isinstance(value, float) and not math.isfinite(value)
        if key not in UNDEFINED and not key.startswith("rewards/")
    ]
    if bad:
        yield "nan", ", ".join(bad)


def _rewards(lines: Logged) -> _Signs:
    """The proxy rises, but the held-out reward, which is not optimised, does not."""
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


def _kl(lines: Logged) -> _Signs:
    sequence, token = _level(lines, "kl/sequence"), _level(lines, "kl/k1")
    if sequence is not None and (sequence > KL_SEQUENCE or (token or 0.0) > KL_TOKEN):
        per_token = f" ({token:.2g} per token)" if token is not None else ""
        limit = f"{KL_SEQUENCE:g}" if sequence > KL_SEQUENCE else f"{KL_TOKEN:g} per token"
        what = f"KL to SFT is {sequence:.3g} nats per sequence{per_token}, above {limit}"
        yield "kl_high", what
    if sequence is not None and sequence < KL_NEGATIVE:
        yield "kl_negative", f"KL to SFT is estimated at {sequence:.3g} nats per sequence"
    values = series(lines[-4 * LATEST :], "kl/sequence")
    if len(values) == 4 * LATEST:
        a, b, c = (median(values[i : i + 4]) for i in (0, 4, 8))
        # True for exponential growth, false for a straight line or a parabola from 0.
        if c > KL_RUNAWAY and c > 2 * b and c - b > 2 * (b - a):
            what = f"KL to SFT went from {a:.3g} to {b:.3g} to {c:.3g} (medians of 4 updates)"
            yield "kl_accelerating", what


def _completions(lines: Logged) -> _Signs:
    keys = ("completions/length", "completions/eos_rate", "completions/repetition")
    length, ended, looped = (change(series(lines, key)) for key in keys)
    least, most = LENGTH
    if length:
        what = f"from {length.before:.3g} to {length.after:.3g} tokens"
        if length.sigmas > SIGMAS and length.after > most * length.before:
            cut = f", and {1 - ended.after:.0%} are cut off" if ended and ended.after < 1 else ""
            yield "length_up", f"completions grew {what}{cut}"
        if length.sigmas < -SIGMAS and length.after < least * length.before:
            yield "length_down", f"completions shrank {what}"
    if ended and ended.sigmas < -SIGMAS and ended.after < EOS * ended.before:
        what = f"completions with an end token fell from {ended.before:.0%} to {ended.after:.0%}"
        yield "eos_collapse", what
    if looped and looped.sigmas > SIGMAS and looped.after > max(REPETITION, 2 * looped.before):
        what = f"repeated 4-grams rose from {looped.before:.1%} to {looped.after:.0%}"
        yield "repetition", what


def _policy(lines: Logged) -> _Signs:
    entropy = change(series(lines, "policy/entropy"))
    if entropy and entropy.sigmas < -SIGMAS and entropy.after < ENTROPY * entropy.before:
        what = f"entropy fell from {entropy.before:.3g} to {entropy.after:.3g} nats per token"
        yield "entropy_collapse", what
    for name, (key, highest) in _HIGHEST.items():
        level = _level(lines, key)
        if level is not None and level > highest:
            yield name, f"{key} is {level:.3g}, above {highest:g}"
    skipped = series(lines[-1:], "policy/skipped")
    if skipped and skipped[0] > 0:
        yield "skipped", f"{skipped[0]:.0%} of the last update's micro-batches were left out"


def _value(lines: Logged) -> _Signs:
    losses, spread = series(lines, "value/loss"), _level(lines, "reward/score_std")
    if len(losses) > LATEST and spread is not None:
        before, after = losses[0], fmean(losses[-LATEST:])
        if after > max(VALUE_LOSS * before, spread**2):
            yield "value_loss", f"value/loss rose from {before:.3g} to {after:.3g}"
    explained = series(lines, "value/explained_variance")
    if len(explained) >= VALUE_LINES:
        late = median(explained[-VALUE_LINES // 2 :])
        if late < 0:
            what = f"value/explained_variance is {late:.2g} after {len(explained)} updates"
            yield "explained_variance", what
