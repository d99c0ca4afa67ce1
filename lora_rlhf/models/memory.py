# SPDX-License-Identifier: Apache-2.0
"""Bytes of tensors and of the KV cache, and how many rows fit a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors, with shared memory counted once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def held_tensors(parameter: Any) -> list[Tensor]:
    """List a parameter's data and, in 4 bits, the scales and codes that decode it."""
    tensors = [parameter.data]
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        tensors += [t for t in vars(state).values() if isinstance(t, Tensor)]
        state = state.state2
    return tensors


def kv_bytes(causal: PreTrainedModel) -> int:
    """Count the bytes of one token's keys and values in all layers, ignoring sliding windows."""
    config = causal.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * causal.dtype.itemsize)


def kv_tokens(causal: PreTrainedModel) -> int:
    """Return how many tokens' keys and values fit half of the memory that is free now."""
    if causal.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(causal.device)
    else:
        free = _free_memory()
    return max(1, free // 2 // kv_bytes(causal))


def _free_memory() -> int:
    """Return the bytes that programs may still take; all of the machine's if it does not say."""
    with contextlib.suppress(OSError):
        known = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(known["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def rows_that_fit(causal: PreTrainedModel, tokens: int, wanted: int) -> int:
    """Return how many rows of this length the KV cache has room for, up to `wanted`; CPU: all."""
    if causal.device.type != "cuda" or not wanted:
        return max(wanted, 1)
    free, _ = torch.cuda.mem_get_info(causal.device)
    # torch gives cached blocks to its own tensors first, though the driver counts them as used.
    free += torch.cuda.memory_reserved(causal.device) - torch.cuda.memory_allocated(causal.device)
    return max(1, min(wanted, int(0.8 * free // (tokens * kv_bytes(causal)))))
