# SPDX-License-Identifier: Apache-2.0
"""A backbone on the meta device, where a tensor has a shape and takes no memory."""

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

BLOCK = 64
"""Weights that share a scale in NF4."""


class MetaBackbone(Backbone):
    """Backbone whose tensors have shapes and no data."""

    def add_role(
        self, role: str, *, copy_from: str | None = None, stacked: int | None = None
    ) -> Any:
        """Add a role on the meta device; PEFT would allocate its adapter on the CPU."""
        with META:
            return super().add_role(role, copy_from=copy_from, stacked=stacked)


def backbone(
    config: Any, model: ModelSection, lora: LoraSection, dtype: torch.dtype
) -> MetaBackbone:
    """Build the backbone that `Backbone.load` would make of this config, on the meta device."""
    config = copy.deepcopy(config)
    disable_dropout(config)
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # any id: the tokenizer would give one
    config._name_or_path = model.hub_id or model.id  # PEFT compares it between adapters
    with META:
        causal = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if is_4bit(model, config):
        _quantise(causal, dtype)
    return MetaBackbone(causal, None, model, lora, {})  # type: ignore[arg-type]


def parameters(config: Any) -> int:
    """Count the parameters of a base, tied ones once, without its weights."""
    with META:
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def is_4bit(model: ModelSection, config: Any) -> bool:
    """Tell if the base is quantised to 4 bits, by the recipe or by its own config."""
    own = getattr(config, "quantization_config", None) or {}
    own = own if isinstance(own, dict) else own.to_dict()
    return model.load_in_4bit or bool(own.get("load_in_4bit"))


def with_layers(config: Any, layers: int) -> Any:
    """Return the config of the same model with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def adapted_shapes(made: Backbone, adapted: int, wanted: list[str] | None) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of every adapted linear module in the upper `adapted` layers."""
    names = set(linear_names(made.layers, wanted))
    return [
        (m.in_features, m.out_features) if isinstance(m, nn.Linear) else tuple(m.weight.shape)
        for layer in list(made.layers)[len(made.layers) - adapted :]
        for name, m in layer.named_modules()
        if name.rpartition(".")[2] in names and isinstance(m, nn.Linear | Conv1D)
    ]


def _quantise(causal: PreTrainedModel, dtype: torch.dtype) -> None:
    """Quantise to NF4 as transformers does: all linear layers but the LM head and tied ones.

    A weight is half a byte; 64 share an 8-bit scale, 256 scales a float32 one (2305.14314, sec. 3).
    """
    config = nf4(dtype)  # raises if bitsandbytes cannot be imported
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    # bitsandbytes caches this table on the device of its first use, which must not be meta.
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    skipped = HfQuantizer.get_modules_to_not_convert(causal, None, causal._keep_in_fp32_modules)
    replace_with_bnb_linear(causal, skipped, quantization_config=config)
    for module in causal.modules():
        if isinstance(module, Linear4bit):
            module.weight.data = module.weight.data.to(dtype)
            module.weight._quantize(META)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
            module.compute_type_is_set = True
    causal.is_loaded_in_4bit = True


def tensors(made: Backbone) -> list[Tensor]:
    """List all tensors of backbone and roles, scales of 4-bit weights included."""
    models: list[nn.Module] = [made.causal, *made.views.values()]
    parameters = {id(p): p for m in models for p in [*m.parameters(), *m.buffers()]}
    return [t for p in parameters.values() for t in held_tensors(p)]
