# SPDX-License-Identifier: Apache-2.0
"""The mathematics of PPO with a KL penalty; no model, no I/O.

Suffixes are shapes: B episodes, T completion tokens (right-padded), so `_bt` is (B, T) and `_b` is
(B,). `mask_bt` is 1 at completion tokens, the eos included, and 0 at padding. Everything is
float32, whatever the model's dtype.

Sources: InstructGPT (arXiv 2203.02155), PPO (1707.06347), GAE (1506.02438), Ziegler et al. 2019
(1909.08593), "The N+ implementation details of RLHF with PPO" (2403.17031), Schulman,
"Approximating KL divergence" (2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound on |log ratio| before `exp`: far outside the clip range, and finite in float32."""


def masked_sum(x_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """Sum over valid tokens; padding may hold NaN. Shape ()."""
    return torch.where(mask_bt.bool(), x_bt, torch.zeros_like(x_bt)).sum()


def masked_mean(x_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """Mean over all valid tokens of the batch, not of per-episode means (2503.20783). Shape ()."""
    return masked_sum(x_bt, mask_bt) / mask_bt.sum().clamp(min=1)


def whiten(x_bt: Tensor, mask_bt: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Zero mean, unit variance (biased) over valid tokens; padding becomes 0. Shape (B, T).

    With `shift_mean=False` only the scale changes (2403.17031, detail on reward whitening).
    """
    mean = masked_mean(x_bt, mask_bt)
    variance = masked_mean((x_bt - mean) ** 2, mask_bt)
    white = (x_bt - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return torch.where(mask_bt.bool(), white, torch.zeros_like(white))


class KlEstimates(NamedTuple):
    """Monte-Carlo estimates of KL(policy || reference) on the policy's samples, each (B, T)."""

    k1: Tensor
    k2: Tensor
    k3: Tensor


def kl_estimates(
    logprobs_bt: Tensor, reference_logprobs_bt: Tensor, mask_bt: Tensor
) -> KlEstimates:
    """k1 = log p/q (unbiased, may be negative), k2 = (log p/q)²/2, k3 = q/p - 1 - log q/p.

    Source: Schulman 2020. Padding is 0.
    """
    k1 = torch.where(
        mask_bt.bool(), logprobs_bt - reference_logprobs_bt, torch.zeros_like(logprobs_bt)
    )
    inverse = (-k1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return KlEstimates(k1, k1**2 / 2, torch.expm1(inverse) - inverse)


def token_rewards(scores_b: Tensor, kl_bt: Tensor, mask_bt: Tensor, kl_coef: float) -> Tensor:
    """Per-token reward: -kl_coef · KL everywhere, plus the score at the last valid token. (B, T).

    Source: InstructGPT eq. 2 without its ptx term; the score at the last token as in
    lm-human-preferences. An episode without a valid token gets no score.
    """
    rewards_bt = torch.where(mask_bt.bool(), -kl_coef * kl_bt, torch.zeros_like(kl_bt))
    length_b = mask_bt.sum(dim=1).long()
    last_b = (length_b - 1).clamp(min=0)
    scored_b = torch.where(length_b > 0, scores_b, torch.zeros_like(scores_b))
    return rewards_bt.scatter_add(
        1, last_b.unsqueeze(1), scored_b.unsqueeze(1).to(rewards_bt.dtype)
    )


def gae(
    rewards_bt: Tensor, values_bt: Tensor, mask_bt: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns advantages + values. Both (B, T).

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1}, with V = 0 after the
    last valid token, eos or truncation. Source: 1506.02438 eq. 16. Padding is 0 in both.
    """
    values_bt = torch.where(mask_bt.bool(), values_bt, torch.zeros_like(values_bt))
    rewards_bt = torch.where(mask_bt.bool(), rewards_bt, torch.zeros_like(rewards_bt))
    advantages_bt = torch.zeros_like(values_bt)
    running_b = torch.zeros_like(values_bt[:, 0])
    next_value_b = torch.zeros_like(running_b)
    for t in reversed(range(values_bt.shape[1])):
        delta_b = rewards_bt[:, t] + gamma * next_value_b - values_bt[:, t]
        running_b = delta_b + gamma * lam * running_b  # 0 in the padding, where delta is 0
        advantages_bt[:, t] = running_b
        next_value_b = values_bt[:, t]
    return advantages_bt, advantages_bt + values_bt


def importance_weights(
    logprobs_bt: Tensor, sampled_logprobs_bt: Tensor, mask_bt: Tensor, most: float
) -> tuple[Tensor, Tensor]:
    """Weights p/q of tokens sampled by an earlier policy q, and the same cut off at `most`. (B, T).

    p is the policy at the start of the update, around which `policy_loss` clips, and not the one
    that is trained: the decoupled objective of 2110.00641 and 2505.24298. Cutting the weights off
    bounds their variance and biases them towards q (Ionides 2008; 1802.01561). Padding is 0.
    """
    gap_bt = torch.where(
        mask_bt.bool(), logprobs_bt - sampled_logprobs_bt, torch.full_like(logprobs_bt, -torch.inf)
    )
    weights_bt = gap_bt.clamp(max=MAX_LOG_RATIO).exp()
    return weights_bt, weights_bt.clamp(max=most)


class PolicyLoss(NamedTuple):
    """Sum over valid tokens of the clipped loss; ratio and clipped tokens (detached) to log."""

    loss_sum: Tensor
    ratio_bt: Tensor
    clipped_bt: Tensor


def policy_loss(
    logprobs_bt: Tensor,
    old_logprobs_bt: Tensor,
    advantages_bt: Tensor,
    mask_bt: Tensor,
    clip_low: float,
    clip_high: float,
    weights_bt: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, negated: sum of max(-A r, -A clip(r, 1 - low, 1 + high)).

    Each token's term is multiplied by its weight, if there are `importance_weights`.

    Source: 1707.06347 eq. 7. A sum, which the caller divides by the valid tokens of the whole
    minibatch, so that gradient accumulation is exact.
    """
    log_ratio_bt = torch.where(
        mask_bt.bool(),
        logprobs_bt.float() - old_logprobs_bt.float(),
        torch.zeros_like(old_logprobs_bt),
    ).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_bt = log_ratio_bt.exp()
    plain_bt = -advantages_bt * ratio_bt
    clipped_bt = -advantages_bt * ratio_bt.clamp(1 - clip_low, 1 + clip_high)
    loss_bt = torch.maximum(plain_bt, clipped_bt)
    if weights_bt is not None:
        loss_bt = loss_bt * weights_bt
    loss_sum = masked_sum(loss_bt, mask_bt)
    return PolicyLoss(loss_sum, ratio_bt.detach(), (clipped_bt > plain_bt).float().detach())


class ValueLoss(NamedTuple):
    """Sum over valid tokens of the clipped loss, and the clipped tokens (detached) to log."""

    loss_sum: Tensor
    clipped_bt: Tensor


def value_loss(
    values_bt: Tensor, old_values_bt: Tensor, returns_bt: Tensor, mask_bt: Tensor, clip_value: float
) -> ValueLoss:
    """Half the larger of the squared errors of V and of V clipped around the rollout's value.

    Source: 2403.17031 (value clipping), with the baselines' factor 1/2.
    """
    # Masked before squaring: a NaN in the padding would have gradient 0 · NaN = NaN.
    values_bt = torch.where(mask_bt.bool(), values_bt, torch.zeros_like(values_bt))
    near_bt = torch.clamp(values_bt, old_values_bt - clip_value, old_values_bt + clip_value)
    plain_bt, clipped_bt = (values_bt - returns_bt) ** 2, (near_bt - returns_bt) ** 2
    loss_sum = 0.5 * masked_sum(torch.maximum(plain_bt, clipped_bt), mask_bt)
    return ValueLoss(loss_sum, (clipped_bt > plain_bt).float().detach())


def explained_variance(values_bt: Tensor, returns_bt: Tensor, mask_bt: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over valid tokens; NaN where returns do not vary."""
    error_bt = returns_bt - values_bt
    spread = masked_mean((returns_bt - masked_mean(returns_bt, mask_bt)) ** 2, mask_bt)
    unexplained = masked_mean((error_bt - masked_mean(error_bt, mask_bt)) ** 2, mask_bt)
    return float(1 - unexplained / spread) if float(spread) > 0 else float("nan")


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """Return the next KL coefficient: larger if the KL is above its target, smaller if below.

    beta · (1 + clip(kl / target - 1, -0.2, 0.2) · episodes / horizon), with `kl` and `target` in
    nats per sequence. Source: 1909.08593, section 2.2, as in its published code.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


class RunningMoments:
    """Running count, mean and sum of squared deviations, updated by batch (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, x_b: Tensor) -> None:
        """Add a batch of numbers, shape (B,)."""
        n, mean = x_b.numel(), float(x_b.double().mean())
        squares = float(((x_b.double() - mean) ** 2).sum())
        gap, total = mean - self.mean, self.count + n
        self.squares += squares + gap**2 * self.count * n / total
        self.mean += gap * n / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        """Return count, mean and sum of squared deviations."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)

    @property
    def std(self) -> float:
        """Biased standard deviation; 1 while nothing varies, so that dividing by it is safe."""
        spread = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return spread if spread > 1e-8 else 1.0


def scaled_scores(scores_b: Tensor, moments: RunningMoments | None, clip: float | None) -> Tensor:
    """Divide scores by their running standard deviation, then clip them. Shape (B,).

    The mean is never shifted: a shift could turn the sign of a score against the KL penalty
    (2307.04964, section 4.2.2; 2403.17031).
    """
    if moments is not None:
        if bool(torch.isfinite(scores_b).all()):  # a NaN would stay in the moments
            moments.add(scores_b)
        scores_b = scores_b / moments.std
    return scores_b if clip is None else scores_b.clamp(-clip, clip)
