# SPDX-License-Identifier: Apache-2.0
"""Rewards of episodes, from one reward model or an ensemble.

    mean             mean over members
    min              the lowest: worst-case optimisation (2310.02743, section 3.2)
    mean_minus_std   mean less `combine_std` standard deviations over members (after its UWO)
    warm             one adapter that is the members' average: weight-averaged rewards (2401.12187)

Each of the M members is an adapter on the shared backbone, with its own head and offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lora_rlhf.errors import AdapterError
from lora_rlhf.estimates import Floats
from lora_rlhf.models import scoring
from lora_rlhf.models.backbone import MEMBERS, Backbone
from lora_rlhf.models.scoring import Episode
from lora_rlhf.recipe.schema import RewardSection


class Scores(NamedTuple):
    """Rewards in the order of the episodes, and the members' standard deviation on each."""

    rewards: list[float]
    std: list[float]


def trained(section: RewardSection) -> tuple[str, ...]:
    """Return the roles that the reward stage trains."""
    return MEMBERS[: section.ensemble or 1]


def roles(section: RewardSection) -> tuple[str, ...]:
    """Return the roles that score after the stage: a merged ensemble is the role `reward`."""
    return MEMBERS[:1] if section.combine == "warm" else trained(section)


def scores(
    backbone: Backbone,
    episodes: Sequence[Episode],
    section: RewardSection,
    batch_size: int = 32,
    states: Sequence[Tensor] | None = None,
) -> Scores:
    """Compute the reward of each episode, offsets added and members combined.

    Raises:
        AdapterError: The backbone lacks a member.
    """
    each = member_scores(backbone, episodes, roles(section), batch_size, states)
    return Scores(combine(each, section).tolist(), each.std(axis=0).tolist())


def member_scores(
    backbone: Backbone,
    episodes: Sequence[Episode],
    members: Sequence[str],
    batch_size: int = 32,
    states: Sequence[Tensor] | None = None,
) -> Floats:
    """Score N episodes by each role, its offset added; (M, N)."""
    missing = [role for role in members if not backbone.has(role)]
    if missing:
        raise AdapterError(
            f"the reward ensemble lacks {missing[0]}",
            expected=f"the roles {', '.join(members)}",
            remedy="load the run with the recipe of its training",
        )
    raw = [scoring.scores(backbone, episodes, role, batch_size, states) for role in members]
    offsets = [[backbone.reward_offset.get(role, 0.0)] for role in members]
    return np.asarray(np.array(raw) + np.array(offsets))


def combine(each: ArrayLike, section: RewardSection) -> Floats:
    """Combine (M, N) members' rewards to (N,); the variance is divided by M (2310.02743)."""
    array = np.asarray(each, dtype=np.float64)
    mean: Floats = array.mean(axis=0)
    if section.ensemble is None or section.combine in ("mean", "warm"):
        return mean
    if section.combine == "min":
        return np.asarray(array.min(axis=0))
    return np.asarray(mean - section.combine_std * array.std(axis=0))


@torch.no_grad()
def average(backbone: Backbone, members: Sequence[str]) -> None:
    """Replace the members by their average, as the role `reward`.

    Each layer's update B A is averaged, since separate averages of B and A would add cross terms
    of different members. The average of M products of rank r is exactly one of rank M r: the A
    stacked, and the B side by side, divided by M. Alpha grows with the rank, so PEFT's scale
    alpha / r stays. Heads are averaged, which requires that members started with the same head
    (2401.12187, section 3.1).
    """
    count = len(members)
    parts = [dict(backbone.role_parameters(role)) for role in members]
    merged = {}
    for name in parts[0]:
        tensors = [part[name].detach().clone() for part in parts]
        if "lora_A" in name:
            merged[name] = torch.cat(tensors, dim=0)
        elif "lora_B" in name:
            merged[name] = torch.cat(tensors, dim=1) / count
        else:
            merged[name] = torch.stack(tensors).mean(dim=0)
    for role in members:
        backbone.drop_role(role)
    backbone.add_role("reward", stacked=count)
    for name, parameter in backbone.role_parameters("reward"):
        parameter.copy_(merged[name])
