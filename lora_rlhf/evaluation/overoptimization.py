# SPDX-License-Identifier: Apache-2.0
"""Proxy and gold reward against the distance from SFT: the curves of Gao et al. (2210.10760).

d is the square root of the KL divergence from SFT, in nats. Rewards are differences from SFT's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Fit(NamedTuple):
    """Coefficients of a curve, and the share of the variance of the rewards that it explains."""

    alpha: float
    beta: float
    r_squared: float


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> tuple[float, float]:
    """Mean proxy and gold reward of the best of n <= N samples by the proxy.

    Args:
        proxy, gold: (P, N) rewards of the same N samples for each of P prompts.

    Unbiased estimate over all subsets of n samples (2112.09332, appendix I; 2210.10760, section
    3): the sample with the i-th lowest proxy reward is the best one in C(i - 1, n - 1) of the
    C(N, n) subsets.
    """
    scores, truth = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if scores.shape != truth.shape or scores.ndim != 2 or not 1 <= n <= scores.shape[1]:
        raise ValueError(f"proxy {scores.shape}, gold {truth.shape}, n {n}")
    total = scores.shape[1]
    weights = np.array([math.comb(i, n - 1) for i in range(total)], dtype=np.float64)
    weights /= math.comb(total, n)
    order = np.argsort(scores, axis=1, kind="stable")
    ranked = (np.take_along_axis(x, order, axis=1) @ weights for x in (scores, truth))
    best_proxy, best_gold = (float(x.mean()) for x in ranked)
    return best_proxy, best_gold


def fit_best_of_n(distance: Sequence[float], reward: Sequence[float]) -> Fit:
    """Least squares of R(d) = d (alpha - beta d), for best-of-n (section 1)."""
    d = np.asarray(distance, dtype=np.float64)
    return _fit(np.column_stack((d, -(d**2))), reward)


def fit_rl(distance: Sequence[float], reward: Sequence[float]) -> Fit:
    """Least squares of R(d) = d (alpha - beta log d), 0 at d = 0, for RL (section 1)."""
    d = np.asarray(distance, dtype=np.float64)
    log = np.log(np.where(d > 0, d, 1.0))
    return _fit(np.column_stack((d, -d * log)), reward)


def _fit(columns: np.ndarray, reward: Sequence[float]) -> Fit:
    y = np.asarray(reward, dtype=np.float64)
    if len(y) != len(columns) or len(y) < 3:
        raise ValueError(f"{len(y)} rewards at {len(columns)} distances: three or more are needed")
    (alpha, beta), *_ = np.linalg.lstsq(columns, y, rcond=None)
    residual = float(((y - columns @ np.array([alpha, beta])) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    return Fit(float(alpha), float(beta), 1 - residual / spread if spread else float("nan"))
