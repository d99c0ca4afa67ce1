# SPDX-License-Identifier: Apache-2.0
"""LoRA accumulated in place against PEFT's own layers."""

import pytest
import small
import torch
from small import EPISODES

from lora_rlhf import fused, heads

ROLES = ("policy", "reward")


def gradients(made, role):
    data = small.batch(made)
    with made.training(role):
        heads.hidden_states(made, **data).square().sum().backward()
        return {n: p.grad.clone() for n, p in made.role_parameters(role) if p.grad is not None}


@pytest.mark.parametrize("name", small.ARCHITECTURES)
@pytest.mark.parametrize("top_fraction", [1.0, 0.5])
def test_outputs_and_gradients_are_pefts(name, top_fraction):
    torch.manual_seed(0)
    made = small.backbone(name, *ROLES, top_fraction=top_fraction)
    for role in ROLES:
        want, wanted = gradients(made, role), heads.sequence_logprobs(made, EPISODES, role)
        with fused.lora(made):
            found, ours = gradients(made, role), heads.sequence_logprobs(made, EPISODES, role)
        assert ours == pytest.approx(wanted, abs=1e-4)
        assert found.keys() == want.keys() and len(want) > 2
        for key, tensor in want.items():
            scale = float(tensor.abs().max()) + 1e-6
            torch.testing.assert_close(found[key] / scale, tensor / scale, rtol=1e-3, atol=1e-5)


def test_the_base_model_without_an_adapter_is_the_base_model():
    made = small.backbone("llama", *ROLES)
    with torch.no_grad(), made.role(None):
        plain = heads.hidden_states(made, **small.batch(made))
        with fused.lora(made):
            assert torch.equal(plain, heads.hidden_states(made, **small.batch(made)))


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"load_in_4bit": True}], ids=str)
def test_other_precisions_keep_pefts_bits(options):
    made = small.backbone("llama", *ROLES, **options)
    with torch.no_grad(), made.role("policy"):
        plain = heads.hidden_states(made, **small.batch(made))
        with fused.lora(made):
            assert torch.equal(plain, heads.hidden_states(made, **small.batch(made)))


def test_an_error_inside_leaves_pefts_layers():
    made = small.backbone("llama", *ROLES)
    with pytest.raises(RuntimeError, match="stop"), fused.lora(made):
        raise RuntimeError("stop")
    assert not any("forward" in m.__dict__ for m in made.decoder.modules())


def test_second_derivatives_and_frozen_inputs_are_not_computed():
    """The lowest adapted layer's input needs no gradient: none is made for it."""
    layer = small.backbone("llama", "policy").layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64)
    out = fused._Product.apply(x, layer.base_layer.weight, None, a, b.requires_grad_(), 2.0)
    assert out.grad_fn is not None
    out.sum().backward()
    assert b.grad is not None and x.grad is None
