# SPDX-License-Identifier: Apache-2.0
"""The backbone without weights: on the meta device a tensor has a shape and takes no memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from lora_rlhf.models.backbone import Backbone
from lora_rlhf.models.base_model import linear_names
from lora_rlhf.models.loading import disable_dropout, nf4
from lora_rlhf.models.memory import held_tensors
from lora_rlhf.recipe.schema import LoraSection, ModelSection

META = torch.device("meta")

BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a scale in NF4, and scales that share one under double quantisation."""


class MetaBackbone(Backbone):
    """A backbone whose tensors have shapes only; roles are added to it as to any other."""

    def add_role(
        self, role: str, *, copy_from: str | None = None, stacked: int | None = None
    ) -> Any:
        """As of any backbone; PEFT makes adapters of a base without memory in real memory."""
        with META:
            return super().add_role(role, copy_from=copy_from, stacked=stacked)


def backbone(
    config: Any, model: ModelSection, lora: LoraSection, dtype: torch.dtype
) -> MetaBackbone:
    """The backbone that `Backbone.load` would make of this config, on the meta device.

    Args:
        config: Of transformers; it is left as it is.
        dtype: What the weights are computed in.
    """
    config = copy.deepcopy(config)
    disable_dropout(config)
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # whichever the tokenizer brings, there is one
    config._name_or_path = model.hub_id or model.id  # what PEFT will be told, and compares
    with META:
        causal = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if model.load_in_4bit:
        _quantise(causal, dtype)
    return MetaBackbone(causal, None, model, lora, {})  # type: ignore[arg-type]


def with_layers(config: Any, layers: int) -> Any:
    """The config of the same model with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def adapted_shapes(made: Backbone, adapted: int, wanted: list[str] | None) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear module of the upper layers that carries an adapter."""
    names = set(linear_names(made.layers, wanted))
    return [
        (m.in_features, m.out_features) if isinstance(m, nn.Linear) else tuple(m.weight.shape)
        for layer in list(made.layers)[len(made.layers) - adapted :]
        for name, m in layer.named_modules()
        if name.rpartition(".")[2] in names and isinstance(m, nn.Linear | Conv1D)
    ]


def _quantise(causal: PreTrainedModel, dtype: torch.dtype) -> None:
    """Turn into NF4 what transformers would: every linear layer but the LM head and what is tied.

    A weight is half a byte; 64 share an 8-bit scale, 256 scales a float32 one (2305.14314, sec. 3).
    """
    config = nf4(dtype)  # where bitsandbytes cannot be imported, this says so
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    skipped = HfQuantizer.get_modules_to_not_convert(causal, None, causal._keep_in_fp32_modules)
    replace_with_bnb_linear(causal, skipped, quantization_config=config)
    for module in causal.modules():
        if not isinstance(module, Linear4bit):
            continue
        shape = torch.Size((module.out_features, module.in_features))
        scales = -(-shape.numel() // BLOCK)
        code, nested_code = (torch.empty(n, device=META) for n in (16, 256))
        nested = QuantState(
            torch.empty(-(-scales // _NESTED_BLOCK), device=META),
            code=nested_code,
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
        state = QuantState(
            torch.empty(scales, dtype=torch.uint8, device=META),
            shape,
            code,
            BLOCK,
            "nf4",
            dtype,
            torch.empty((), device=META),
            nested,
        )
        packed = torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8, device=META)
        module.weight = Params4bit(
            packed, quant_state=state, quant_type="nf4", bnb_quantized=True, module=module
        )
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
        module.compute_type_is_set = True
    causal.is_loaded_in_4bit = True


def tensors(made: Backbone) -> list[Tensor]:
    """Every tensor that exists once the roles are there, scales of 4-bit weights included."""
    models: list[nn.Module] = [made.causal, *made.views.values()]
    found = {id(p): p for m in models for p in [*m.parameters(), *m.buffers()]}
    return [t for p in found.values() for t in held_tensors(p)]
