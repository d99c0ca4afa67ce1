# SPDX-License-Identifier: Apache-2.0
"""Gao's curves: known coefficients are recovered; best-of-n compared with all subsets."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_rlhf.algorithms.best_of_n import best_of_n_kl
from lora_rlhf.evaluation import overoptimization as o

D = [0.1, 0.5, 1.0, 1.7, 2.5, 3.0]


def test_known_coefficients_are_recovered():
    bon = o.fit_best_of_n(D, [d * (0.7 - 0.2 * d) for d in D])
    assert (bon.alpha, bon.beta, bon.r_squared) == pytest.approx((0.7, 0.2, 1.0))
    rl = o.fit_rl([0.0, *D], [0.0, *(d * (0.7 - 0.2 * math.log(d)) for d in D)])
    assert (rl.alpha, rl.beta, rl.r_squared) == pytest.approx((0.7, 0.2, 1.0))


def test_a_poor_fit_has_a_low_r_squared():
    assert o.fit_rl(D, [0.1, -0.3, 0.2, -0.1, 0.3, -0.2]).r_squared < 0.5
    with pytest.raises(ValueError, match="three or more"):
        o.fit_rl([1.0, 2.0], [1.0, 2.0])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_best_of_n_is_the_mean_over_all_subsets(n, seed):
    rng = np.random.default_rng(seed)
    proxy, gold = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    wanted = []
    for row in range(3):
        for chosen in itertools.combinations(range(6), n):
            best = max(chosen, key=lambda i: proxy[row, i])
            wanted.append((proxy[row, best], gold[row, best]))
    assert o.best_of_n(proxy, gold, n) == pytest.approx(tuple(np.mean(wanted, axis=0)))


def test_the_kl_of_best_of_n_for_distinct_samples():
    """By definition, for a uniform choice among k equally likely answers, k large."""
    n, k = 4, 20_000
    edges = (np.arange(k + 1) / k) ** n
    p = np.diff(edges)
    assert best_of_n_kl(n) == pytest.approx(float((p * np.log(p * k)).sum()), abs=1e-3)
    assert best_of_n_kl(1) == 0
