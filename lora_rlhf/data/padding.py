# SPDX-License-Identifier: Apache-2.0
"""Padded batches of token ids; not in `tokenization`, because that loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad ids on the left; ids and mask, (B, longest). The mask is by length, never by id."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def position_ids(attention_mask: Tensor) -> Tensor:
    """Count 0, 1, 2 … over valid tokens, whatever the padding (2403.17031, detail 2); (B, L)."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
