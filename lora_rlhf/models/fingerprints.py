# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of base models, since an adapter gives wrong outputs silently on another base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

_SAMPLE = 512
_SAME = 0.004
"""Largest mean difference, relative to the mean magnitude, of one base loaded in two dtypes.

Rounding to bfloat16 changes a number by at most 2^-9 of itself; another base differs by about 1.4.
"""


@torch.no_grad()
def fingerprint(causal: PreTrainedModel) -> str:
    """Hash names, shapes and evenly spaced samples of the frozen tensors by sha256."""
    digest = hashlib.sha256()
    for name, tensor in _base_parameters(causal):
        digest.update(f"{name.replace('.base_layer', '')} {tuple(tensor.shape)}".encode())
        digest.update(_spaced(tensor, tensor.numel() // 4096).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def sample(causal: PreTrainedModel) -> list[float]:
    """Sample about 512 weights that are not quantised, and so nearly equal in every dtype."""
    tensors = [p for _, p in _base_parameters(causal) if p.is_floating_point()]
    each = max(1, _SAMPLE // max(len(tensors), 1))
    values: list[float] = []
    for tensor in tensors:
        values += _spaced(tensor, tensor.numel() // each)[:each].tolist()
    return values


def nearly_same(values: list[float], causal: PreTrainedModel) -> bool:
    """Tell if the values of `sample`, perhaps in another dtype, come from this base."""
    before, now = np.array(values), np.array(sample(causal))
    if before.shape != now.shape:
        return False
    return bool(np.abs(before - now).sum() <= _SAME * np.abs(before).sum())


def _base_parameters(causal: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in causal.named_parameters():
        if "lora_" not in name and "value_head" not in name:
            yield name, tensor


def _spaced(parameter: Any, step: int) -> Tensor:
    """Copy every `step`-th number, or every one after it, to the host; floats as float32.

    The step is odd, because an even one would sample a single column of a matrix with 4096 columns.
    A matrix that processes share is put together for this, and dropped before the next one.
    """
    piece = getattr(parameter, "piece", None)
    whole: Tensor = parameter.detach() if piece is None else piece.whole()
    flat = whole.reshape(-1)[:: max(1, step) | 1]
    return (flat.float() if flat.is_floating_point() else flat).cpu().clone()
