# SPDX-License-Identifier: Apache-2.0
"""What must not matter, for any example: padding, batching, the order of adapters and of roles."""

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import EOS, PAD, backbone

from lora_rlhf.models import scoring

TOKENS = st.integers(3, 60)
EPISODES = st.lists(
    st.tuples(
        st.lists(TOKENS, min_size=1, max_size=7),
        st.lists(TOKENS, min_size=1, max_size=6).map(lambda ids: [*ids, EOS]),
    ),
    min_size=1,
    max_size=5,
)
FEW = settings(max_examples=8, deadline=None)
ROLES = ("policy", "reference", "reward", "value")


@functools.cache
def made():
    return backbone("llama", *ROLES)


def padded(episodes, left=0, right=0):
    """Left-padded prompts and right-padded completions, wider than they need to be."""
    longest = max(len(p) for p, _ in episodes) + left
    tokens = max(len(c) for _, c in episodes) + right
    ids, mask = [], []
    for prompt, completion in episodes:
        before, after = longest - len(prompt), tokens - len(completion)
        ids.append([PAD] * before + prompt + completion + [PAD] * after)
        mask.append([0] * before + [1] * (len(prompt) + len(completion)) + [0] * after)
    return torch.tensor(ids), torch.tensor(mask), tokens


@torch.no_grad()
def everything(base, episodes, left=0, right=0):
    """Per episode its log-probs, entropies, values and score, without padding."""
    ids, mask, tokens = padded(episodes, left, right)
    with base.role("policy"):
        logprobs, entropy = scoring.completion_logprobs(base, ids, mask, tokens, 0.8)
    with base.role("value"):
        values = scoring.token_values(base, ids, mask, tokens)
    with base.role("reward"):
        scores = scoring.last_token_scores(base, ids, mask, "reward")
    by_token = torch.stack([logprobs, entropy, values])
    return [
        torch.cat([by_token[:, i, : len(c)].flatten(), scores[i : i + 1]])
        for i, (_, c) in enumerate(episodes)
    ]


def same(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@FEW
@given(EPISODES, st.integers(0, 5), st.integers(0, 5))
def test_padding_on_either_side_changes_nothing(episodes, left, right):
    same(everything(made(), episodes), everything(made(), episodes, left, right))


@FEW
@given(EPISODES)
def test_what_else_is_in_the_batch_changes_nothing(episodes):
    alone = [everything(made(), [episode])[0] for episode in episodes]
    same(everything(made(), episodes), alone)
    same(everything(made(), episodes[::-1])[::-1], alone)


@FEW
@given(st.permutations(ROLES))
def test_the_order_in_which_adapters_are_added_changes_nothing(order):
    other = backbone("llama", *order)
    with torch.no_grad():
        for role in ROLES:
            values = dict(made().role_parameters(role))
            for name, parameter in other.role_parameters(role):
                parameter.copy_(values[name])
    episodes = [([5, 6, 7], [8, 9, EOS]), ([10], [11, EOS])]
    for a, b in zip(everything(made(), episodes), everything(other, episodes), strict=True):
        assert torch.equal(a, b)


@FEW
@given(st.lists(st.sampled_from([*ROLES, None]), min_size=1, max_size=8))
def test_the_order_of_roles_changes_nothing(visits):
    """Whatever was active before, a role computes the same bits."""
    ids, mask, tokens = padded([([5, 6, 7], [8, 9, EOS]), ([10], [11, EOS])])
    found = {}
    with torch.no_grad():
        for role in [*visits, *reversed(visits)]:
            with made().role(role):
                states = scoring.completion_states(made(), ids, mask, tokens)
            assert torch.equal(found.setdefault(role, states), states)
    assert len({tuple(s.flatten().tolist()) for s in found.values()}) == len(found)


def test_adapters_on_all_layers_are_a_trunk_of_none():
    """`top_fraction: 1` leaves no frozen layer below, and is what naming every layer gives."""
    whole = backbone("llama", "policy", num_hidden_layers=4)
    half = backbone("llama", "policy", num_hidden_layers=4, top_fraction=0.5)
    assert whole.adapted_layers == [0, 1, 2, 3] and half.adapted_layers == [2, 3]
    names = [name for name, _ in half.role_parameters("policy")]
    with torch.no_grad():  # the half's adapter inside the whole one, the identity below it
        values = dict(half.role_parameters("policy"))
        for name, parameter in whole.role_parameters("policy"):
            if name in values:
                parameter.copy_(values[name])
            elif "lora_B" in name:
                parameter.zero_()
    assert len(names) == len(list(whole.role_parameters("policy"))) / 2
    ids, mask, tokens = padded([([5, 6, 7], [8, 9, EOS]), ([10], [11, EOS])])
    with torch.no_grad(), whole.role("policy"), half.role("policy"):
        a, b = (scoring.completion_states(m, ids, mask, tokens) for m in (whole, half))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
