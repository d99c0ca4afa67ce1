# SPDX-License-Identifier: Apache-2.0
"""Log-probs, values and scores: the plain formula, whatever the padding, without full logits."""

import pytest
import small
import torch
from small import EOS, PAD
from torch.utils._python_dispatch import TorchDispatchMode

from lora_rlhf.models import logprobs as logprobs_room
from lora_rlhf.models import scoring

ROPE, LEARNED = "llama", "gpt2"
EPISODES = [
    ([5, 6, 7], [8, 9, EOS]),
    ([10, 11, 12, 13, 14], [15]),
    ([16], [17, 18, 19, 20, 21, EOS]),
    ([22, PAD, 23], [24, PAD, 25]),  # the pad token written by somebody is a token
]
TOKENS = max(len(completion) for _, completion in EPISODES)


@pytest.fixture(scope="module")
def made():
    """Backbones by architecture, made once, all roles different."""
    found = {}

    def get(name):
        if name not in found:
            torch.manual_seed(0)
            found[name] = small.backbone(name, "policy", "reference", "reward", "value")
        return found[name]

    return get


def rollout(episodes=EPISODES, left=0, right=0):
    """As TRL lays episodes out: prompts padded on the left, completions on the right."""
    width = max(len(p) for p, _ in episodes) + left
    tokens = max(len(c) for _, c in episodes) + right
    ids = torch.full((len(episodes), width + tokens), PAD)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(episodes):
        at = slice(width - len(prompt), width + len(completion))
        ids[i, at] = torch.tensor(prompt + completion)
        mask[i, at] = 1
    return ids, mask, tokens


@torch.no_grad()
def plain(backbone, role, episode, temperature=1.0):
    """log_softmax of the model's own logits over the unpadded episode, and the entropy."""
    prompt, completion = episode
    with backbone.role(role):
        logits = backbone.causal(torch.tensor([prompt + completion])).logits[0].double()
    logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs[torch.arange(len(completion)), torch.tensor(completion)], entropy


@torch.no_grad()
def states(backbone, role, episode):
    with backbone.role(role):
        return backbone.decoder(torch.tensor([episode[0] + episode[1]])).last_hidden_state[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("role", ["policy", None])
@pytest.mark.parametrize("name", [ROPE, LEARNED, "opt", "gemma2", "mistral"])
def test_log_probs_are_those_of_the_plain_logits(made, name, role, temperature):
    backbone = made(name)
    ids, mask, tokens = rollout()
    with torch.no_grad(), backbone.role(role):
        found, entropy = scoring.completion_logprobs(backbone, ids, mask, tokens, temperature)
    assert found.shape == entropy.shape == (4, TOKENS) and found.dtype == torch.float32
    for i, episode in enumerate(EPISODES):
        n = len(episode[1])
        expected, expected_entropy = plain(backbone, role, episode, temperature)
        assert torch.allclose(found[i, :n].double(), expected, atol=1e-5)
        assert torch.allclose(entropy[i, :n].double(), expected_entropy, atol=1e-5)
    assert torch.isfinite(found).all() and torch.isfinite(entropy).all()


@pytest.mark.parametrize("name", [ROPE, LEARNED])
def test_gradients_are_those_of_the_plain_logits(made, name):
    backbone = made(name)
    parameters = [p for n, p in backbone.role_parameters("policy")]
    ids, mask, tokens = rollout()
    valid = mask[:, -tokens:].bool()
    with backbone.training("policy"):
        found, _ = scoring.completion_logprobs(backbone, ids, mask, tokens, 0.7)
        gradients = torch.autograd.grad(found[valid].sum(), parameters)
        total = 0
        for prompt, completion in EPISODES:
            logits = backbone.causal(torch.tensor([prompt + completion])).logits[0] / 0.7
            chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            total = total + chosen[torch.arange(len(completion)), torch.tensor(completion)].sum()
        expected = torch.autograd.grad(total, parameters)
    for a, b in zip(gradients, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)
    assert any(g.abs().max() > 1e-2 for g in gradients)


@pytest.mark.parametrize("name", [ROPE, LEARNED])
@pytest.mark.parametrize(("left", "right"), [(1, 0), (0, 1), (7, 5)])
@torch.no_grad()
def test_the_amount_of_padding_changes_nothing(made, name, left, right):
    backbone = made(name)
    results = []
    for padding in ((0, 0), (left, right)):
        ids, mask, tokens = rollout(EPISODES, *padding)
        with backbone.role("policy"):
            logprobs, _ = scoring.completion_logprobs(backbone, ids, mask, tokens, 1.0)
        with backbone.role("value"):
            values = scoring.token_values(backbone, ids, mask, tokens)
        with backbone.role("reward"):
            scores = scoring.last_token_scores(backbone, ids, mask, "reward")
        valid = mask[:, -tokens:].bool()
        results.append((logprobs[valid], values[valid], scores))
    for short, long in zip(*results, strict=True):
        assert torch.allclose(short, long, atol=1e-5)


@pytest.mark.parametrize("name", [ROPE, LEARNED])
@torch.no_grad()
def test_a_value_is_the_head_on_the_state_before_its_token(made, name):
    backbone = made(name)
    ids, mask, tokens = rollout()
    with backbone.role("value"):
        found = scoring.token_values(backbone, ids, mask, tokens)
    head = backbone.head("value")
    assert found.dtype == torch.float32
    for i, (prompt, completion) in enumerate(EPISODES):
        expected = head(states(backbone, "value", (prompt, completion))).squeeze(-1)
        expected = expected[len(prompt) - 1 : -1]
        assert torch.allclose(found[i, : len(completion)], expected, atol=1e-5)


@pytest.mark.parametrize("name", [ROPE, LEARNED])
@torch.no_grad()
def test_a_score_is_read_at_the_last_real_token_on_either_side(made, name):
    backbone = made(name)
    head = backbone.head("reward")
    expected = [float(head(states(backbone, "reward", e)[-1:])) for e in EPISODES]
    rows = [p + c for p, c in EPISODES]
    for side in ("left", "right"):
        width = max(map(len, rows)) + 2
        ids, mask = torch.full((4, width), PAD), torch.zeros(4, width, dtype=torch.long)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, at], mask[i, at] = torch.tensor(row), 1
        with backbone.role("reward"):
            found = scoring.last_token_scores(backbone, ids, mask, "reward")
        assert found.tolist() == pytest.approx(expected, abs=1e-5), side
    assert scoring.scores(backbone, EPISODES, batch_size=3) == pytest.approx(expected, abs=1e-5)
    assert scoring.scores(backbone, []) == []


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_sequence_log_probs_keep_the_order_and_sum_the_completion(made, batch_size):
    backbone = made(ROPE)
    for role in ("policy", "reference", None):
        found = scoring.sequence_logprobs(backbone, EPISODES, role, batch_size)
        expected = [float(plain(backbone, role, e)[0].sum()) for e in EPISODES]
        assert found == pytest.approx(expected, abs=1e-4)
    cooler = scoring.sequence_logprobs(backbone, EPISODES, "policy", batch_size, temperature=0.5)
    assert cooler == pytest.approx(
        [float(plain(backbone, "policy", e, 0.5)[0].sum()) for e in EPISODES], abs=1e-4
    )


