# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn with a seed of their own, whatever else is in the batch.

Gumbel-max: the token with the largest log-prob plus noise is an exact draw (Maddison et al. 2014,
1411.0030). The noise is a hash of seed, position and token, so that a draw depends on nothing
else, and a last-bit difference of the logits changes it only where two tokens tie. Inverse
transform sampling (`sampler.draw`) would shift the border of every token in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MOST = 1024  # candidates of a nucleus before the whole vocabulary is sorted


def noise(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Gumbel noise (B, size), float32, of seeds below 2^32 and positions, (B,) int64 each."""
    row = _mixed(seeds ^ _mixed(positions + 0x9E3779B9))
    bits = _mixed(row.unsqueeze(1) ^ _mixed(torch.arange(size, device=seeds.device) + 0x85EBCA6B))
    return _gumbel(bits)


def _gumbel(bits: Tensor) -> Tensor:
    """Turn 32 bits to noise; 23 of them, since half more than 24 bits is rounded up to 1."""
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # in (0, 1), exact in float32
    return -(-uniform.log()).log()


def _mixed(bits: Tensor) -> Tensor:
    """Mix 32 bits held in int64, bijectively (Ellis' lowbias32)."""
    bits = bits & _MASK
    bits = ((bits ^ (bits >> 16)) * 0x21F0AAAD) & _MASK
    bits = ((bits ^ (bits >> 15)) * 0x735A2D97) & _MASK
    return bits ^ (bits >> 15)


def draw(
    logits: Tensor,
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """Draw a token for each row, (B,).

    Args:
        logits: (B, V) float32; -inf where a token is forbidden.
        temperatures: 0 is greedy.
        top_ps: Probability of the nucleus that is drawn from (1904.09751); 1 is everything.
        seeds: Below 2^32.
        positions: Place of the token in its answer.
    """
    device = logits.device
    heat = torch.tensor(list(temperatures), device=device).unsqueeze(1)
    scaled = torch.where(heat > 0, logits / heat.clamp(min=1e-6), logits)
    for i, (top_p, temperature) in enumerate(zip(top_ps, temperatures, strict=True)):
        if top_p < 1 and temperature > 0:
            scaled[i] = _nucleus(scaled[i], top_p)
    hot = [i for i, row in enumerate(heat.tolist()) if row[0] > 0]  # of 1e-46 float32 makes 0
    if hot:
        made = noise(
            torch.tensor([seeds[i] for i in hot], device=device),
            torch.tensor([positions[i] for i in hot], device=device),
            logits.shape[1],
        )
        scaled[hot] += made
    return scaled.argmax(dim=-1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Forbid all but the fewest most probable tokens whose probabilities reach `top_p`."""
    probabilities = logits.softmax(dim=-1)
    values, index = probabilities.topk(min(_MOST, len(logits)))
    if float(values.sum()) < top_p:
        values, index = probabilities.sort(descending=True)
    kept = index[values.cumsum(dim=0) - values < top_p]
    out = torch.full_like(logits, -torch.inf)
    out[kept] = logits[kept]
    return out
