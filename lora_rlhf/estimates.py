# SPDX-License-Identifier: Apache-2.0
"""Statistics of an evaluation: every number with its 95 % interval and its n.

Shapes: N prompts (or comparisons), one number each. Two models are compared on the same prompts:
position i of both lists belongs to the same prompt.

The results go into the record, which must not depend on the version of a library. The tests compare
them with scipy's, which differ in the last digits only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(0.975)
_CHUNK = 2_000_000  # bootstrap draws in memory at once

Floats = NDArray[np.float64]

UNDEFINED = {"value/explained_variance", "completions/repetition"}
"""Metrics that may be NaN: with equal returns, and with completions of less than 4 tokens.

So may `rewards/NAME`, where a reward function does not apply to an episode.
"""


class Estimate(TypedDict):
    """A number, its two-sided 95 % interval (None if n does not allow one), and its n.

    A comparison may have `p`, of the test that there is no difference, and `p_corrected`, if it is
    one of several that are looked at.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    p: NotRequired[float]
    p_corrected: NotRequired[float]


def _floats(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"a non-empty list of numbers is needed, not shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("NaN or infinity among the values")
    return array


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    first, second = _floats(a), _floats(b)
    if first.size != second.size:
        raise ValueError(f"lists of one length are needed, not {first.size} and {second.size}")
    return first, second


def _estimate(value: float, low: float | None, high: float | None, n: int) -> Estimate:
    return {
        "value": float(value),
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
        "n": int(n),
    }


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """Convert an estimate to another unit (`factor` > 0), such as per 1,000 prompts."""
    made = estimate.copy()
    made["value"] *= factor
    low, high = estimate["low"], estimate["high"]
    made["low"] = None if low is None else low * factor
    made["high"] = None if high is None else high * factor
    return made


# --- shares and means --------------------------------------------------------------------------


def wilson(successes: float, n: int) -> Estimate:
    """A share with its score interval: Wilson 1927, as in Brown, Cai and DasGupta 2001, eq. (4).

    It never leaves [0, 1], and 0 of n has an upper limit above 0, as a safety metric needs.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a share")
    return _score_interval(successes / n, n)


def _score_interval(p: float, n: float, ties: float = 0.0) -> Estimate:
    """Solve `n (p - q)^2 = z^2 (q (1 - q) - ties / 4)` for the limits q; Wilson's at ties = 0."""
    middle = (2 * n * p + _Z**2) / (2 * (n + _Z**2))
    inside = 4 * n * p * (1 - p) - n * ties + _Z**2 * (1 - ties)
    half = _Z * math.sqrt(max(0.0, inside)) / (2 * (n + _Z**2))
    # Rounding errors must not move the limit away from a share of exactly 0 or 1.
    low = 0.0 if p == 0 else min(p, max(0.0, middle - half))
    high = 1.0 if p == 1 else max(p, min(1.0, middle + half))
    return _estimate(p, low, high, int(n))


@lru_cache(maxsize=1024)
def t_quantile(dof: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection of its distribution function.

    Source: Abramowitz and Stegun, eq. 26.7.3, 26.7.4 and, for many degrees of freedom, 26.7.5.
    """
    if dof < 1:
        raise ValueError(f"degrees of freedom must be at least 1, not {dof}")
    if dof > 1000:  # two terms of 26.7.5; the next one is below 1e-8
        g1, g2 = (_Z**3 + _Z) / 4, (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
        return _Z + g1 / dof + g2 / dof**2
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, dof) < 0.95 else (low, middle)
    return math.tan(low) * math.sqrt(dof)


def _t_within(theta: float, dof: int) -> float:
    """P(-t < T < t) of Student's t, with tan(theta) = t / sqrt(dof); eq. 26.7.3 and 26.7.4."""
    odd = dof % 2
    k = np.arange(1, (dof - odd) // 2)  # factors of successive terms: 1/2, 3/4 ... or 2/3, 4/5 ...
    coefficients = np.cumprod(np.concatenate(([1.0], (2 * k - 1 + odd) / (2 * k + odd))))
    cosine = math.cos(theta)
    powers = cosine ** (2 * np.arange(coefficients.size) + odd)
    series = math.sin(theta) * float(coefficients @ powers)
    return 2 / math.pi * (theta + (series if dof > 1 else 0.0)) if odd else series


def _t_p(t: float, dof: int) -> float:
    """The two-sided p-value of Student's t; normal for many degrees of freedom."""
    if dof > 1000:
        return math.erfc(abs(t) / math.sqrt(2))
    # The angle of `_t_within` has the density cos^(dof - 1); the tail itself is integrated, since
    # 1 - P(within) would be 0 for a p below 1e-16.
    theta = math.atan(abs(t) / math.sqrt(dof))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = (math.pi / 2 - theta) / 2
    tail = half * float(weights @ np.cos(theta + half * (nodes + 1)) ** (dof - 1))
    factor = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - math.log(math.pi) / 2
    return min(1.0, 2 * math.exp(factor) * tail)


def mean_interval(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of N numbers with a Student-t interval on C - 1 degrees of freedom.

    Args:
        values: (N,) any unit.
        clusters: (N,) the cluster of each value, such as a prompt that is answered several times;
            default: every value is its own cluster.

    The standard error is the clustered one of Miller 2024 (2411.00640, section 2.2), times
    sqrt(C / (C - 1)) for C clusters; with one value per cluster it is the usual s / sqrt(N).
    Fewer than two clusters: no interval.
    """
    array = _floats(values)
    sums = array - array.mean()
    if clusters is not None:
        if len(clusters) != array.size:
            raise ValueError(f"{array.size} values but {len(clusters)} cluster names")
        numbers: dict[Hashable, int] = {}
        codes = [numbers.setdefault(name, len(numbers)) for name in clusters]
        sums = np.bincount(codes, weights=sums).astype(np.float64)
    value, count = float(array.mean()), sums.size
    if count < 2:
        return _estimate(value, None, None, array.size)
    error = math.sqrt(count / (count - 1) * float(sums @ sums)) / array.size
    half = t_quantile(count - 1) * error
    return _estimate(value, value - half, value + half, array.size)


def crossed_interval(
    values: ArrayLike, seeds: Sequence[Hashable], prompts: Sequence[Hashable]
) -> Estimate:
    """The mean over seeds and prompts, with an interval that allows for other seeds and prompts.

    Args:
        values: (N,) such as paired differences of two models.
        seeds: (N,) the training run of each value.
        prompts: (N,) its prompt, which several seeds may share.

    The variance of the seeds' means over their number S contains what differs between seeds, their
    own prompts included. A prompt that several seeds share moves their means together: that adds
    the mean covariance of two seeds, from the products of their deviations on the same prompt. It
    is 0 without shared prompts; then this is `mean_interval` of the means. Student's t on the
    degrees of freedom of Satterthwaite 1946; `p` is of the same test, and `n` is S. One seed: no
    interval.
    """
    array = _floats(values)
    rows: dict[Hashable, list[int]] = {}
    for i, name in enumerate(seeds):
        rows.setdefault(name, []).append(i)
    means = np.array([array[row].mean() for row in rows.values()])
    value, count = float(means.mean()), len(rows)
    if count < 2:
        return _estimate(value, None, None, count)
    by_prompt: dict[Hashable, dict[Hashable, float]] = {}
    for (name, row), mean in zip(rows.items(), means, strict=True):
        for i in row:
            cells = by_prompt.setdefault(prompts[i], {})
            cells[name] = cells.get(name, 0.0) + float(array[i] - mean) / len(row)
    shared = [list(cells.values()) for cells in by_prompt.values() if len(cells) > 1]
    products = sum(sum(cells) ** 2 - sum(x * x for x in cells) for cells in shared)
    between = float(means.var(ddof=1)) / count
    within = max(0.0, products / (count * (count - 1))) if len(shared) > 1 else 0.0
    within *= len(shared) / max(1, len(shared) - 1)
    error, dof = math.sqrt(between + within), count - 1
    if within:
        parts = between**2 / (count - 1) + within**2 / (len(shared) - 1)
        dof = max(1, int((between + within) ** 2 / parts))
    half = t_quantile(dof) * error
    # Equal means: all that is known is that so many signs agree.
    p = _t_p(value / error, dof) if error else 2.0 ** (1 - count) if value else 1.0
    return {**_estimate(value, value - half, value + half, count), "p": p}


def share_interval(outcomes: ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """The mean of N clustered outcomes, such as pairs of completions with the prompt as cluster.

    Args:
        outcomes: (N,) from 0 to 1; a tie is one half.
        clusters: (N,) the cluster of each outcome.

    Wilson's interval at the effective sample size: N over the design effect (the clustered variance
    of `mean_interval` over p (1 - p) / N, at least 1), corrected for the C - 1 degrees of freedom
    of C clusters (Korn and Graubard 1998; Dean and Pagano 2015 compare such intervals). If all
    outcomes are equal, the variance is unknown and each cluster counts once. One outcome per
    cluster: `wilson`. A single cluster: no interval. `n` is N.
    """
    array = _floats(outcomes)
    if array.min() < 0 or array.max() > 1:
        raise ValueError("outcomes must lie between 0 and 1")
    n, count, value = array.size, len(set(clusters)), float(array.mean())
    if len(clusters) != n:
        raise ValueError(f"{n} outcomes but {len(clusters)} cluster names")
    if count == n:
        return wilson(float(array.sum()), n)
    if count < 2:
        return _estimate(value, None, None, n)
    return {**_score_interval(value, _effective_size(array, clusters)), "n": n}


def _effective_size(outcomes: Floats, clusters: Sequence[Hashable]) -> float:
    """The number of independent outcomes that tell as much as these of two or more clusters."""
    n, count, value = outcomes.size, len(set(clusters)), float(outcomes.mean())
    half, t = (mean_interval(outcomes, clusters)["high"] or 0.0) - value, t_quantile(count - 1)
    binomial = value * (1 - value) / n
    effect = max(1.0, (half / t) ** 2 / binomial) if binomial > 0 else n / count
    return n / effect * (_Z / t) ** 2


def mean_of_shares(values: ArrayLike) -> Estimate:
    """The mean of N shares from 0 to 1, with an interval that lies within [0, 1].

    Wilson's interval at the effective sample size p (1 - p) / s^2, with s the standard error of the
    mean, corrected for N - 1 degrees of freedom (Korn and Graubard 1998), as in `share_interval`.
    Shares vary less than outcomes of 0 and 1, so this size mostly exceeds N. For 64 to 128 texts of
    which 2 to 5 % loop, it covers 88 to 91 %, and that of `mean_interval` 59 to 80 %. If all shares
    are equal, each counts once: `wilson`. One share: no interval.
    """
    array = _floats(values)
    if array.min() < 0 or array.max() > 1:
        raise ValueError("shares must lie between 0 and 1")
    mean = mean_interval(array)
    value, n = mean["value"], mean["n"]
    if mean["high"] is None:
        return mean
    if np.ptp(array) < 1e-12:  # equal but for rounding errors
        return {**wilson(n * value, n), "value": value}
    effective = value * (1 - value) * (_Z / (mean["high"] - value)) ** 2
    return {**_score_interval(value, effective), "n": n}


def corrected_share(
    positives: float, n: int, sensitivity: tuple[int, int], specificity: tuple[int, int]
) -> Estimate:
    """The true share of positives, from the verdicts of a detector with known error rates.

    Rogan and Gladen 1978: (q + Sp - 1) / (Se + Sp - 1) for a share q of verdicts. The interval is
    that of Lang and Reiczigel 2014 (eq. 1): n, and the labels that Se and Sp come from, are all
    samples. It assumes that the detector errs here as often as on those labels. If there are fewer
    positive (or negative) verdicts than its errors alone would produce, it must err less often
    here, and the interval is extended to that of the raw share.

    Args:
        positives: Positive verdicts among n.
        sensitivity: (right, labels) among true positives; `specificity`: among true negatives.

    Raises:
        ValueError: The detector is no better than chance.
    """
    naive = wilson(positives, n)
    raw = naive["value"]
    gain = _youden(sensitivity, specificity)["value"]
    value = (raw + specificity[0] / specificity[1] - 1) / gain
    # Shrunk as in the paper: z^2 more verdicts, half of them positive; one more label of each sort.
    q = (n * raw + _Z**2 / 2) / (n + _Z**2)
    (se, labels_se), (sp, labels_sp) = (
        ((right + 1) / (labels + 2), labels + 2) for right, labels in (sensitivity, specificity)
    )
    slope = se + sp - 1
    p = (q + sp - 1) / slope
    by_se, by_sp = se * (1 - se) / labels_se, sp * (1 - sp) / labels_sp
    middle = p + 2 * _Z**2 * (p * by_se - (1 - p) * by_sp)
    variance = q * (1 - q) / (n + _Z**2) + p**2 * by_se + (1 - p) ** 2 * by_sp
    half = _Z * math.sqrt(variance) / abs(slope)
    low, high = min(middle - half, value), max(middle + half, value)
    if value < 0:
        high = max(high, naive["high"] or 0.0)
    if value > 1:
        low = min(low, naive["low"] or 0.0)
    value, low, high = (min(1.0, max(0.0, x)) for x in (value, low, high))
    return _estimate(value, low, high, n)


def corrected_difference(
    difference: Estimate, sensitivity: tuple[int, int], specificity: tuple[int, int]
) -> Estimate:
    """The difference of two shares, corrected for the errors of the detector that judged both.

    D / (Se + Sp - 1), since the false positives cancel. The interval is that of a ratio from the
    intervals of its parts (Donner and Zou 2012, MOVER-R), so that it leaves out 0 whenever that of
    the raw difference does.
    """
    gain = _youden(sensitivity, specificity)
    value, low, high = difference["value"], difference["low"], difference["high"]
    made = difference.copy()  # with its p: no difference of the shares is none of the verdicts
    made["value"] = _clipped(value / gain["value"])
    if low is not None and high is not None:
        made["low"] = _clipped(_ratio_limit(low, value, gain, upper=False))
        made["high"] = _clipped(_ratio_limit(high, value, gain, upper=True))
    return made


def _clipped(difference: float) -> float:
    return min(1.0, max(-1.0, difference))


def _youden(sensitivity: tuple[int, int], specificity: tuple[int, int]) -> Estimate:
    """Se + Sp - 1 with the interval of a sum from Wilson's (MOVER)."""
    parts = [wilson(*sensitivity), wilson(*specificity)]
    value = sum(part["value"] for part in parts) - 1
    down, up = (
        math.hypot(*((part[key] or 0.0) - part["value"] for part in parts))
        for key in ("low", "high")
    )
    if value <= max(down, up):
        raise ValueError(f"Se + Sp - 1 = {value:.2f}: the detector may be no better than chance")
    return _estimate(value, value - down, min(1.0, value + up), sensitivity[1] + specificity[1])


def _ratio_limit(limit: float, value: float, gain: Estimate, upper: bool) -> float:
    """One limit of value / gain, from a limit of the value and the opposite one of the gain."""
    if value < 0:
        return -_ratio_limit(-limit, -value, gain, not upper)
    j = gain["value"]
    far = gain["low"] if upper else gain["high"]
    assert far is not None
    inside = (value * j) ** 2 - limit * far * (2 * value - limit) * (2 * j - far)
    sign = 1 if upper else -1
    return (value * j + sign * math.sqrt(max(0.0, inside))) / (far * (2 * j - far))


def quantile_interval(
    values: ArrayLike, share: float, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """A quantile of N numbers, linear between order statistics, with an interval of two of them.

    The interval needs no distribution: the number of values below the true quantile is binomial
    (Conover 1999, section 3.2). Too few values for one of its ends: no interval. With clusters
    (default: every value is its own) it is that of the effective number of values, of which the
    share below the quantile is known as well (Woodruff 1952), if there are clusters enough.
    """
    given = _floats(values)
    array, n, value = np.sort(given), given.size, float(np.quantile(given, share))
    ranks, count = _ranks(n, share), n if clusters is None else len(set(clusters))
    if ranks and clusters is not None and count < n:
        size = _effective_size((given <= value).astype(np.float64), clusters) if count > 1 else 0.0
        ranks = _ranks(count, share) and _ranks(int(size), share)
        ranks = ranks and (ranks[0] * n // int(size), -(-ranks[1] * n // int(size)))
    if not ranks:
        return _estimate(value, None, None, n)
    return _estimate(value, array[ranks[0] - 1], array[ranks[1]], n)


def _ranks(n: int, share: float) -> tuple[int, int] | None:
    """Numbers a, b: a quantile lies between the a-th smallest value and the one after the b-th."""
    k = np.arange(n + 1)
    logs = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    masses = logs[n] - logs - logs[::-1] + k * math.log(share) + (n - k) * math.log1p(-share)
    below = np.cumsum(np.exp(masses))
    first = int(np.searchsorted(below, 0.025, side="right"))  # P(fewer than `first`) <= 0.025
    last = int(np.searchsorted(below, 0.975))  # P(`last` or fewer) >= 0.975
    return (first, last) if first >= 1 and last < n else None


def unpaired_difference(a: ArrayLike, b: ArrayLike) -> Estimate:
    """The mean of a minus that of b, of two independent samples.

    Shares, all of them 0 or 1: Newcombe 1998, method 10, from Wilson's intervals. Other numbers:
    Welch's t. Fewer than two values on a side: no interval. `n` is that of the smaller sample.
    """
    first, second = _floats(a), _floats(b)
    value, n = float(first.mean() - second.mean()), min(first.size, second.size)
    if n < 2:
        return _estimate(value, None, None, n)
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        one, two = (wilson(float(x.sum()), x.size) for x in (first, second))
        ends = [
            (e["value"] - (e["low"] or 0.0), (e["high"] or 0.0) - e["value"]) for e in (one, two)
        ]
        down, up = math.hypot(ends[0][0], ends[1][1]), math.hypot(ends[0][1], ends[1][0])
        return _estimate(value, value - down, value + up, n)
    parts = [float(x.var(ddof=1)) / x.size for x in (first, second)]
    if not any(parts):
        return _estimate(value, value, value, n)
    weights = (part**2 / (x.size - 1) for part, x in zip(parts, (first, second), strict=True))
    half = t_quantile(max(1, int(sum(parts) ** 2 / sum(weights)))) * math.sqrt(sum(parts))
    return _estimate(value, value - half, value + half, n)


# --- two models on the same prompts ------------------------------------------------------------


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int, resamples: int = 10_000) -> Estimate:
    """The mean of a - b over prompts, with a seeded BCa bootstrap interval (Efron 1987).

    Both scores of a prompt are drawn together, so that its difficulty cancels (Miller 2024,
    section 4). One prompt: no interval. All differences equal: an interval of width 0. Shares,
    which are 0 or 1 on every prompt, have `_paired_shares`, and wins with ties (0, 0.5 or 1)
    `_paired_wins`, because the bootstrap of few changes covers too little.
    """
    first, second = _pair(a, b)
    gaps = first - second
    n, value = gaps.size, float(gaps.mean())
    if n < 2:
        return _estimate(value, None, None, n)
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return _paired_shares(int((gaps > 0).sum()), int((gaps < 0).sum()), n)
    if np.isin(first, (0, 0.5, 1)).all() and np.isin(second, (0, 0.5, 1)).all():
        return _paired_wins(gaps)
    centred = gaps - value
    spread = float(centred @ centred)
    if spread <= (1e-12 * max(1.0, float(np.abs(gaps).max()))) ** 2 * n:
        return _estimate(value, value, value, n)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = gaps[rng.integers(0, n, size=(stop - start, n))].mean(axis=1)
    below = (np.count_nonzero(means < value) + np.count_nonzero(means <= value)) / (2 * resamples)
    least = 0.5 / resamples
    bias = _NORMAL.inv_cdf(min(1 - least, max(least, below)))
    # Jackknife acceleration; for a mean it is the skewness of the values over 6 sqrt(n).
    acceleration = float((centred**3).sum()) / (6 * spread**1.5)
    shares = [_NORMAL.cdf(bias + z / (1 - acceleration * z)) for z in (bias - _Z, bias + _Z)]
    low, high = np.quantile(means, shares)
    return _estimate(value, low, high, n)


def sign_flip_p(a: ArrayLike, b: ArrayLike, seed: int, resamples: int = 10_000) -> float:
    """The p-value of paired scores having the same mean, by random signs of their differences.

    Fisher's randomisation test, two-sided; (1 + as extreme) / (1 + resamples), so never 0.
    """
    first, second = _pair(a, b)
    gaps = (first - second)[first != second]
    if not gaps.size:
        return 1.0
    rng, extreme, limit = np.random.default_rng(seed), 0, abs(float(gaps.sum())) - 1e-9
    step = max(1, _CHUNK // gaps.size)
    for start in range(0, resamples, step):
        shape = (min(step, resamples - start), gaps.size)
        signs = rng.integers(0, 2, size=shape) * 2.0 - 1.0
        extreme += int(np.count_nonzero(np.abs(signs @ gaps) >= limit))
    return (1 + extreme) / (1 + resamples)


def _paired_shares(gained: int, lost: int, n: int) -> Estimate:
    """The difference of two shares of the same n prompts, of which some changed.

    Tango's score interval (1998), and `p` by McNemar's exact test: of the changed prompts, half
    would be gained if there were no difference.
    """
    changed, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1))
    return {**_tango(gained, lost, n), "p": min(1.0, 2 * tail / 2**changed)}


def _paired_wins(gaps: Floats) -> Estimate:
    """The difference of two win rates with ties on the same prompts: changes of 0.5 and of 1.

    Tango's interval for as many changes of one size as have the same sum and sum of squares.
    """
    size = float(gaps @ gaps) / max(float(np.abs(gaps).sum()), 1e-12) or 1.0
    gained, lost = (float(np.maximum(side, 0).sum()) / size for side in (gaps, -gaps))
    return scaled(_tango(gained, lost, gaps.size), size)


def _tango(gained: float, lost: float, n: int) -> Estimate:
    """Tango's score interval (1998) of the difference of two shares of the same n prompts."""
    value = (gained - lost) / n

    def score(d: float) -> float:
        """Return the deviation from d in standard errors, under the likeliest shares with d."""
        first = (2 * n - gained + lost) * d - gained - lost
        root = math.sqrt(max(0.0, first**2 + 8 * n * lost * d * (1 - d)))
        gap, variance = n * (value - d), n * ((root - first) / (2 * n) + d * (1 - d))
        return gap / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, gap)

    limits = []
    for outside in (-1.0, 1.0):
        inside = value
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(score(middle)) > _Z:
                outside = middle
            else:
                inside = middle
        limits.append(outside)
    return _estimate(value, limits[0], limits[1], n)


def p_value(estimate: Estimate, null: float = 0.0) -> float | None:
    """The p of the test that belongs to an interval: it is below 0.05 if `null` lies outside.

    The half of the interval towards `null` has the width of 1.96 standard errors. No p is below
    that of n equal signs, 2^(1 - n). None without an interval.
    """
    value, low, high = estimate["value"] - null, estimate["low"], estimate["high"]
    if low is None or high is None:
        return None
    half = value - (low - null) if value > 0 else (high - null) - value
    z = abs(value) * _Z / half if half > 0 else math.inf if value else 0.0
    return max(math.erfc(z / math.sqrt(2)), 2.0 ** (1 - estimate["n"]))


def false_discovery(ps: Sequence[float]) -> list[float]:
    """Correct the p of several tests, so that about one in twenty clear results is false.

    Benjamini and Hochberg 1995: a result is clear if its corrected p is below 0.05.
    """
    order = sorted(range(len(ps)), key=lambda i: -ps[i])
    corrected, least = [1.0] * len(ps), 1.0
    for place, i in enumerate(order):
        least = min(least, ps[i] * len(ps) / (len(ps) - place))
        corrected[i] = least
    return corrected


def correct(family: Sequence[Estimate]) -> None:
    """Give every comparison of a family its p, and the p that is corrected for the others."""
    known = [(one, p) for one in family if (p := one.get("p", p_value(one))) is not None]
    for (one, p), corrected in zip(known, false_discovery([p for _, p in known]), strict=True):
        one["p"], one["p_corrected"] = p, corrected


def differs(estimate: Estimate | None, null: float = 0.0) -> int:
    """Return 1 or -1 if an estimate is clearly above or below `null`, else 0.

    Its interval must leave `null` out, and its p, corrected if it is one of several, be below 0.05.
    """
    if estimate is None or estimate["low"] is None or estimate["high"] is None:
        return 0
    if estimate.get("p_corrected", estimate.get("p", 0.0)) >= 0.05:
        return 0
    return int(estimate["low"] > null) - int(estimate["high"] < null)


def detectable(estimate: Estimate | None) -> float | None:
    """Return the difference from the null that so many prompts show in 8 of 10 evaluations.

    A power of 80 % needs 2.8 standard errors; the width of a 95 % interval is 3.92 of them.
    """
    if estimate is None or estimate["low"] is None or estimate["high"] is None:
        return None
    return 2.8 / 3.92 * (estimate["high"] - estimate["low"])


def _outcomes(a: ArrayLike, b: ArrayLike, tie: float) -> Floats:
    """(N,) 1 where a wins, 0 where b wins, 0.5 where they differ by at most `tie`."""
    first, second = _pair(a, b)
    gaps = first - second
    return np.where(np.abs(gaps) <= tie, 0.5, (gaps > 0).astype(np.float64))


def win_rate(a: ArrayLike, b: ArrayLike, tie: float = 1e-9) -> Estimate:
    """The share of prompts on which score a beats score b; a tie (within `tie`) counts half.

    Wilson's interval with the variance of an outcome with ties: p (1 - p) - t / 4 for a share t of
    ties. The lower Wilson limit of the observed share is used for t, so that ties narrow the
    interval, but ten ties out of ten do not prove a draw.
    """
    outcomes = _outcomes(a, b, tie)
    n = outcomes.size
    tied = int(np.count_nonzero(outcomes == 0.5))
    return _score_interval(float(outcomes.mean()), n, wilson(tied, n)["low"] or 0.0)


def length_controlled_win_rate(
    a: ArrayLike, b: ArrayLike, lengths_a: ArrayLike, lengths_b: ArrayLike, tie: float = 1e-9
) -> Estimate:
    """The win rate of a if its answers were as long as b's, after AlpacaEval-LC (2404.04475).

    `logit P(a wins) = theta + phi tanh(d / std(d))`, with d the length difference in tokens; the
    value is `sigmoid(theta)`, the prediction at d = 0. The paper's terms for the difficulty of an
    instruction are left out. Ties count half. Each coefficient has a log-F(1, 1) prior
    (Greenland and Mansournia 2015), so that a model that always wins has a finite estimate. The
    interval is Wald's on the logit scale with binomial variance, which is conservative with ties.
    """
    outcomes = _outcomes(a, b, tie)
    long_a, long_b = _pair(lengths_a, lengths_b)
    if long_a.size != outcomes.size:
        raise ValueError(f"{outcomes.size} scores but {long_a.size} lengths")
    gap = long_a - long_b
    slope = np.tanh(gap / (gap.std() or 1.0))
    # A log-F(1, 1) prior is one more observation, half won, of that coefficient alone.
    x = np.vstack((np.column_stack((np.ones_like(slope), slope)), np.eye(2)))
    y = np.concatenate((outcomes, (0.5, 0.5)))
    beta = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-(x @ beta)))
        information = (x * (p * (1 - p))[:, None]).T @ x
        step = np.linalg.solve(information, x.T @ (y - p))
        beta += step / max(1.0, float(np.abs(step).max()))
        if float(np.abs(step).max()) < 1e-10:
            break
    half = _Z * math.sqrt(float(np.linalg.inv(information)[0, 0]))
    low, value, high = (1 / (1 + math.exp(-t)) for t in (beta[0] - half, beta[0], beta[0] + half))
    return _estimate(value, low, high, outcomes.size)


