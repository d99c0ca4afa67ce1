# SPDX-License-Identifier: Apache-2.0
"""Layers that keep less for backward: PEFT's and transformers' bits, fewer bytes."""

import contextlib

import pytest
import small
import torch

from lora_rlhf.models import fused_layers, scoring

ROLES = ("policy", "reward")
PRECISIONS = [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"load_in_4bit": True}]


def gradients(made, role, context):
    along = torch.randn(small.HIDDEN, generator=torch.Generator().manual_seed(0))
    with made.training(role), context:
        loss = (scoring.hidden_states(made, **small.batch(made)).float() @ along).sum()
        loss.backward()
        found = {n: p.grad.clone() for n, p in made.role_parameters(role) if p.grad is not None}
    return loss.detach(), found


def assert_equal(made, role="policy"):
    loss, wanted = gradients(made, role, contextlib.nullcontext())
    ours, found = gradients(made, role, fused_layers.layers(made))
    assert torch.equal(ours, loss) and found.keys() == wanted.keys() and len(wanted) > 1
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("options", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", small.ARCHITECTURES)
def test_outputs_and_gradients_have_the_libraries_bits(name, options):
    torch.manual_seed(0)
    made = small.backbone(name, *ROLES, **options)
    for role in ROLES:
        assert_equal(made, role)


@pytest.mark.parametrize("targets", [["q_proj"], ["down_proj"], ["gate_proj", "o_proj"]], ids=str)
@pytest.mark.parametrize("options", PRECISIONS[::2], ids=str)
def test_some_adapted_modules_too(targets, options):
    assert_equal(small.backbone("llama", *ROLES, target_modules=targets, **options))
    half = small.backbone("llama", *ROLES, target_modules=targets, top_fraction=0.5, **options)
    assert_equal(half)


@pytest.mark.parametrize("options", PRECISIONS[::2], ids=str)
def test_dropout_checkpointing_and_autocast_keep_their_bits(options):
    made = small.backbone("llama", *ROLES, **options)
    layer = made.layers[0].mlp.down_proj
    layer.lora_dropout["default"] = torch.nn.Dropout(0.0)
    assert_equal(made)
    made.views["policy"].activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}
    )
    made.views["policy"].train()
    assert_equal(made)
    made = small.backbone("llama", *ROLES, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(made)


def kept_bytes(made, context):
    """Bytes that a forward of the policy keeps for backward, beside the weights."""
    data = {"input_ids": torch.arange(64).view(2, 32), "attention_mask": torch.ones(2, 32)}
    weights = {p.untyped_storage().data_ptr() for p in made.views["policy"].parameters()}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
    with made.training("policy"), made.role("policy"), context, hooks:
        assert scoring.hidden_states(made, **data).requires_grad
    return sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize(
    ("options", "share"), [(PRECISIONS[0], 0.5), (PRECISIONS[2], 0.75)], ids=str
)
def test_fewer_bytes_are_kept(options, share):
    made = small.backbone("llama", *ROLES, **options)
    without = kept_bytes(made, contextlib.nullcontext())
    assert kept_bytes(made, fused_layers.layers(made)) < share * without


@pytest.mark.parametrize("options", PRECISIONS[::2], ids=str)
def test_an_error_inside_leaves_the_libraries_layers(options):
    made = small.backbone("llama", *ROLES, **options)
    with pytest.raises(RuntimeError, match="stop"), fused_layers.layers(made):
        assert any("forward" in m.__dict__ for m in made.decoder.modules())
        raise RuntimeError("stop")
    assert not any("forward" in m.__dict__ for m in made.decoder.modules())
    assert all(layer.cast_input_dtype_enabled for layer in made._lora_layers())