def test_sequence_log_probs_of_empty_prompts_and_completions(made):
    """Without a prompt nothing predicts the first token; what follows counts."""
    backbone = made(ROPE)
    episodes = [([], [5, 6, 7]), ([5], [6, 7]), ([5, 6], []), ([5, 6, 7, 8, 9], [10])]
    alone = [
        scoring.sequence_logprobs(backbone, [e], "policy")[0] for e in (*episodes[:2], EPISODES[0])
    ]
    assert alone[0] == pytest.approx(alone[1], abs=1e-5)
    found = scoring.sequence_logprobs(backbone, episodes, "policy")
    assert found[:2] == pytest.approx(alone[:2], abs=1e-5)
    assert found[2] == 0


def test_the_active_role_computes(made):
    backbone = made(ROPE)
    found = {
        tuple(scoring.sequence_logprobs(backbone, EPISODES, r)) for r in ("policy", "reference")
    }
    assert len(found) == 2
    assert small.active(backbone) is None, "a role stays active"


def test_bf16_heads_answer_in_float32():
    torch.manual_seed(0)
    backbone = small.backbone("llama", "policy", "reward", "value", dtype="bfloat16")
    ids, mask, tokens = rollout()
    with torch.no_grad(), backbone.role("value"):
        logprobs, entropy = scoring.completion_logprobs(backbone, ids, mask, tokens, 1.0)
        values = scoring.token_values(backbone, ids, mask, tokens)
    assert {logprobs.dtype, entropy.dtype, values.dtype} == {torch.float32}
    assert backbone.head("value").weight.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # Views of what exists already cost nothing.
        if not function.is_view:
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_of_all_logits_is_made():
    """Vocabulary 200,000: logits of all 4 x 36 tokens would be 28.8 million numbers."""
    vocabulary, tokens = 200_000, 16
    folder = small.base_folder(
        "llama",
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    backbone = small.backbone("llama", "policy", folder=folder)
    ids = torch.randint(5, vocabulary, (4, 36))
    mask = torch.ones_like(ids)
    weights = backbone.causal.get_output_embeddings().weight.numel()
    with backbone.training("policy"), Largest() as largest:
        logprobs, _ = scoring.completion_logprobs(backbone, ids, mask, tokens, 1.0)
        logprobs.sum().backward()
    assert largest.elements <= max(4 * tokens * logprobs_room._COLUMNS, weights)
    assert largest.elements < 4 * tokens * vocabulary / 4
    with torch.no_grad(), Largest() as whole:
        backbone.causal(ids)
    assert whole.elements >= 4 * 36 * vocabulary, "the measure sees no logits"
    with torch.no_grad(), backbone.role("policy"):
        logits = backbone.causal(ids).logits[:, -tokens - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, ids[:, -tokens:, None]).squeeze(-1)
    assert torch.allclose(logprobs, expected, atol=1e-4)