def bradley_terry(wins: ArrayLike, seed: int, resamples: int = 2_000) -> list[list[Estimate]]:
    """Bradley-Terry ratings of K models: [i][j] is the log-odds that model i beats model j.

    Args:
        wins: (N, K, K) over prompts, 1 where i beats j, 0 where it loses, 0.5 for both in a tie, 0
            for both without a verdict.

    Fitted by the MM algorithm of Hunter 2004 (eq. 3), with one more tie for each pair of models
    (the log-F(1, 1) prior of `length_controlled_win_rate`), so that a model that always wins has a
    finite rating. Seeded percentile bootstrap over prompts, all verdicts of a prompt together. n:
    prompts with a verdict on the pair. Fewer than two prompts: no interval.
    """
    array = np.asarray(wins, dtype=np.float64)
    if array.ndim != 3 or array.shape[1] != array.shape[2] or not array.size:
        raise ValueError(f"wins of prompts by model and model are needed, not shape {array.shape}")
    n, models = array.shape[:2]
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    sums = np.concatenate((array.sum(axis=0)[None], np.tensordot(drawn, array, axes=1)))
    ratings = _ratings(sums)
    table: list[list[Estimate]] = []
    for i in range(models):
        table.append([])
        for j in range(models):
            gaps = ratings[:, i] - ratings[:, j]
            low, high = np.quantile(gaps[1:], (0.025, 0.975)) if n > 1 else (None, None)
            judged = int(np.count_nonzero(array[:, i, j] + array[:, j, i])) if i != j else n
            table[-1].append(_estimate(float(gaps[0]), low, high, judged))
    return table


