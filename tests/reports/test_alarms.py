# SPDX-License-Identifier: Apache-2.0
"""Alarms: no sign on a healthy log or by noise, one sign per problem, no use of gold rewards."""

import math
import random

import pytest

from lora_rlhf.algorithms.ppo import ppo_metrics
from lora_rlhf.reports import alarms

EPISODES, SPREAD = 64, 0.8


def healthy(n=40, seed=0, **changes):
    """A log like those of the shipped recipe: noise of SPREAD / sqrt(EPISODES) on the rewards.

    `changes` give a metric ('/' written '__') as a function of the update.
    """
    rng = random.Random(seed)
    noise = SPREAD / math.sqrt(EPISODES)
    lines = []
    for i in range(n):
        rise = 0.4 * (1 - math.exp(-i / 10))
        line = {
            "reward/score": rise + rng.gauss(0, noise),
            "reward/score_std": SPREAD,
            "rewards/held_out": 0.7 * rise + rng.gauss(0, noise),
            "kl/sequence": min(max(0, i - 1), 30) * 0.06 * rng.uniform(0.5, 1.5),
            "kl/k1": min(max(0, i - 1), 30) * 0.005 * rng.uniform(0.5, 1.5),
            "policy/entropy": 0.33 - 0.001 * i + rng.gauss(0, 0.02),
            "policy/clip_fraction": rng.uniform(0, 0.008),
            "policy/approx_kl": rng.uniform(0, 3e-3),
            "policy/ratio_max": rng.uniform(1.1, 4.5),
            "policy/ratio_start": rng.uniform(0, 4e-6),
            "policy/skipped": 0.0,
            "policy/grad_norm": 0.3,
            "value/loss": 0.15 + math.exp(-i / 3),
            "value/grad_norm": 0.1,
            "value/explained_variance": 0.5 - 4 * math.exp(-i / 3) + rng.gauss(0, 0.05),
            "completions/length": 12.0 + rng.gauss(0, 0.8),
            "completions/eos_rate": 1.0,
            "completions/repetition": rng.uniform(0, 0.008),
        }
        if i == 0:  # only the value learns
            line = {k: v for k, v in line.items() if not k.startswith("policy/")}
        line |= {k.replace("__", "/"): float(f(i)) for k, f in changes.items()}
        lines.append(line)
    return lines


def names(lines):
    return {sign.name for _, sign in alarms.history(lines)}


def test_a_healthy_log_has_no_signs():
    for seed in range(10):
        assert names(healthy(100, seed)) == set(), seed


def test_a_log_that_just_began_has_no_signs():
    assert alarms.signs([]) == [] and names(healthy(1)) == set()


def noisy(f, seed=7):
    """Values of f plus the noise of a rollout's mean."""
    rng = random.Random(seed)
    return lambda i: f(i) + rng.gauss(0, SPREAD / math.sqrt(EPISODES))


