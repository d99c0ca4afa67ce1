# SPDX-License-Identifier: Apache-2.0
"""LoRA in place, gated MLPs and RMS norms against PEFT's and transformers' own."""

import pytest
import small
import torch
from small import EPISODES

from lora_rlhf.models import fused_layers, lean_layers, scoring

ROLES = ("policy", "reward")


def gradients(made, role):
    data = small.batch(made)
    # Along fixed directions: the sum of squares behind an RMS norm is nearly a constant.
    along = torch.randn(small.HIDDEN, generator=torch.Generator().manual_seed(0))
    with made.training(role):
        (scoring.hidden_states(made, **data) @ along).sum().backward()
        return {n: p.grad.clone() for n, p in made.role_parameters(role) if p.grad is not None}


@pytest.mark.parametrize(("name", "top_fraction"), small.with_each(1.0, 0.5))
def test_outputs_and_gradients_are_pefts(name, top_fraction):
    torch.manual_seed(0)
    made = small.backbone(name, *ROLES, top_fraction=top_fraction)
    for role in ROLES:
        want, wanted = gradients(made, role), scoring.sequence_logprobs(made, EPISODES, role)
        with fused_layers.layers(made):
            found, ours = gradients(made, role), scoring.sequence_logprobs(made, EPISODES, role)
        assert ours == pytest.approx(wanted, abs=1e-4)
        assert found.keys() == want.keys() and len(want) > 2
        for key, tensor in want.items():
            scale = float(tensor.abs().max()) + 1e-6
            torch.testing.assert_close(found[key] / scale, tensor / scale, rtol=1e-3, atol=1e-5)


def test_the_base_model_without_an_adapter_is_the_base_model():
    made = small.backbone("llama", *ROLES)
    with torch.no_grad(), made.role(None):
        plain = scoring.hidden_states(made, **small.batch(made))
        with fused_layers.layers(made):
            found = scoring.hidden_states(made, **small.batch(made))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)  # the norms round differently


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"load_in_4bit": True}], ids=str)
def test_other_precisions_keep_pefts_bits(options):
    made = small.backbone("llama", *ROLES, **options)
    with torch.no_grad(), made.role("policy"):
        plain = scoring.hidden_states(made, **small.batch(made))
        with fused_layers.layers(made):
            assert torch.equal(plain, scoring.hidden_states(made, **small.batch(made)))


def replaced(made):
    with fused_layers.layers(made):
        return [type(m).__name__ for m in made.decoder.modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("name", small.ARCHITECTURES)
def test_what_is_replaced_is_what_is_compared(name):
    found = replaced(small.backbone(name, *ROLES))
    norms, mlps = fused_layers._NORMS.intersection(found), lean_layers.MLPS.intersection(found)
    if name in ("llama", "mistral", "qwen2", "qwen3"):
        assert len(norms) == len(mlps) == 1
        assert found.count(*mlps) == 2 and found.count(*norms) == (9 if name == "qwen3" else 5)
    elif name == "phi3":  # one product for gate and up
        assert norms == {"Phi3RMSNorm"} and not mlps
    else:
        assert not norms and not mlps


def test_trainable_weights_keep_their_own_forward():
    made = small.backbone("llama", "policy")
    made.layers[0].mlp.up_proj.base_layer.weight.requires_grad_()
    made.layers[0].input_layernorm.weight.requires_grad_()
    assert replaced(made).count("LlamaMLP") == 1 and replaced(made).count("LlamaRMSNorm") == 4


@pytest.mark.parametrize("adapted", [(1, 1, 1), (0, 0, 1), (1, 0, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("x_needs_it", [True, False])
def test_the_mlps_gradients_are_those_of_finite_differences(adapted, x_needs_it):
    torch.manual_seed(0)
    sizes = ((8, 12), (8, 12), (12, 8))  # features in and out of gate, up and down
    tensors = []
    for has, (features, out) in zip(adapted, sizes, strict=True):
        tensors.append(torch.randn(out, features, dtype=torch.double))
        for shape in ((2, features), (out, 2)):
            factor = torch.randn(shape, dtype=torch.double, requires_grad=True)
            tensors.append(factor if has else None)
    x = torch.randn(2, 3, 8, dtype=torch.double, requires_grad=x_needs_it)
    if not x_needs_it and not any(adapted):
        assert fused_layers._Gated.apply(x, (2.0, 0.5, 1.0), *tensors).grad_fn is None
        return
    assert torch.autograd.gradcheck(
        lambda x, *t: fused_layers._Gated.apply(x, (2.0, 0.5, 1.0), *t), (x, *tensors)
    )


def test_the_norms_gradient_is_that_of_finite_differences():
    x = torch.randn(2, 3, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(8, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: fused_layers._RMS.apply(x, weight, 1e-5), (x,))


def test_fewer_tensors_are_kept_for_backward():
    """Two tensors of an MLP's width fewer a layer."""
    made = small.backbone("llama", *ROLES)
    data = {"input_ids": torch.arange(64).view(2, 32), "attention_mask": torch.ones(2, 32)}

    def wide():
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
        with made.training("policy"), hooks:
            assert scoring.hidden_states(made, **data).requires_grad
        return sum(s.nbytes() == 64 * 128 * 4 for s in storages.values())

    own = wide()
    with fused_layers.layers(made):
        assert own - wide() == 2 * len(made.layers)


def test_merged_layers_and_autocast_are_left_to_peft():
    made = small.backbone("llama", *ROLES)
    data = small.batch(made)
    layer = made.layers[0].mlp.up_proj
    with torch.no_grad(), made.role("policy"):
        for name in made.layers[0].mlp.up_proj.lora_B:
            layer.lora_B[name].weight.normal_()

        def compared(**bounds):
            plain = scoring.hidden_states(made, **data)
            with fused_layers.layers(made):
                found = scoring.hidden_states(made, **data)
            torch.testing.assert_close(found, plain, **bounds)

        layer.merge()
        compared(rtol=0, atol=1e-4)
        layer.unmerge()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            compared(rtol=0, atol=0)


@pytest.mark.parametrize("option", ["lora_dropout", "lora_bias"])
def test_dropout_and_bias_are_left_to_peft(option):
    made = small.backbone("llama", "policy")
    layer = made.layers[0].mlp.up_proj
    with made.role("policy"):
        assert fused_layers._factors(layer) is not None
        [name] = layer.active_adapters
        getattr(layer, option)[name] = torch.nn.Dropout(0.1) if option == "lora_dropout" else True
        assert fused_layers._factors(layer) is None


def test_an_earlier_override_is_restored():
    made = small.backbone("llama", *ROLES)
    norm = made.layers[0].input_layernorm
    norm.__dict__["forward"] = other = lambda x: x
    with fused_layers.layers(made), fused_layers.layers(made):
        assert norm.__dict__["forward"] is not other
    assert norm.__dict__["forward"] is other
    assert sum("forward" in m.__dict__ for m in made.decoder.modules()) == 1


def test_an_error_inside_leaves_pefts_layers():
    made = small.backbone("llama", *ROLES)
    with pytest.raises(RuntimeError, match="stop"), fused_layers.layers(made):
        raise RuntimeError("stop")
    assert not any("forward" in m.__dict__ for m in made.decoder.modules())


def test_no_gradient_is_computed_for_a_frozen_input():
    """The lowest adapted layer's input needs no gradient: none is made for it."""
    layer = small.backbone("llama", "policy").layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64)
    out = fused_layers._Product.apply(x, layer.base_layer.weight, None, a, b.requires_grad_(), 2.0)
    assert out.grad_fn is not None
    out.sum().backward()
    assert b.grad is not None and x.grad is None