def _ratings(wins: Floats) -> Floats:
    """(R, K) logs of Bradley-Terry strengths from (R, K, K) sums of wins, one more tie per pair."""
    wins = wins + 0.5 * (1 - np.eye(wins.shape[1]))
    games, own = wins + wins.swapaxes(1, 2), wins.sum(axis=2)
    strength: Floats = np.ones_like(own)
    for _ in range(10_000):
        pairs = strength[:, :, None] + strength[:, None, :]
        new = own / (games / pairs).sum(axis=2)
        new /= np.exp(np.log(new).mean(axis=1, keepdims=True))
        step, strength = float(np.abs(np.log(new / strength)).max()), new
        if step < 1e-9:
            break
    logs: Floats = np.log(strength)
    return logs


def prediction_powered(labels: ArrayLike, predicted: ArrayLike, others: ArrayLike) -> Estimate:
    """The mean of people's verdicts from n labels and a judge's verdicts on these and N others.

    PPI++ (Angelopoulos, Duchi and Zrnic 2023, 2311.01453, example 6.1): the judge's mean over the N
    others, corrected by how far it is from people on the n. The weight of the judge minimises the
    variance, so a useless judge costs nothing. Unbiased whatever the judge's errors, if the n were
    drawn at random. n counts labels. Wilson's interval at the effective sample size, as in
    `mean_of_shares`: that of a mean would end above 1, and after equal labels be too narrow.

    Args:
        labels: (n,) by people, from 0 to 1.
        predicted: (n,) by the judge on the same prompts.
        others: (N,) by the judge on prompts that nobody labelled.
    """
    y, f = _pair(labels, predicted)
    rest = _floats(others)
    n, many = y.size, rest.size
    if n < 2 or many < 2:
        return mean_of_shares(y)
    spread = float(np.concatenate((f, rest)).var())
    covariance = float(np.cov(y, f)[0, 1])
    weight = covariance / ((1 + n / many) * spread) if spread > 1e-12 else 0.0
    value = min(1.0, max(0.0, weight * float(rest.mean()) + float((y - weight * f).mean())))
    variance = weight**2 * float(rest.var(ddof=1)) / many + float((y - weight * f).var(ddof=1)) / n
    if variance < 1e-12 or value in (0.0, 1.0):
        return wilson(n * value, n)
    half = t_quantile(n - 1) * math.sqrt(variance)
    return {**_score_interval(value, value * (1 - value) * (_Z / half) ** 2), "n": n}


