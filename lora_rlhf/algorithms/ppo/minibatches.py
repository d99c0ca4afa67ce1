# SPDX-License-Identifier: Apache-2.0
"""Micro-batches of a PPO epoch: a rollout shuffled, split and trimmed, its tokens counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_rlhf._trl import split_tensor_dict
from lora_rlhf.models.backbone import Backbone

from .ptx import TextMix


def model_inputs(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Join prompt and completion: ids and mask (B, L), and the number of completion columns T."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, mask, batch["completion_ids"].shape[1]


def trunk_states(batch: dict[str, Any], device: torch.device) -> Tensor | None:
    """Join trunk states of prompt and completion, (B, L, H), if the rollout holds them."""
    if "prompt_states" not in batch:
        return None
    return torch.cat([batch["prompt_states"], batch["completion_states"]], dim=1).to(device)


def split(rollout: dict[str, Tensor], micro_batches: int, window: int) -> list[dict[str, Any]]:
    """Split a rollout, tensors (N, ...), into one epoch's micro-batches in a new random order.

    Episodes of one optimizer step are sorted by length, which changes only the padding.

    Args:
        window: Micro-batches of one optimizer step. Each gets `window_tokens`, the valid tokens of
            its whole window: dividing by them makes gradient accumulation exact.
    """
    order = torch.randperm(rollout["prompt_ids"].shape[0])
    if window > 1:
        order = _by_length(rollout, order, window * len(order) // micro_batches)
    shuffled = {k: v[order.to(v.device)] for k, v in rollout.items()}
    batches: list[dict[str, Any]] = split_tensor_dict(shuffled, micro_batches)
    for start in range(0, len(batches), window):
        tokens = sum(int(b["completion_mask"].sum()) for b in batches[start : start + window])
        for batch in batches[start : start + window]:
            batch["window_tokens"] = max(tokens, 1)
    return [trim(batch) for batch in batches]


def _by_length(rollout: dict[str, Tensor], order: Tensor, step: int) -> Tensor:
    """Sort the episodes of each optimizer step, `step` of them in the order given, by length."""
    length = rollout["prompt_mask"].sum(dim=1) + rollout["completion_mask"].sum(dim=1)
    return torch.cat([i[length.cpu()[i].argsort(stable=True)] for i in order.split(step)])


def sorted_windows(batches: list[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    """Sort the episodes of `window` micro-batches, one optimizer step, by length over them all."""
    joined = {k: torch.cat([b[k] for b in batches]) if v.ndim else v for k, v in batches[0].items()}
    rows = len(joined["prompt_ids"])
    order = _by_length(joined, torch.arange(rows), rows * window // len(batches))
    ordered = {k: v[order.to(v.device)] if v.ndim else v for k, v in joined.items()}
    result: list[dict[str, Any]] = split_tensor_dict(ordered, len(batches))
    return result


def valid_columns(mask: Tensor, tokens: int) -> tuple[slice, int]:
    """Find the columns of a mask (B, L) that are not padding in every row.

    Returns:
        The columns, with one of the prompts at least, and how many of them are among the last
        `tokens`, the completions'; at least 1.
    """
    start = mask.shape[1] - tokens
    first = min(int(mask.any(dim=0).int().argmax()), max(start - 1, 0))
    kept = max(int(mask[:, start:].sum(dim=1).max()), 1)
    return slice(first, start + kept), kept


def add_text(batches: list[dict[str, Any]], mix: TextMix, window: int, backbone: Backbone) -> None:
    """Add text for PPO-ptx to every micro-batch, and the number of text tokens in its window."""
    for start in range(0, len(batches), window):
        inside = batches[start : start + window]
        for batch in inside:
            batch["text"] = mix.next(backbone)
        tokens = sum(batch["text"].tokens for batch in inside)
        for batch in inside:
            batch["window_text_tokens"] = tokens


def trim(batch: dict[str, Any]) -> dict[str, Any]:
    """Drop the columns that are padding in every row."""
    skip = int((batch["prompt_mask"].sum(dim=0) > 0).int().argmax())
    keep = max(int(batch["completion_mask"].sum(dim=1).max()), 1)
    prompt, completion = slice(skip, None), slice(keep)
    return {
        k: v[:, prompt if k.startswith("prompt") else completion] if isinstance(v, Tensor) else v
        for k, v in batch.items()
    }
