# SPDX-License-Identifier: Apache-2.0
"""Write a model of the Llama family, or a LoRA adapter of one, as a GGUF file for llama.cpp.

Llama's own rotary embedding turns neighbouring numbers, transformers' the two halves of a head, so
the rows of q and k are stored in llama.cpp's order for the architecture `llama` (Llama, SmolLM2,
Mistral). Qwen2 and Qwen3 turn halves in both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from lora_rlhf import extras
from lora_rlhf.errors import UsageError
from lora_rlhf.estimates import Floats
from lora_rlhf.models.base_model import BaseModel

from . import gguf_tokenizer

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model_type -> llama.cpp's architecture."""

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""Name of a dtype -> GGUF's."""

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_BLOCK = 32
_LARGEST_HALF = 65504.0


def architecture(config: Any) -> str:
    """Return llama.cpp's architecture of a base.

    Raises:
        UsageError: This module cannot write it.
    """
    faults = {
        "activation": getattr(config, "hidden_act", "silu") != "silu",
        "partial rotary embedding": (config.rope_parameters or {}).get("partial_rotary_factor", 1)
        != 1
        if hasattr(config, "rope_parameters")
        else False,
        "rotary embedding": _rope(config).get("rope_type", "default")
        not in ("default", "linear", "llama3"),
    }
    known, fault = ARCHITECTURES.get(config.model_type), [k for k, bad in faults.items() if bad]
    if known is None or fault:
        what = f"with this {fault[0]}" if known else ""
        raise UsageError(
            f"a GGUF file of {config.model_type} {what}".strip() + " cannot be written here",
            expected=f"an architecture of {', '.join(ARCHITECTURES)}",
            remedy="export `--to merged`, and convert that folder with llama.cpp's own script",
        )
    return known


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def write(base: BaseModel, model: Any, path: Path, dtype: str, name: str) -> None:
    """Write a plain model in float32 with its tokenizer.

    Args:
        dtype: A key of DTYPES, for matrices; q4_0 keeps embeddings in q8_0. Vectors are float32.

    Raises:
        UsageError: The architecture or tokenizer cannot be written, or float16 cannot hold it.
    """
    gguf = extras.load("gguf", "--to gguf", "export")
    config = model.config.get_text_config()
    writer = gguf.GGUFWriter(path, architecture(config))
    heads, size = config.num_attention_heads, head_size(config)
    window = getattr(config, "sliding_window", None)  # llama.cpp attends to everything
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[DTYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(min(config.max_position_embeddings, window or math.inf))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_rope(config).get("rope_theta", 10_000.0))
    if _rope(config).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(_rope(config)["factor"])
    writer.add_vocab_size(model.get_input_embeddings().num_embeddings)
    gguf_tokenizer.fields(base, writer)
    kinds = {}
    for key, tensor in _tensors(gguf, model):
        kind = _kind(key, tensor, DTYPES[dtype])
        kinds[key] = kind = gguf.GGMLQuantizationType[kind]
        shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        count = math.prod(tensor.shape) // gguf.GGML_QUANT_SIZES[kind][0]
        raw = np.dtype(np.float32) if kind.name == "F32" else np.dtype(np.uint8)
        given = tensor.shape if kind.name == "F32" else shape
        writer.add_tensor_info(
            key, given, raw, count * gguf.GGML_QUANT_SIZES[kind][1], raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, tensor in _tensors(gguf, model):
        writer.write_tensor_data(gguf.quants.quantize(_numbers(tensor), kinds[key]))
    writer.close()


def _tensors(gguf: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield llama.cpp's name and order of each tensor."""
    config = model.config.get_text_config()
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture(config))
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        yield _named(names, name), ordered(config, name, tensor)
    if _rope(config).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config)


def _named(names: Any, name: str) -> str:
    known: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if known is None:
        raise UsageError(f"llama.cpp has no tensor for {name}", remedy="export `--to merged`")
    return known


def ordered(config: Any, name: str, tensor: Tensor) -> Tensor:
    """Put the rows of q and k, or of their LoRA's B, into llama.cpp's order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if architecture(config) != "llama" or count is None:
        return tensor
    rows = tensor.shape[0]
    halves = tensor.reshape(count, 2, rows // count // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def head_size(config: Any) -> int:
    """Return the size of an attention head."""
    return int(getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads)


def _llama3_factors(config: Any) -> Tensor:
    """Compute the factors by which Llama 3.1 divides the frequencies of its rotary embedding."""
    rope, size = _rope(config), head_size(config)
    old = rope["original_max_position_embeddings"]
    low, high = old / rope["low_freq_factor"], old / rope["high_freq_factor"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    smooth = (old / waves - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"]
    )
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    long = torch.full_like(waves, rope["factor"])
    factors = torch.where(waves < high, 1.0, torch.where(waves > low, long, between))
    return factors.float()


def _kind(key: str, tensor: Tensor, wanted: str) -> str:
    if tensor.ndim < 2 or key.endswith("_norm.weight"):
        return "F32"
    if wanted.startswith("Q") and tensor.shape[-1] % _BLOCK:
        return "F16"
    if wanted == "Q4_0" and key in ("token_embd.weight", "output.weight"):
        return "Q8_0"
    if wanted == "F16" and float(tensor.abs().max()) > _LARGEST_HALF:
        raise UsageError(f"{key} holds numbers too large for float16", remedy="--dtype bfloat16")
    return wanted


def _numbers(tensor: Tensor) -> Floats:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())  # type: ignore[return-value]


def write_adapter(base: BaseModel, folder: Path, path: Path, name: str) -> None:
    """Write a PEFT LoRA folder as llama.cpp's adapter, in float32.

    Raises:
        UsageError: The base's architecture cannot be written.
    """
    gguf = extras.load("gguf", "--to gguf-adapter", "export")
    config = base.causal.config.get_text_config()
    given = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, architecture(config))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(given["lora_alpha"]))
    writer.add_name(name)
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture(config))
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, value in sorted(load_file(folder / "adapter_model.safetensors").items()):
        inner, _, side = key.removesuffix(".weight").rpartition(".lora_")
        module = f"{inner.removeprefix('base_model.model.')}.weight"
        tensor = torch.from_numpy(value)
        if side == "B":
            tensor = ordered(config, module, tensor)
        writer.add_tensor(f"{_named(names, module)}.lora_{side.lower()}", _numbers(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
