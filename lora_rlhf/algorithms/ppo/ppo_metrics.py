# SPDX-License-Identifier: Apache-2.0
"""Metrics of PPO: names, meanings and computation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_rlhf.algorithms.objectives import (
    KlEstimates,
    PolicyLoss,
    explained_variance,
    kl_estimates,
    masked_mean,
)
from lora_rlhf.estimates import repetition

METRICS = {
    "reward/score": "mean score of the episodes, before the penalty for a missing eos",
    "reward/score_std": "its standard deviation",
    "reward/scale": "running std that scores are divided by (ppo.normalize_reward)",
    "reward/total": "mean sum of an episode's rewards: score, missing eos, KL penalty",
    "kl/sequence": "KL(policy || SFT) by k1, nats per episode",
    "kl/sequence_k2": "the same by k2: half the squared log-ratio; biased, never negative",
    "kl/sequence_k3": "the same by k3; unbiased, never negative",
    "kl/k1": "KL(policy || SFT) by k1, nats per token",
    "kl/k2": "the same by k2",
    "kl/k3": "KL(policy || SFT) by k3, nats per token; never negative",
    "kl/coef": "weight of the KL penalty in the reward",
    "policy/entropy": "mean entropy of the next token, nats",
    "policy/clip_fraction": "share of tokens at which the clip is active",
    "policy/ratio_max": "largest ratio of new to old probability at a token",
    "policy/ratio_start": "largest |ratio - 1| on the rollout's first micro-batch; must be near 0",
    "policy/server_difference": "largest difference of the rollout server's log-probs from ours",
    "policy/staleness": "updates by which the policy that sampled the rollout was behind",
    "policy/weight_mean": "mean importance weight of a token, before it is cut off; must be near 1",
    "policy/weight_max": "largest importance weight of a token, before it is cut off",
    "policy/weight_truncated": "share of tokens whose importance weight is cut off",
    "policy/approx_kl": "KL between the policies before and after, by k2, nats per token",
    "policy/skipped": "share of micro-batches left out because their mean ratio was too large",
    "policy/ptx_loss": "negative log-likelihood of the mixed-in text, nats per token",
    "policy/grad_norm": "norm of the policy's gradient before its clip",
    "value/loss": "clipped value loss per token",
    "value/clip_fraction": "share of tokens at which the value clip is active",
    "value/explained_variance": "share of the returns' variance that the values predict; 1 is best",
    "value/mean": "mean value",
    "value/grad_norm": "norm of the value's gradient before its clip",
    "returns/mean": "mean return, the target of the value",
    "completions/length": "mean tokens of a completion, the eos included",
    "completions/eos_rate": "share of completions that ended by themselves",
    "completions/repetition": "mean share of 4-grams of tokens that the completion held before",
}
"""Names in PPO's lines of `metrics.jsonl`, besides `rewards/NAME` of each reward function, `loss`
(the policy's) and `learning_rate`. While only the value learns, the only policy metric is
`policy/grad_norm`, 0."""

OPTIONAL = {
    "reward/scale", "policy/ptx_loss", "policy/server_difference", "policy/staleness",
    "policy/weight_mean", "policy/weight_max", "policy/weight_truncated",
}  # fmt: skip
"""Names that are logged only if the recipe key that they measure is set."""


def rollout(
    batch: Mapping[str, Tensor],
    scores_b: Tensor,
    ended_b: Tensor,
    kl: KlEstimates,
    rewards_bt: Tensor,
) -> dict[str, float]:
    """Measure one rollout; `batch` has completion ids and mask, old values and returns."""
    mask_bt, valid_bt = batch["completion_mask"], batch["completion_mask"].bool()
    ids = [row[valid_bt[i]].tolist() for i, row in enumerate(batch["completion_ids"])]
    shares = [share for share in repetition(ids) if share is not None]
    return {
        "reward/score": float(scores_b.mean()),
        "reward/score_std": float(scores_b.std(correction=0)),
        "reward/total": float(rewards_bt.sum(dim=1).mean()),
        "kl/sequence": float(kl.k1.sum(dim=1).mean()),
        "kl/sequence_k2": float(kl.k2.sum(dim=1).mean()),
        "kl/sequence_k3": float(kl.k3.sum(dim=1).mean()),
        "kl/k1": float(masked_mean(kl.k1, mask_bt)),
        "kl/k2": float(masked_mean(kl.k2, mask_bt)),
        "kl/k3": float(masked_mean(kl.k3, mask_bt)),
        "value/explained_variance": explained_variance(
            batch["old_values"], batch["returns"], mask_bt
        ),
        "value/mean": float(masked_mean(batch["old_values"], mask_bt)),
        "returns/mean": float(masked_mean(batch["returns"], mask_bt)),
        "completions/length": float(mask_bt.sum(dim=1).float().mean()),
        "completions/eos_rate": float(ended_b.float().mean()),
        "completions/repetition": sum(shares) / len(shares) if shares else math.nan,
    }


def importance(weights_bt: Tensor, cut_bt: Tensor, mask_bt: Tensor) -> dict[str, float]:
    """Measure the importance weights of one rollout, before and after they are cut off."""
    return {
        "policy/weight_mean": float(masked_mean(weights_bt, mask_bt)),
        "policy/weight_max": float(weights_bt.max()),
        "policy/weight_truncated": float(masked_mean((weights_bt > cut_bt).float(), mask_bt)),
    }


@torch.no_grad()
def policy(
    result: PolicyLoss,
    logprobs_bt: Tensor,
    old_logprobs_bt: Tensor,
    entropy_bt: Tensor,
    mask_bt: Tensor,
) -> dict[str, float]:
    """Measure the policy's loss on one micro-batch."""
    change = kl_estimates(logprobs_bt, old_logprobs_bt, mask_bt)
    return {
        "policy/entropy": float(masked_mean(entropy_bt, mask_bt)),
        "policy/clip_fraction": float(masked_mean(result.clipped_bt, mask_bt)),
        "policy/ratio_max": float(torch.where(mask_bt.bool(), result.ratio_bt, 0.0).max()),
        "policy/approx_kl": float(masked_mean(change.k2, mask_bt)),
    }


def kept(metrics: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Keep the metrics that PPO logs, and drop GRPO's; of a maximum, keep the largest value."""
    out = {}
    for key, values in metrics.items():
        if key.startswith("rewards/") and key.endswith("/mean"):
            out[key.removesuffix("/mean")] = values
        elif key in METRICS or key == "step_time":
            out[key] = [max(values)] if key.endswith("_max") else values
    return out
