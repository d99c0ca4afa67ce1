# SPDX-License-Identifier: Apache-2.0
"""Rewards of several functions, weighted and checked; for every trainer that has rollouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_rlhf.errors import NonFiniteError
from lora_rlhf.training.resumable_trainer import Resumable


def weighted(rewards_bf: Tensor, weights_f: Tensor) -> Tensor:
    """Rewards (B, F) times their weights; a weight of 0 makes 0 of whatever it is."""
    weights_f = weights_f.to(rewards_bf.device)
    return torch.where(weights_f != 0, rewards_bf * weights_f, 0.0)


def weighted_rewards(rewards_bf: Tensor, weights_f: Tensor, prompts: list[Any]) -> Tensor:
    """What each of F reward functions adds to an episode's score, (B, F); a weight of 0 only logs.

    Raises:
        NonFiniteError: A score is no number, naming the prompt; TRL would take a NaN for 0.
    """
    used_bf = weighted(rewards_bf, weights_f)
    bad = (~torch.isfinite(used_bf.sum(dim=1))).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"the reward of {len(bad)} episodes is not a number; the first prompt is "
            f"{str(prompts[bad[0]])[:200]!r}",
            expected="a finite number per completion",
            remedy="mend the reward function or the reward model",
        )
    return used_bf


class RewardChecks(Resumable):
    """A resumable trainer whose rollouts are scored by reward functions."""

    def checked_rewards(self, rewards_bf: Tensor, prompts: list[Any]) -> Tensor:
        """`weighted_rewards`; a rollout with one that is no number teaches nothing."""
        try:
            return weighted_rewards(rewards_bf, self.reward_weights, prompts)
        except NonFiniteError as error:
            self.unwell(error, rollout=True)
            return weighted(rewards_bf, self.reward_weights)
