# SPDX-License-Identifier: Apache-2.0
"""Backbones with random weights, made in the precision that they are used in.

In 4 bits one linear layer after the other is drawn on the device and quantised there: at no time
does more than one of them exist in 16 or 32 bits, so an 8B model needs no 16 GB to be made.
"""

from __future__ import annotations

import argparse

import common
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import LoraSection, ModelSection

_STD = 0.02


def causal_model(
    shape: common.Shape, dtype: torch.dtype, four_bit: bool, device: torch.device
) -> LlamaForCausalLM:
    """A randomly initialised Llama on `device`; `dtype` is that of everything not quantised."""
    config = LlamaConfig(**common.llama_options(shape), dtype=dtype)
    with torch.device("meta"):
        causal = LlamaForCausalLM(config)
    for name, module in list(causal.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            made = _linear(module, dtype, four_bit, device)
            causal.model.layers.set_submodule(name, made)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):  # a norm
            module.weight = nn.Parameter(
                torch.ones(module.weight.shape, dtype=dtype, device=device)
            )
    causal.model.norm.weight = nn.Parameter(torch.ones(shape.hidden, dtype=dtype, device=device))
    table = (shape.vocabulary, shape.hidden)
    causal.model.embed_tokens.weight = nn.Parameter(_random(table, dtype, device))
    if shape.tied:
        causal.lm_head.weight = causal.model.embed_tokens.weight
    else:
        causal.lm_head.weight = nn.Parameter(_random(table, dtype, device))
    causal.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    left = [n for n, t in [*causal.named_parameters(), *causal.named_buffers()] if t.is_meta]
    assert not left, f"still on meta: {left}"
    causal.is_loaded_in_4bit = four_bit
    causal.generation_config = GenerationConfig(pad_token_id=common.PAD)
    return causal.requires_grad_(False).eval()


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=_STD)


def _linear(
    module: nn.Linear, dtype: torch.dtype, four_bit: bool, device: torch.device
) -> nn.Linear:
    weight = _random(tuple(module.weight.shape), dtype, device)
    if not four_bit:
        module.weight = nn.Parameter(weight)
        return module
    import bitsandbytes as bnb

    with torch.device("meta"):
        made = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=dtype,
            quant_type="nf4",
            compress_statistics=True,
        )
    made.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    ).to(device)  # this is when it quantises
    made.support_avx512bf16_for_cpu = False  # as Backbone.load does: repacking breaks backward
    return made


def backbone(found: argparse.Namespace, device: torch.device) -> Backbone:
    """A Backbone of the preset; its eos has no row in the model, so that none is ever sampled."""
    shape, dtype = common.PRESETS[found.preset], getattr(torch, found.dtype)
    wanted = common.targets(found)
    return Backbone(
        causal_model(shape, dtype, found.four_bit, device),
        common.tokenizer(shape.vocabulary, eos=shape.vocabulary),
        ModelSection(
            id="tiny",
            dtype=found.dtype,
            load_in_4bit=found.four_bit,
            gradient_checkpointing=found.checkpointing,
        ),
        LoraSection(
            r=found.lora_r,
            alpha=2 * found.lora_r,
            top_fraction=found.top_fraction,
            target_modules=None if isinstance(wanted, str) else wanted,
        ),
        {"source": "random weights"},
    )


@torch.no_grad()
def add_roles(made: Backbone) -> None:
    """Reference and reward as after SFT and reward training: adapters that are not the identity."""
    made.add_role("reference")
    _nudge(made, "reference")
    made.add_role("reward", copy_from="reference")
    _nudge(made, "reward")


def _nudge(made: Backbone, role: str) -> None:
    for name, parameter in made.role_parameters(role):
        if "lora_B" in name:
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
