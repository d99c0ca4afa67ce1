# SPDX-License-Identifier: Apache-2.0
"""Each identity holds where it should and fails where it must; whole runs: test_ppo_trainer.py."""

import math

import pytest
import torch
from ppo_run import roles

from lora_rlhf.algorithms import identities
from lora_rlhf.errors import IdentityError

NAN = float("nan")
MASK = torch.tensor([[1, 1, 0]])


def test_policy_equals_reference_looks_at_valid_tokens_only():
    policy = torch.tensor([[-1.0, -2.0, -9.0]])
    assert identities.policy_equals_reference(policy, torch.tensor([[-1.0, -2.0, NAN]]), MASK) == 0
    assert identities.policy_equals_reference(policy, policy + 5e-7, MASK) < 1e-6


@pytest.mark.parametrize("at", [2e-6, -0.1, NAN, math.inf])
def test_policy_equals_reference_fails(at):
    policy = torch.tensor([[-1.0, -2.0, -9.0]])
    with pytest.raises(IdentityError, match="stage at fault: sft"):
        identities.policy_equals_reference(policy, policy + torch.tensor([0, at, 0]), MASK)


@pytest.mark.parametrize(
    ("dtype", "fine", "off"),
    [
        (torch.float32, 5e-4, 2e-3),
        (torch.bfloat16, 0.08, 0.3),  # of two valid tokens the mean is half of it
        (torch.float16, 0.015, 0.2),
    ],
)
def test_ratio_is_one_within_the_precision(dtype, fine, off):
    for sign in (1, -1):
        ratio = torch.tensor([[1 + sign * fine, 1, 7]])
        seen = fine if dtype == torch.float32 else fine / 2
        assert identities.ratio_is_one(ratio, MASK, dtype) == pytest.approx(seen, rel=1e-3)
        with pytest.raises(IdentityError, match="stage at fault: ppo"):
            identities.ratio_is_one(torch.tensor([[1, 1 + sign * off, 1]]), MASK, dtype)
    with pytest.raises(IdentityError):
        identities.ratio_is_one(torch.tensor([[NAN, 1, 1]]), MASK, dtype)


@pytest.fixture(scope="module")
def made():
    backbone = roles()
    backbone.add_role("value", copy_from="reward")
    return backbone


@pytest.fixture
def moved(made):
    """A check that was taken; afterwards every tensor is put back."""
    kept = {r: [p.clone() for _, p in made.role_parameters(r)] for r in made.views}
    batch = {
        "prompt_ids": torch.tensor([[0, 5], [6, 7]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[8, 9, 1], [10, 1, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    yield identities.FrozenRolesCheck.take(made, "ppo", ("policy", "value"), batch)
    for role, values in kept.items():
        for (_, parameter), value in zip(made.role_parameters(role), values, strict=True):
            parameter.data.copy_(value)


def move(made, role, by=0.01):
    for _, parameter in made.role_parameters(role):
        parameter.data.add_(by)


def test_the_check_passes_when_policy_and_value_move(made, moved):
    move(made, "policy")
    move(made, "value")
    found = moved.check()
    assert set(found) == {"mean_abs_log_ratio_after_first_update"}
    assert found["mean_abs_log_ratio_after_first_update"] > 1e-3


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        (["value"], "the policy did not move"),
        (["policy"], "the value did not move"),
        (["policy", "value", "reference"], "the reference moved, but is frozen"),
        (["policy", "value", "reward"], "the reward moved, but is frozen"),
    ],
)
def test_the_check_names_the_role(made, moved, moves, message):
    for role in moves:
        move(made, role)
    with pytest.raises(IdentityError, match=message):
        moved.check()


def test_the_check_sees_a_backbone_that_moves(made, moved):
    move(made, "policy")
    move(made, "value")
    weight = made.layers[0].mlp.up_proj.base_layer.weight
    weight.data.add_(0.01)
    try:
        with pytest.raises(IdentityError, match="the backbone moved"):
            moved.check()
    finally:
        weight.data.sub_(0.01)


def test_the_check_sees_an_update_without_effect(made, moved, monkeypatch):
    """Its tensors changed and its outputs did not: the adapter is not the one that answers."""
    move(made, "policy")
    move(made, "value")
    switch = made.role
    monkeypatch.setattr(made, "role", lambda r: switch("reference" if r == "policy" else r))
    with pytest.raises(IdentityError, match="still equals the reference"):
        moved.check()