# --- text, labels, reward models ---------------------------------------------------------------


def repetition(texts: Sequence[str | Sequence[int]], n: int = 4) -> list[float | None]:
    """The share of each text's n-grams that repeat an earlier one; None without any n-gram.

    seq-rep-n of Welleck et al. 2020 (1908.04319, section 6): 1 - distinct n-grams / n-grams.
    Strings are split at white space; other texts are token ids.
    """
    shares: list[float | None] = []
    for text in texts:
        units: Sequence[Any] = text.split() if isinstance(text, str) else text
        grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else None)
    return shares


def calibration(
    margins: ArrayLike, bins: int = 10, clusters: Sequence[Hashable] | None = None
) -> list[dict[str, Any]]:
    """The accuracy of a reward model by its confidence, sigmoid(|margin|) (Bradley-Terry).

    Args:
        margins: (N,) score of the chosen completion minus score of the rejected one.
        bins: Number of equal bins of the confidence, from 0.5 to 1.
        clusters: (N,) the prompt of each comparison; default: all prompts differ.

    Returns:
        One dict per bin that is not empty: `low` and `high` (its edges), `predicted` (mean
        confidence), `observed` (accuracy; a margin of 0 counts half), `observed_low`,
        `observed_high` (interval of `share_interval`) and `n`.
    """
    array = _floats(margins)
    names = list(range(array.size)) if clusters is None else list(clusters)
    confidence = 1 / (1 + np.exp(-np.abs(array)))
    right = np.where(array == 0, 0.5, (array > 0).astype(np.float64))
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    for index in np.unique(bin_of).tolist():
        inside = bin_of == index
        share = share_interval(right[inside], [names[i] for i in np.flatnonzero(inside)])
        rows.append(
            {
                "low": 0.5 + index / (2 * bins),
                "high": 0.5 + (index + 1) / (2 * bins),
                "predicted": float(confidence[inside].mean()),
                "observed": share["value"],
                "observed_low": share["low"],
                "observed_high": share["high"],
                "n": share["n"],
            }
        )
    return rows


def calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """Expected calibration error over the bins of `calibration`; 1706.04599, eq. (3)."""
    total = sum(b["n"] for b in bins)
    if not total:
        raise ValueError("all bins are empty")
    return float(sum(b["n"] * abs(b["observed"] - b["predicted"]) for b in bins) / total)
