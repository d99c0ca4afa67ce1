# SPDX-License-Identifier: Apache-2.0
"""One pass over the vocabulary, against autograd over whole logits."""

import pytest
import torch

from lora_rlhf._trl import ChunkedLogProbFunction
from lora_rlhf.models import logprobs
from lora_rlhf.models.logprobs import Head, logprobs_and_entropy

N, H, V = 7, 8, 37


def inputs(*transform, dtype=torch.float32, bias=False):
    """States, ids and a head with this temperature, soft cap and scale."""
    torch.manual_seed(0)
    states = (3 * torch.randn(N, H)).to(dtype).requires_grad_()
    offset = torch.randn(V).to(dtype) if bias else None
    head = Head(torch.randn(V, H).to(dtype), offset, *transform)
    return states, torch.tensor([0, 36, 3, 5, 7, 7, 20]), head


def plain(states, ids, head):
    """The definition: log-softmax over all logits, in double precision."""
    bias = 0 if head.bias is None else head.bias.double()
    z = (states.double() @ head.weight.double().T + bias) * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    logp = (z / head.temperature).log_softmax(-1)
    return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.fixture(params=[(2, 5), (3, 37), (1024, 2048)], ids=str)
def tiles(request, monkeypatch):
    """Rows and columns of a tile: ragged, whole rows of the vocabulary, as shipped."""
    for name, value in zip(("_ROWS", "_COLUMNS"), request.param, strict=True):
        monkeypatch.setattr(logprobs, name, value)


TRANSFORMS = [(), (0.7,), (1.3, 2.0), (0.7, 4.0, 0.25)]
"""Temperature, soft cap and scale."""


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_values_and_gradients_are_the_plain_ones(tiles, transform, bias, entropy_gradient):
    states, ids, head = inputs(*transform, bias=bias)
    ours, entropy = logprobs_and_entropy(states, ids, head, entropy_gradient)
    want, want_entropy = plain(states, ids, head)
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, N)
    (ours * upstream[0]).sum().backward(retain_graph=True)
    if entropy_gradient:
        (entropy * upstream[1]).sum().backward()
    found, states.grad = states.grad, None
    ((want * upstream[0]).sum() + entropy_gradient * (want_entropy * upstream[1]).sum()).backward()
    torch.testing.assert_close(found, states.grad, rtol=1e-4, atol=1e-5)


def test_the_entropy_is_not_differentiable_unless_asked():
    states, ids, head = inputs()
    ours, entropy = logprobs_and_entropy(states, ids, head)
    assert ours.requires_grad and not entropy.requires_grad
    _, entropy = logprobs_and_entropy(states, ids, head, True)
    assert entropy.requires_grad


def test_it_equals_trls_function():
    """What CUDA uses: equal numbers on both devices."""
    states, ids, head = inputs(0.7, 2.0, 0.5, bias=True)
    ours, entropy = logprobs_and_entropy(states, ids, head)
    theirs, other, *_ = ChunkedLogProbFunction.apply(
        states, head.weight, head.bias, ids, 0.7, 11, 2.0, 0.5, ("entropy",)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, other, rtol=1e-5, atol=1e-5)


def test_sure_tokens_and_far_logits_stay_finite():
    """Logits of plus and minus a thousand: the running maximum keeps every exponent at most 0."""
    states = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight, ids = torch.linspace(-1, 1, 5)[:, None], torch.tensor([4, 4])
    ours, entropy = logprobs_and_entropy(states, ids, Head(weight))
    ours.sum().backward()
    assert ours.tolist() == [0.0, -2000.0] and entropy.abs().max() < 1e-6
    assert torch.isfinite(states.grad).all()


def test_half_precision_keeps_its_sums_in_float32():
    states, ids, head = inputs(dtype=torch.bfloat16)
    ours, entropy = logprobs_and_entropy(states, ids, head)
    want, _ = plain(states, ids, head)
    assert {ours.dtype, entropy.dtype} == {torch.float32}
    torch.testing.assert_close(ours.double(), want, rtol=2e-2, atol=5e-2)
    ours.sum().backward()
    assert states.grad.dtype == torch.bfloat16


def test_a_trainable_head_is_refused():
    states, ids, head = inputs()
    head.weight.requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        logprobs_and_entropy(states, ids, head)


def test_no_gradient_rows_are_made_without_need():
    """Under no_grad one product is enough."""
    states, ids, head = inputs()
    with torch.no_grad():
        assert len(logprobs._rows(states, ids, head, 0)) == 2
