# SPDX-License-Identifier: Apache-2.0
"""Intervals compared with scipy, and their coverage by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from lora_rlhf import estimates


def covers(estimate, truth):
    return estimate["low"] <= truth <= estimate["high"]


def assert_coverage(hits, low=0.93, high=0.97):
    """Share of intervals that contain the true value: 0.95, so that 90 % or 99 % intervals fail."""
    share = float(np.mean(hits))
    assert low <= share <= high, f"coverage {share:.3f}, expected {low} to {high}"


# --- shares and means ---


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 3), (3, 10), (10, 10), (37, 128), (999, 1000)])
def test_wilson_is_scipys(k, n):
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    found = estimates.wilson(k, n)
    assert found["low"] == pytest.approx(expected.low, abs=1e-12)
    assert found["high"] == pytest.approx(expected.high, abs=1e-12)
    assert (found["value"], found["n"]) == (k / n, n)


def test_wilson_of_zero_successes_ends_at_zero_and_has_an_upper_limit():
    found = estimates.wilson(0, 20)
    assert found["low"] == 0.0
    assert found["high"] > 0.1


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_rejects_impossible_counts(k, n):
    with pytest.raises(ValueError, match="is not a share"):
        estimates.wilson(k, n)


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 7, 30, 127, 128, 999, 1000, 1001, 50_000])
def test_t_quantile_is_scipys(dof):
    assert estimates.t_quantile(dof) == pytest.approx(stats.t.ppf(0.975, dof), rel=1e-8)


def test_mean_interval_is_scipys():
    values = np.random.default_rng(0).exponential(size=17)
    low, high = stats.t.interval(0.95, 16, loc=values.mean(), scale=stats.sem(values))
    found = estimates.mean_interval(values)
    assert found["value"] == pytest.approx(values.mean())
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["n"] == 17
    assert estimates.mean_interval(values, clusters=list(range(17))) == pytest.approx(found)


def test_clustered_error_is_millers_formula():
    """2411.00640, section 2.2: add the products of different values of one cluster."""
    values = np.random.default_rng(1).normal(size=12)
    clusters = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    centred = values - values.mean()
    total = sum(
        centred[i] * centred[j] for i in range(12) for j in range(12) if clusters[i] == clusters[j]
    )
    error = math.sqrt(total) / 12 * math.sqrt(4 / 3)
    found = estimates.mean_interval(values, clusters)
    assert found["high"] - found["value"] == pytest.approx(stats.t.ppf(0.975, 3) * error)
    assert found["n"] == 12


def test_clusters_keep_the_coverage_that_ignoring_them_loses():
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(20), 5)
    clustered, plain = [], []
    for _ in range(1500):
        values = rng.normal(size=20)[clusters] + 0.5 * rng.normal(size=100)
        clustered.append(covers(estimates.mean_interval(values, clusters.tolist()), 0.0))
        plain.append(covers(estimates.mean_interval(values), 0.0))
    assert_coverage(clustered)
    assert np.mean(plain) < 0.75


def test_seeds_with_prompts_of_their_own_are_the_t_interval_of_their_means():
    gaps = np.random.default_rng(6).normal(0.3, 1.0, size=(5, 12)) + np.arange(5)[:, None] / 4
    seeds, prompts = np.repeat(np.arange(5), 12).tolist(), list(range(60))
    found = estimates.crossed_interval(gaps.ravel(), seeds, prompts)
    plain = estimates.mean_interval(gaps.mean(axis=1))
    assert {**plain, "p": found["p"]} == found
    assert found["p"] == pytest.approx(stats.ttest_1samp(gaps.mean(axis=1), 0).pvalue)
    assert estimates.crossed_interval([1.0, 2.0], [0, 0], "ab")["low"] is None
    assert estimates.crossed_interval([1.0, 1.0], [0, 1], "ab")["p"] == 0.5


def test_prompts_that_seeds_share_add_their_own_variance():
    rng = np.random.default_rng(7)
    seeds, prompts = np.repeat(np.arange(6), 16).tolist(), [*range(16)] * 6
    crossed, plain = [], []
    for _ in range(400):
        gaps = 0.1 * rng.normal(size=(6, 1)) + rng.normal(size=16) + 0.5 * rng.normal(size=(6, 16))
        crossed.append(covers(estimates.crossed_interval(gaps.ravel(), seeds, prompts), 0.0))
        plain.append(covers(estimates.mean_interval(gaps.mean(axis=1)), 0.0))
    assert 0.92 < np.mean(crossed) < 0.98
    assert np.mean(plain) < 0.8


SHARES = (0.0,) * 40 + (0.02, 0.05, 0.3)
"""Most texts repeat nothing, a few a little, one loops."""


def test_shares_have_the_score_interval_of_their_own_spread():
    """Against the equation itself: t standard errors at the limit, s^2 there as q (1 - q)."""
    found = estimates.mean_of_shares(SHARES)
    n, p = len(SHARES), float(np.mean(SHARES))
    half = stats.t.ppf(0.975, n - 1) * stats.sem(SHARES)

    def gap(q):
        return (p - q) ** 2 * p * (1 - p) - half**2 * q * (1 - q)

    assert found["value"] == pytest.approx(p) and found["n"] == n
    assert found["low"] == pytest.approx(optimize.brentq(gap, 1e-9, p))
    assert found["high"] == pytest.approx(optimize.brentq(gap, p, 0.9))
    assert p - half < 0 < found["low"] < p < found["high"], "the mean's own interval leaves [0, 1]"


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.0, 1e-9), (1.0, 1.0, 0.9), SHARES])
def test_an_interval_of_shares_stays_between_0_and_1(values):
    found = estimates.mean_of_shares(values)
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    other = estimates.mean_of_shares([1 - value for value in values])
    assert other["low"] == pytest.approx(1 - found["high"], abs=1e-9)


def test_equal_shares_count_as_one_outcome_each():
    assert estimates.mean_of_shares([0.0] * 20) == estimates.wilson(0, 20)
    assert estimates.mean_of_shares([1.0] * 3) == estimates.wilson(3, 3)
    equal = estimates.mean_of_shares([0.1] * 7)
    assert equal["low"] < equal["value"] == pytest.approx(0.1) and equal["high"] < 0.5
    assert estimates.mean_of_shares([0.3]) == {"value": 0.3, "low": None, "high": None, "n": 1}
    with pytest.raises(ValueError, match="between 0 and 1"):
        estimates.mean_of_shares([0.5, 1.5])


def test_an_interval_of_shares_covers():
    rng = np.random.default_rng(4)
    hits = []
    for _ in range(1500):
        shares = np.where(rng.random(200) < 0.3, rng.beta(1, 9, size=200), 0.0)
        hits.append(covers(estimates.mean_of_shares(shares), 0.3 * 0.1))
    assert_coverage(hits)


def test_for_texts_that_seldom_loop_it_covers_more_than_the_interval_of_the_mean():
    rng = np.random.default_rng(5)
    ours, own = [], []
    for _ in range(1000):
        shares = np.where(rng.random(128) < 0.02, rng.beta(1, 3, size=128), 0.0)
        ours.append(covers(estimates.mean_of_shares(shares), 0.02 / 4))
        own.append(covers(estimates.mean_interval(shares), 0.02 / 4))
    assert np.mean(own) < 0.82 < 0.85 < np.mean(ours)


def test_one_value_has_no_interval():
    assert estimates.mean_interval([3.0]) == {"value": 3.0, "low": None, "high": None, "n": 1}
    assert estimates.mean_interval([1.0, 2.0], clusters=["a", "a"])["low"] is None
    assert estimates.paired_difference([3.0], [1.0], seed=0)["low"] is None


def test_scaled_moves_value_and_limits_but_not_n():
    share = estimates.wilson(2, 50)
    found = estimates.scaled(share, 1000)
    assert found["value"] == 40.0
    assert found["low"] == share["low"] * 1000
    assert found["high"] == share["high"] * 1000
    assert found["n"] == 50
    assert estimates.scaled(estimates.mean_interval([1.0]), 1000)["low"] is None


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [float("inf")], [[1.0]]])
def test_empty_lists_and_nan_are_rejected(bad):
    with pytest.raises(ValueError, match="NaN or infinity|non-empty"):
        estimates.mean_interval(bad)


# --- two models ---


@pytest.mark.parametrize(("n", "share"), [(20, 0.5), (200, 0.5), (200, 0.95), (1000, 0.95)])
def test_the_interval_of_a_quantile_is_that_of_the_binomial_and_covers(n, share):
    low, high = stats.binom.ppf([0.025, 0.975], n, share).astype(int)
    found = estimates.quantile_interval(np.arange(1, n + 1), share)
    assert (found["low"], found["high"]) == (low, high + 1)  # the order statistics by number
    rng, truth = np.random.default_rng(0), stats.expon.ppf(share)
    made = (estimates.quantile_interval(rng.exponential(size=n), share) for _ in range(500))
    assert_coverage([covers(one, truth) for one in made], 0.94, 0.99)


def test_values_of_one_cluster_count_once_for_a_quantile():
    def interval(values, clusters):
        found = estimates.quantile_interval(values, 0.5, clusters)
        return found["low"], found["high"]

    rng = np.random.default_rng(0)
    alone, names = rng.exponential(size=40), np.repeat(np.arange(40), 6).tolist()
    assert interval(alone, [*range(40)]) == interval(alone, None)
    low, high = interval(np.repeat(alone, 6), names)  # six times the same says no more
    assert low <= interval(alone, None)[0] and high >= interval(alone, None)[1]
    made = [np.repeat(rng.normal(size=40), 6) + 0.3 * rng.normal(size=240) for _ in range(300)]
    found = [estimates.quantile_interval(one, 0.5, names) for one in made]
    assert_coverage([covers(one, 0.0) for one in found], 0.93, 0.99)
    few = estimates.quantile_interval(made[0], 0.95, names)  # 40 clusters, and 72 are needed
    assert (few["low"], few["high"], few["n"]) == (None, None, 240)


def test_few_values_have_no_interval_of_a_high_quantile():
    found = estimates.quantile_interval(range(71), 0.95)
    assert (found["value"], found["low"], found["high"]) == (66.5, None, None)
    assert estimates.quantile_interval(range(73), 0.95)["high"] == 72


def test_wins_with_ties_have_the_interval_of_shares_of_the_same_size():
    """Changes of one half are those of shares at half the size."""
    half = estimates.paired_difference([0.5] * 4 + [0.0] * 26, [0.0] * 30, 0)
    whole = estimates.paired_difference([1.0] * 4 + [0.0] * 26, [0.0] * 30, 0)
    assert [2 * half[key] for key in ("value", "low", "high")] == pytest.approx(
        [whole[key] for key in ("value", "low", "high")]
    )
    same = estimates.paired_difference([0.5] * 30, [0.5] * 30, 0)
    assert same["value"] == 0 and same["low"] == pytest.approx(-same["high"])
    assert same["high"] > 0.05, "30 prompts prove no draw"
    mixed = estimates.paired_difference(
        [1, 0.5, 0.5, 0] + [0.5] * 26, [0, 0, 1, 0.5] + [0.5] * 26, 0
    )
    assert mixed["value"] == pytest.approx(0.5 / 30) and mixed["low"] < 0 < mixed["high"]


def test_unpaired_differences_are_welchs_and_newcombes():
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, 40), rng.normal(0, 3, 15)
    found = estimates.unpaired_difference(a, b)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.01)
    shares = estimates.unpaired_difference([1] * 56 + [0] * 14, [1] * 48 + [0] * 32)
    # Newcombe 1998, table II, example (a), method 10
    assert [round(shares[key], 4) for key in ("value", "low", "high")] == [0.2, 0.0524, 0.3339]
    assert estimates.unpaired_difference([1], [0, 1])["low"] is None
    assert estimates.unpaired_difference([2.5] * 3, [0.5] * 3)["high"] == 2


def test_paired_difference_is_scipys_bca():
    rng = np.random.default_rng(3)
    a, b = rng.lognormal(0, 1.2, size=30), rng.uniform(size=30)

    def oracle(method):
        limits = stats.bootstrap(
            (a - b,), np.mean, n_resamples=40_000, method=method, rng=np.random.default_rng(4)
        ).confidence_interval
        return pytest.approx(tuple(limits), rel=0.04)  # Monte-Carlo error: 0.01

    found = estimates.paired_difference(a, b, seed=5, resamples=40_000)
    assert found["value"] == pytest.approx((a - b).mean())
    assert (found["low"], found["high"]) == oracle("BCa")
    assert (found["low"], found["high"]) != oracle("percentile")


def test_paired_difference_covers():
    rng = np.random.default_rng(6)
    hits = []
    for seed in range(600):
        difficulty = 5 * rng.normal(size=60)
        a, b = difficulty + rng.normal(size=60) + 0.3, difficulty + rng.exponential(size=60)
        hits.append(covers(estimates.paired_difference(a, b, seed, resamples=800), 0.3 - 1.0))
    assert_coverage(hits, 0.92, 0.975)


def test_paired_difference_is_seeded_and_paired():
    rng = np.random.default_rng(7)
    difficulty = 100 * rng.normal(size=50)
    a, b = difficulty + 1 + 0.1 * rng.normal(size=50), difficulty
    found = estimates.paired_difference(a, b, seed=0)
    assert found == estimates.paired_difference(a, b, seed=0)
    assert found != estimates.paired_difference(a, b, seed=1)
    assert found["high"] - found["low"] < 0.2, "the difficulty of a prompt has to cancel"


def test_paired_difference_in_chunks_is_the_same_bootstrap(monkeypatch):
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=30), rng.normal(size=30)
    whole = estimates.paired_difference(a, b, seed=0, resamples=2000)
    monkeypatch.setattr(estimates, "_CHUNK", 30 * 64)
    assert estimates.paired_difference(a, b, seed=0, resamples=2000) == whole


def test_equal_answers_have_no_difference():
    found = estimates.paired_difference([0.1, 0.7, 0.3], [0.1, 0.7, 0.3], seed=0)
    assert found == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3}


def test_lists_of_unequal_length_are_rejected():
    for compare in (estimates.win_rate, lambda a, b: estimates.paired_difference(a, b, seed=0)):
        with pytest.raises(ValueError, match="of one length"):
            compare([1.0, 2.0], [1.0])


def test_win_rate_counts_ties_half_and_is_symmetric():
    a, b = [1.0, 2.0, 3.0, 4.0], [0.0, 2.0 + 1e-12, 3.5, 1.0]
    found, other = estimates.win_rate(a, b), estimates.win_rate(b, a)
    assert found["value"] == (1 + 0.5 + 0 + 1) / 4
    assert other["value"] == pytest.approx(1 - found["value"])
    assert other["low"] == pytest.approx(1 - found["high"])
    assert estimates.win_rate(a, b, tie=0.6)["value"] == (1 + 0.5 + 0.5 + 1) / 4


def test_win_rate_without_ties_is_wilson():
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=50), rng.normal(size=50)
    assert estimates.win_rate(a, b) == estimates.wilson(int((a > b).sum()), 50)


def test_ties_narrow_the_interval_but_never_to_a_point():
    tied = estimates.win_rate([1.0] * 10, [1.0] * 10)
    plain = estimates.wilson(5, 10)
    assert tied["value"] == 0.5
    assert plain["low"] + 0.05 < tied["low"] < 0.45
    assert 0.55 < tied["high"] < plain["high"] - 0.05


@pytest.mark.parametrize(("win", "tie"), [(0.3, 0.4), (0.85, 0.1), (0.05, 0.8), (0.5, 0.0)])
def test_win_rate_covers(win, tie):
    rng = np.random.default_rng(10)
    draws = rng.choice([1.0, 0.0, -1.0], p=[win, tie, 1 - win - tie], size=(2000, 80))
    zeros = np.zeros(80)
    hits = [covers(estimates.win_rate(row, zeros), win + tie / 2) for row in draws]
    assert_coverage(hits, 0.935, 0.985)


def test_length_control_takes_the_share_that_length_bought():
    """The judge looks at nothing but length, and a writes longer: no real advantage."""
    rng = np.random.default_rng(11)
    gap = rng.normal(8, 10, size=4000)
    judged = 1 / (1 + np.exp(-1.5 * np.tanh(gap / gap.std()))) > rng.random(4000)
    a, lengths = judged.astype(float), 50 + gap
    plain = estimates.win_rate(a, np.full(4000, 0.5))
    found = estimates.length_controlled_win_rate(
        a, np.full(4000, 0.5), lengths, np.full(4000, 50.0)
    )
    assert plain["low"] > 0.6
    assert covers(found, 0.5)
    assert found["n"] == 4000


def test_length_control_is_the_posterior_mode_of_its_model():
    rng = np.random.default_rng(12)
    a, b = rng.integers(0, 3, size=60), rng.integers(0, 3, size=60)
    long_a, long_b = rng.integers(5, 40, size=60), rng.integers(5, 30, size=60)
    gap = (long_a - long_b) / np.std(long_a - long_b)
    y = np.where(a > b, 1.0, np.where(a < b, 0.0, 0.5))

    def loss(beta):
        z = beta[0] + beta[1] * np.tanh(gap)
        data = np.sum(np.logaddexp(0, z) - y * z)
        return data + sum(np.logaddexp(0, x) - 0.5 * x for x in beta)

    best = optimize.minimize(loss, np.zeros(2), tol=1e-12).x
    found = estimates.length_controlled_win_rate(a, b, long_a, long_b)
    assert found["value"] == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-5)


def test_length_control_covers():
    rng = np.random.default_rng(13)
    hits = []
    for _ in range(800):
        gap = rng.normal(0, 10, size=100)
        p = 1 / (1 + np.exp(-(0.4 + np.tanh(gap / 10))))
        a = (rng.random(100) < p).astype(float)
        found = estimates.length_controlled_win_rate(a, np.full(100, 0.5), gap, np.zeros(100))
        hits.append(covers(found, 1 / (1 + math.exp(-0.4))))
    assert_coverage(hits, 0.925, 0.975)


def test_length_control_of_a_clean_sweep_is_finite_and_unsure():
    found = estimates.length_controlled_win_rate([1.0] * 12, [0.0] * 12, [9] * 12, [9] * 12)
    assert 0.9 < found["value"] < 1
    assert found["low"] < 0.9
    with pytest.raises(ValueError, match="12 scores but 2 lengths"):
        estimates.length_controlled_win_rate([1.0] * 12, [0.0] * 12, [9] * 2, [9] * 2)


# --- text, labels, reward models ---


def test_repetition_counts_repeated_n_grams():
    assert estimates.repetition(["a b c d e", "a b a b a b", "x"], n=2) == [0.0, 1 - 2 / 5, None]
    assert estimates.repetition([[7] * 9, [1, 2, 3], []], n=4) == [1 - 1 / 6, None, None]


def test_calibration_of_an_honest_model_lies_on_the_diagonal():
    rng = np.random.default_rng(14)
    size = np.abs(rng.normal(0, 2, size=20_000))
    right = rng.random(20_000) < 1 / (1 + np.exp(-size))
    bins = estimates.calibration(np.where(right, size, -size))
    assert sum(b["n"] for b in bins) == 20_000
    assert all(b["low"] <= b["predicted"] <= b["high"] for b in bins)
    assert all(abs(b["observed"] - b["predicted"]) < 0.05 for b in bins)
    assert estimates.calibration_error(bins) < 0.015
    boastful = estimates.calibration(np.where(right, 5 * size, -5 * size))
    assert estimates.calibration_error(boastful) > 0.1


def test_calibration_of_ties_and_empty_bins():
    bins = estimates.calibration([0.0, 0.0, 50.0, -50.0, 50.0], bins=4)
    assert [(b["low"], b["high"], b["n"]) for b in bins] == [(0.5, 0.625, 2), (0.875, 1.0, 3)]
    assert [b["observed"] for b in bins] == [0.5, pytest.approx(2 / 3)]
    assert bins[1]["observed_low"] == estimates.wilson(2, 3)["low"]
    assert estimates.calibration_error(bins) == pytest.approx(3 / 5 * (1 - 2 / 3))


def test_share_interval_covers():
    rng, inside, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        p = rng.beta(7, 3, size=40)  # 40 prompts, six pairs each, mean 0.7
        outcomes = (rng.random((40, 6)) < p[:, None]).astype(float).ravel()
        found = estimates.share_interval(outcomes, np.repeat(np.arange(40), 6).tolist())
        inside += found["low"] <= 0.7 <= found["high"]
    assert 0.93 <= inside / runs <= 0.98


def test_share_interval_at_its_edges():
    assert estimates.share_interval([1, 0, 1], "abc") == estimates.wilson(2, 3)
    assert estimates.share_interval([1, 0], "aa") == {
        "value": 0.5,
        "low": None,
        "high": None,
        "n": 2,
    }
    sure = estimates.share_interval([1.0] * 8, list("aabbccdd"))
    assert sure["high"] == 1.0 and sure["low"] < estimates.wilson(4, 4)["low"]
    with pytest.raises(ValueError, match="between 0 and 1"):
        estimates.share_interval([2.0], "a")
    with pytest.raises(ValueError, match="2 outcomes but 1"):
        estimates.share_interval([1, 0], "a")


# --- a few labels by people and many verdicts by a judge -----------------------------------------


def _draws(bias, n=100, many=400, rounds=1000, agreement=0.85):
    """People's verdicts (rounds, n), and a judge's on these and on `many` others; truth 0.6.

    The judge repeats a verdict with `agreement`, else says 1 with probability `bias`.
    """
    rng = np.random.default_rng(7)
    truth = (rng.random((rounds, n + many)) < 0.6).astype(float)
    says = (rng.random(truth.shape) < bias).astype(float)
    judge = np.where(rng.random(truth.shape) < agreement, truth, says)
    return truth[:, :n], judge[:, :n], judge[:, n:]


@pytest.mark.parametrize("bias", [0.5, 1.0, 0.0])
def test_prediction_powered_intervals_cover_whatever_the_judges_bias(bias):
    covered, widths = 0, []
    for labels, predicted, others in zip(*_draws(bias), strict=True):
        found = estimates.prediction_powered(labels, predicted, others)
        covered += found["low"] <= 0.6 <= found["high"]
        alone = estimates.mean_interval(labels)
        widths.append((found["high"] - found["low"]) / (alone["high"] - alone["low"]))
    assert covered >= 940
    assert np.mean(widths) < 0.75, "a good judge makes the interval narrower"


def test_a_useless_judge_costs_nothing():
    rng = np.random.default_rng(3)
    labels = (rng.random(200) < 0.6).astype(float)
    for judge in (rng.random(1000), np.ones(1000)):
        found = estimates.prediction_powered(labels, judge[:200], judge[200:])
        alone = estimates.mean_interval(labels)
        assert found["high"] - found["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.05)
        assert found["value"] == pytest.approx(alone["value"], abs=0.03)


# --- ratings -------------------------------------------------------------------


def compared(n, quality, seed, noise=1.0):
    """(n, K, K) verdicts on n prompts whose difficulty all pairs share."""
    rng = np.random.default_rng(seed)
    shown = np.array(quality) + noise * rng.normal(size=(n, len(quality)))
    gaps = shown[:, :, None] - shown[:, None, :]
    wins = np.where(np.abs(gaps) < 0.3, 0.5, (gaps > 0).astype(float))
    return wins * (1 - np.eye(len(quality)))


@pytest.mark.parametrize("quality", [(0, 0.4), (0, 0.3, 1.0), (0, 0, 0.5, 9)])
def test_bradley_terry_is_the_likelihoods_maximum(quality):
    wins = compared(60, quality, seed=1)
    sums = wins.sum(axis=0) + 0.5 * (1 - np.eye(len(quality)))  # with one more tie per pair

    def loss(theta):
        theta = np.concatenate(([0.0], theta))
        return float((sums * np.log1p(np.exp(theta[None, :] - theta[:, None]))).sum())

    best = optimize.minimize(loss, np.zeros(len(quality) - 1), method="BFGS", tol=1e-10)
    table = estimates.bradley_terry(wins, seed=0, resamples=100)
    mine = [table[i][0]["value"] for i in range(1, len(quality))]
    assert mine == pytest.approx(list(best.x), abs=1e-4)
    for i, j in itertools.combinations(range(len(quality)), 2):
        assert table[i][j]["value"] == pytest.approx(-table[j][i]["value"])
        assert table[i][j]["low"] < table[i][j]["value"] < table[i][j]["high"]
        assert table[i][j]["n"] == 60


def test_bradley_terry_intervals_cover():
    quality, covered = (0, 0.3, 1.0), []
    truth = estimates._ratings(compared(50_000, quality, seed=0).sum(axis=0)[None])[0]
    for seed in range(100):
        table = estimates.bradley_terry(compared(100, quality, seed + 1), seed, resamples=300)
        for i, j in itertools.combinations(range(3), 2):
            covered.append(table[i][j]["low"] <= truth[i] - truth[j] <= table[i][j]["high"])
    assert 0.9 <= np.mean(covered) <= 0.99


def test_equal_models_are_rated_alike_and_missing_verdicts_count_nothing():
    level = np.full((30, 3, 3), 0.5) * (1 - np.eye(3))
    level[10:, 0, 1] = level[10:, 1, 0] = 0
    table = estimates.bradley_terry(level, seed=0, resamples=50)
    assert table[0][1] == {"value": 0, "low": 0, "high": 0, "n": 10} and table[0][2]["n"] == 30
    assert estimates.bradley_terry(level[:1], seed=0)[0][1]["low"] is None
    with pytest.raises(ValueError, match="not shape"):
        estimates.bradley_terry(level[0], seed=0)


# --- a detector that errs ------------------------------------------------------------------------


def _labelled(rng, share, labels):
    return int(rng.binomial(labels, share)), labels


@pytest.mark.parametrize("truth", [0.02, 0.2, 0.5, 0.9])
def test_corrected_shares_cover_the_truth_though_the_detector_errs(truth):
    rng, covered, raw, values, rounds = np.random.default_rng(5), 0, 0, [], 1000
    for _ in range(rounds):
        errors = _labelled(rng, 0.93, 75), _labelled(rng, 0.88, 120)
        positives = rng.binomial(200, truth * 0.93 + (1 - truth) * 0.12)
        found = estimates.corrected_share(positives, 200, *errors)
        covered += found["low"] <= truth <= found["high"]
        raw += (
            estimates.wilson(positives, 200)["low"]
            <= truth
            <= estimates.wilson(positives, 200)["high"]
        )
        values.append(found["value"])
    assert covered >= 0.935 * rounds
    assert np.mean(values) == pytest.approx(truth, abs=0.02)
    assert raw < covered


def test_corrected_differences_cover_the_truth():
    rng, covered, rounds = np.random.default_rng(6), 0, 400
    for _ in range(rounds):
        errors = _labelled(rng, 0.85, 75), _labelled(rng, 0.8, 75)
        truth = rng.random((2, 150)) < np.array([[0.3], [0.6]])
        says = np.where(truth, rng.random(truth.shape) < 0.85, rng.random(truth.shape) < 0.2)
        raw = estimates.paired_difference(*says.astype(float), seed=0, resamples=500)
        found = estimates.corrected_difference(raw, *errors)
        covered += found["low"] <= -0.3 <= found["high"]
        assert (found["high"] < 0) == (raw["high"] < 0)
    assert 0.92 <= covered / rounds <= 0.99


def test_corrections_by_hand():
    perfect = (1000, 1000)
    found = estimates.corrected_share(30, 100, perfect, perfect)
    assert found["value"] == pytest.approx(0.3) and found["n"] == 100
    assert found["low"] == pytest.approx(estimates.wilson(30, 100)["low"], abs=0.01)
    # Rogan and Gladen: (0.3 + 0.9 - 1) / (0.8 + 0.9 - 1)
    assert estimates.corrected_share(30, 100, (80, 100), (90, 100))["value"] == pytest.approx(2 / 7)
    none = estimates.corrected_share(0, 100, (80, 100), (90, 100))
    assert none["value"] == none["low"] == 0
    assert none["high"] >= estimates.wilson(0, 100)["high"]  # fewer than the false alarms alone
    every = estimates.corrected_share(100, 100, (80, 100), (90, 100))
    assert (
        every["value"] == every["high"] == 1 and every["low"] <= estimates.wilson(100, 100)["low"]
    )
    gap = {"value": -0.2, "low": -0.3, "high": -0.1, "n": 100}
    found = estimates.corrected_difference(gap, (80, 100), (90, 100))
    assert (
        found["value"] == pytest.approx(-2 / 7) and found["low"] < -3 / 7 < -1 / 7 < found["high"]
    )
    mirrored = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 100}
    turned = estimates.corrected_difference(mirrored, (80, 100), (90, 100))
    assert turned["low"] == pytest.approx(-found["high"])
    alone = estimates.corrected_difference(gap | {"low": None, "high": None}, (8, 10), (9, 10))
    assert alone["low"] is None
    with pytest.raises(ValueError, match="no better than chance"):
        estimates.corrected_share(3, 10, (5, 10), (6, 10))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (1, 7), (12, 12), (400, 340)])
def test_paired_shares_have_mcnemars_exact_p(gained, lost):
    n = gained + lost + 21
    a, b = np.zeros(n), np.zeros(n)
    a[:gained], b[gained : gained + lost] = 1, 1
    found = estimates.paired_difference(a, b, 0)
    wanted = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert found["p"] == pytest.approx(wanted)
    assert found["low"] < found["value"] == (gained - lost) / n < found["high"]


def test_paired_shares_have_tangos_interval():
    """The published example: 21 children, of whom 1 got better and 7 worse (Tango 1998)."""
    a = np.array([0.0] * 7 + [1.0] + [0.0] * 12 + [1.0])
    b = np.array([1.0] * 7 + [0.0] + [0.0] * 12 + [1.0])
    found = estimates.paired_difference(a, b, 0)
    assert (found["low"], found["high"]) == pytest.approx((-0.517, -0.026), abs=5e-4)
    # Without ties it is Wilson's: the difference of wins and losses is 2 p - 1.
    won = np.array([1.0] * 13 + [0.0] * 7)
    found, share = estimates.paired_difference(won, 1 - won, 0), estimates.wilson(13, 20)
    ends = [2 * share[key] - 1 for key in ("low", "high")]
    assert [found["low"], found["high"]] == pytest.approx(ends)


def test_the_p_of_an_interval_is_below_5_percent_if_it_leaves_out_0():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.normal(rng.uniform(0, 0.5), 1, 80), rng.normal(0, 1, 80)
        found = estimates.paired_difference(a, b, 0, resamples=2000)
        p = estimates.p_value(found)
        assert (p < 0.05) == (found["low"] > 0 or found["high"] < 0)
        assert p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.05)
    same = estimates.paired_difference([0.3] * 4, [0.1] * 4, 0)
    assert estimates.p_value(same) == 2**-3, "four equal differences prove little"
    assert estimates.p_value(estimates.paired_difference([0.3], [0.1], 0)) is None
    assert estimates.p_value(estimates.paired_difference([0.3] * 9, [0.3] * 9, 0)) == 1


def test_p_values_far_in_the_tail_are_small_and_not_0():
    estimate = {"value": 0.731, "low": 0.575, "high": 0.904, "n": 359}
    z = 0.731 / (0.731 - 0.575) * stats.norm.ppf(0.975)
    assert estimates.p_value(estimate) == pytest.approx(2 * stats.norm.sf(z), rel=1e-3, abs=0)
    for dof in (1, 2, 7, 60, 999, 2000):
        for t in (0.0, 0.3, 2.0, 9.0, 14.0):
            exact = 2 * (stats.t(dof) if dof <= 1000 else stats.norm()).sf(t)
            assert estimates._t_p(t, dof) == pytest.approx(exact, rel=1e-6)


def test_false_discoveries_are_corrected_as_scipy_does():
    ps = np.random.default_rng(1).random(50) ** 3
    assert estimates.false_discovery(ps) == pytest.approx(stats.false_discovery_control(ps))
    assert estimates.false_discovery([]) == []


def test_an_interval_that_leaves_out_0_is_not_clear_after_a_correction():
    one = {"value": 1.0, "low": 0.1, "high": 1.9, "n": 9}
    assert estimates.differs(one) == 1 and estimates.differs(one, 2.0) == -1
    assert estimates.differs({**one, "p": 0.07}) == 0
    assert estimates.differs({**one, "p": 0.03, "p_corrected": 0.2}) == 0
    assert estimates.differs(None) == estimates.differs({**one, "low": None}) == 0


def test_a_family_is_corrected_in_place_and_estimates_without_an_interval_are_left_alone():
    clear = {"value": 0.3, "low": 0.1, "high": 0.5, "n": 100}
    close = {"value": 0.2, "low": 0.001, "high": 0.399, "n": 100}
    none = {"value": 0.2, "low": None, "high": None, "n": 1}
    estimates.correct([clear, close, none])
    assert clear["p"] == pytest.approx(0.0033, abs=1e-4) and close["p"] == pytest.approx(
        0.049, abs=1e-3
    )
    assert clear["p_corrected"] == pytest.approx(2 * clear["p"])
    assert close["p_corrected"] == close["p"]
    assert "p" not in none
