# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of base models, since an adapter gives wrong outputs silently on another base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

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
        flat = tensor.detach().reshape(-1)
        # Odd, because an even step would sample a single column of a matrix with 4096 columns.
        step = max(1, flat.numel() // 4096) | 1
        sample = flat[::step].float() if flat.is_floating_point() else flat[::step]
        digest.update(f"{name.replace('.base_layer', '')} {tuple(tensor.shape)}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def sample(causal: PreTrainedModel) -> list[float]:
    """Sample about 512 weights that are not quantised, and so nearly equal in every dtype."""
    tensors = [p for _, p in _base_parameters(causal) if p.is_floating_point()]
    each = max(1, _SAMPLE // max(len(tensors), 1))
    values: list[float] = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        values += flat[:: max(1, flat.numel() // each) | 1][:each].float().tolist()
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
            # A matrix that processes share is put together for this.
            yield (
                name,
                tensor if (piece := getattr(tensor, "piece", None)) is None else piece.whole(),
            )
