# SPDX-License-Identifier: Apache-2.0
"""One pass over the vocabulary, against autograd over whole logits."""

import pytest
import torch

from lora_rlhf._trl import ChunkedLogProbFunction
from lora_rlhf.models import logprobs
from lora_rlhf.models.logprobs import Transform, logprobs_and_entropy

N, H, V = 7, 8, 37


def inputs(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    states = (3 * torch.randn(N, H)).to(dtype).requires_grad_()
    offset = torch.randn(V).to(dtype) if bias else None
    return states, torch.randn(V, H).to(dtype), offset, torch.tensor([0, 36, 3, 5, 7, 7, 20])


def plain(states, weight, bias, ids, transform):
    """The definition: log-softmax over all logits, in double precision."""
    z = states.double() @ weight.double().T + (0 if bias is None else bias.double())
    z = z * transform.scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    logp = (z / transform.temperature).log_softmax(-1)
    return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.fixture(params=[(2, 5), (3, 37), (1024, 2048)], ids=str)
def tiles(request, monkeypatch):
    """Rows and columns of a tile: ragged, whole rows of the vocabulary, as shipped."""
    for name, value in zip(("_ROWS", "_COLUMNS"), request.param, strict=True):
        monkeypatch.setattr(logprobs, name, value)


TRANSFORMS = [
    Transform(), Transform(0.7), Transform(1.3, softcap=2.0), Transform(0.7, 4.0, 0.25)
]  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_values_and_gradients_are_the_plain_ones(tiles, transform, bias, entropy_gradient):
    states, weight, offset, ids = inputs(bias=bias)
    ours, entropy = logprobs_and_entropy(states, weight, offset, ids, transform, entropy_gradient)
    want, want_entropy = plain(states, weight, offset, ids, transform)
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
    states, weight, offset, ids = inputs()
    ours, entropy = logprobs_and_entropy(states, weight, offset, ids, Transform())
    assert ours.requires_grad and not entropy.requires_grad
    _, entropy = logprobs_and_entropy(states, weight, offset, ids, Transform(), True)
    assert entropy.requires_grad


def test_it_equals_trls_function():
    """What CUDA uses: equal numbers on both devices."""
    states, weight, offset, ids = inputs(bias=True)
    ours, entropy = logprobs_and_entropy(states, weight, offset, ids, Transform(0.7, 2.0, 0.5))
    theirs, other, *_ = ChunkedLogProbFunction.apply(
        states, weight, offset, ids, 0.7, 11, 2.0, 0.5, ("entropy",)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, other, rtol=1e-5, atol=1e-5)


def test_sure_tokens_and_far_logits_stay_finite():
    """Logits of plus and minus a thousand: the running maximum keeps every exponent at most 0."""
    states = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight, ids = torch.linspace(-1, 1, 5)[:, None], torch.tensor([4, 4])
    ours, entropy = logprobs_and_entropy(states, weight, None, ids, Transform())
    ours.sum().backward()
    assert ours.tolist() == [0.0, -2000.0] and entropy.abs().max() < 1e-6
    assert torch.isfinite(states.grad).all()


def test_half_precision_keeps_its_sums_in_float32():
    states, weight, _, ids = inputs(torch.bfloat16)
    ours, entropy = logprobs_and_entropy(states, weight, None, ids, Transform())
    want, _ = plain(states, weight, None, ids, Transform())
    assert {ours.dtype, entropy.dtype} == {torch.float32}
    torch.testing.assert_close(ours.double(), want, rtol=2e-2, atol=5e-2)
    ours.sum().backward()
    assert states.grad.dtype == torch.bfloat16


def test_a_trainable_head_is_refused():
    states, weight, _, ids = inputs()
    with pytest.raises(ValueError, match="frozen"):
        logprobs_and_entropy(states, weight.requires_grad_(), None, ids, Transform())


def test_no_gradient_rows_are_made_without_need():
    """Under no_grad one product is enough."""
    states, weight, _, ids = inputs()
    with torch.no_grad():
        found = logprobs._rows(states, weight, None, ids, Transform(), 0)
    assert len(found) == 2