BROKEN = {
    "nan": {"value__loss": lambda i: math.nan if i == 20 else 0.1},
    "over_optimised": {"reward__score": noisy(lambda i: 0.03 * i),
                       "rewards__held_out": noisy(lambda i: 0.3 - 0.03 * abs(i - 8), 8)},
    "held_out_flat": {"reward__score": noisy(lambda i: 0.03 * i),
                      "rewards__held_out": noisy(lambda i: 0.3, 8)},
    "kl_high": {"kl__sequence": lambda i: i},
    "kl_accelerating": {"kl__sequence": lambda i: 0.01 * 1.3**i},
    "kl_negative": {"kl__sequence": lambda i: -0.2 * i},
    "length_up": {"completions__length": lambda i: 12 + i + i % 3},
    "length_down": {"completions__length": lambda i: 12 - 0.28 * i + 0.1 * (i % 3)},
    "eos_collapse": {"completions__eos_rate": lambda i: max(0.0, 0.95 - 0.03 * i)},
    "repetition": {"completions__repetition": lambda i: 0.01 * i},
    "entropy_collapse": {"policy__entropy": lambda i: 0.33 * 0.9**i},
    "clip_fraction": {"policy__clip_fraction": lambda i: 0.3},
    "update_too_large": {"policy__approx_kl": lambda i: 0.5},
    "ratio_max": {"policy__ratio_max": lambda i: 40 + i},
    "ratio_start": {"policy__ratio_start": lambda i: 0.15},
    "skipped": {"policy__skipped": lambda i: 0.25 if i == 9 else 0},
    "value_loss": {"value__loss": lambda i: 0.1 * 1.3**i},
    "explained_variance": {"value__explained_variance": lambda i: -0.5},
    "no_spread": {"reward__score_std": lambda i: 0.8 if i < 30 else 0},
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_problem_has_its_sign(name):
    # An accelerating KL ends high; a falling reward was flat before.
    also = {"kl_accelerating": {"kl_high"}, "over_optimised": {"held_out_flat"}}.get(name, set())
    assert names(healthy(40, **BROKEN[name])) == {name} | also


def test_every_sign_is_tested_and_explained():
    assert set(BROKEN) == set(alarms.MEANINGS) and set(alarms.MEANINGS) >= alarms.SERIOUS


def test_a_message_names_the_numbers_the_meaning_and_a_remedy():
    [sign] = alarms.signs(healthy(40, **BROKEN["kl_high"]))
    assert sign.serious and "38 nats per sequence" in sign.message
    assert all(part in sign.message for part in alarms.MEANINGS["kl_high"])
    assert sign.message.startswith(sign.what)


def test_gold_is_never_read():
    """A reward that steers training can no longer measure it."""
    falling = healthy(60, rewards__gold=lambda i: 0.5 - 0.05 * i)
    assert alarms.signs(falling) == alarms.signs(healthy(60))
    without = [{k: v for k, v in line.items() if k != "rewards/held_out"} for line in falling]
    assert names(without) == set()


def test_noise_alone_is_no_over_optimisation():
    """The proxy rises, and the held-out reward is flat but noisy."""
    alarmed = 0
    for seed in range(60):
        lines = healthy(
            60,
            seed,
            reward__score=noisy(lambda i: 0.03 * i, seed),
            rewards__held_out=noisy(lambda i: 0.0, 1000 + seed),
        )
        alarmed += "over_optimised" in names(lines)
    assert alarmed <= 2


def test_a_fall_within_the_noise_waits_and_a_clear_one_does_not():
    rise = noisy(lambda i: 0.03 * i)
    slow = healthy(40, reward__score=rise, rewards__held_out=noisy(lambda i: -0.001 * i, 8))
    assert "over_optimised" not in names(slow)
    fast = healthy(40, reward__score=rise, rewards__held_out=noisy(lambda i: -0.05 * i, 8))
    first_update = {sign.name: update for update, sign in alarms.history(fast)}
    assert first_update["over_optimised"] < 20


def test_one_odd_rollout_is_no_sign():
    for name in ("kl_high", "clip_fraction", "update_too_large", "ratio_max", "ratio_start"):
        [(metric, function)] = BROKEN[name].items()
        once = healthy(40)
        once[20] |= {metric.replace("__", "/"): function(39)}
        assert names(once) == set(), name


def test_undefined_metrics_are_no_sign_of_nan():
    """Explained variance of equal returns and repetition of short completions may be NaN."""
    lines = healthy(
        30, value__explained_variance=lambda i: math.nan, completions__repetition=lambda i: math.nan
    )
    assert names(lines) == set()


def test_change_is_student_s_t():
    """Against scipy.stats.ttest_ind([1, 2, 3, 4, 5], [3, 4, 5, 6, 8])."""
    change = alarms.change([1, 2, 3, 4, 5, 3, 4, 5, 6, 8])
    assert change.before == 3 and change.after == 5.2
    assert change.sigmas == pytest.approx(2.2 / math.sqrt((10 + 14.8) / 8 * 2 / 5))
    assert alarms.change([1.0] * 9) is None
    assert alarms.change([1.0] * 5 + [2.0] * 5).sigmas == math.inf


def test_trend_is_least_squares_over_the_latter_half():
    straight = alarms.trend([float(i) for i in range(40)])
    assert straight.lines == 20 and straight.gain == pytest.approx(19) and straight.error < 1e-9
    y = [0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17]
    bent = alarms.trend(y)
    # The textbook's formulas; 143 is the sum of (x - 5.5)^2, 10 the degrees of freedom.
    slope = sum((x - 5.5) * v for x, v in enumerate(y)) / 143
    residual = sum((v - 6 - slope * (x - 5.5)) ** 2 for x, v in enumerate(y)) / 10
    assert bent.gain == pytest.approx(11 * slope)
    assert bent.error == pytest.approx(11 * math.sqrt(residual / 143))


def test_points_that_lie_on_a_line_by_chance_prove_nothing():
    """The noise of earlier lines counts: differences of neighbours over sqrt(2)."""
    noisy_before = [(-1.0) ** i for i in range(12)] + [i / 12 for i in range(12)]
    trend = alarms.trend(noisy_before)
    assert trend.gain == pytest.approx(11 / 12) and trend.sigmas < 2


def test_every_metric_that_is_read_is_logged():
    read = {key for line in healthy(2) for key in line} - {"rewards/held_out"}
    assert read <= set(ppo_metrics.METRICS)
