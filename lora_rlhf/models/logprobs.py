# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and entropies of tokens from hidden states, without logits of the vocabulary.

The LM head is frozen, so a token's log-prob depends on its own hidden state only, and the gradient
of the loss is the upstream scalar times d logp / d state. That row is computed in the same pass
over the vocabulary as the log-prob, by the running maximum of online softmax (1805.02867). This
takes two products with the head; recomputing the logits in backward takes three. TRL's kernels
recompute the logits; they are used on CUDA, where they are fused.

N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_rlhf._trl import ChunkedLogProbFunction

_ROWS, _COLUMNS = 1024, 2048
"""Tokens and vocabulary entries of one tile: 8 MB of float32, about the size of a CPU's cache."""

_TRL_COLUMNS = 32768


class Head(NamedTuple):
    """A frozen LM head; logits are softcap(product * scale) / temperature."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, causal: PreTrainedModel, temperature: float) -> Self:
        """Read a model's head; Gemma 2, Cohere and Granite have a soft cap or a scale."""
        layer, config = causal.get_output_embeddings(), causal.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None)
        if scale is None and getattr(config, "logits_scaling", None):
            scale = 1 / config.logits_scaling
        return cls(layer.weight, layer.bias, temperature, softcap, 1.0 if scale is None else scale)


def logprobs_and_entropy(
    states: Tensor, targets: Tensor, head: Head, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute log-probs of the targets, differentiable, and entropies; (N,) each and float32.

    Args:
        states: (N, H) hidden states.
        targets: (N,) ids.
        entropy_gradient: Make the entropy differentiable too, which takes a third product.
    """
    if head.weight.requires_grad:
        raise ValueError("the LM head must be frozen: no gradient is computed for it")
    compute: Any = by_trl_kernels if states.is_cuda else _OnePass.apply
    logprobs, entropy = compute(states, targets, head, entropy_gradient)
    return logprobs, entropy


def by_trl_kernels(
    states: Tensor, targets: Tensor, head: Head, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute `logprobs_and_entropy` by TRL's kernels, as on CUDA."""
    columns = min(_TRL_COLUMNS, head.weight.shape[0])
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        states, head.weight, head.bias, targets, head.temperature, columns, *head[3:], ("entropy",)
    )
    return logprobs, entropy if entropy_gradient else entropy.detach()


class _OnePass(torch.autograd.Function):
    """One pass over the vocabulary for outputs and gradients."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, head: Head, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        # Number of outputs that backward needs, the log-probs first.
        wanted = (1 + entropy_gradient) if ctx.needs_input_grad[0] else 0
        parts = [
            _rows(part, ids, head, wanted)
            for part, ids in zip(states.split(_ROWS), targets.split(_ROWS), strict=True)
        ]
        logprobs, entropy = (torch.cat([p[i] for p in parts]) for i in (0, 1))
        ctx.save_for_backward(*(torch.cat([p[2 + i] for p in parts]) for i in range(wanted)))
        ctx.dtype = states.dtype
        ctx.set_materialize_grads(False)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total = None
        for upstream, rows in zip(grads, ctx.saved_tensors, strict=False):
            if upstream is not None:
                part = upstream.unsqueeze(1) * rows
                total = part if total is None else total + part
        return (None if total is None else total.to(ctx.dtype), None, None, None)


def _rows(states: Tensor, targets: Tensor, head: Head, wanted: int) -> tuple[Tensor, ...]:
    """Compute log-probs, entropies and their gradients by the states for up to `_ROWS` tokens.

    Running sums over tiles, all relative to the running maximum m of the logits z:
    total = Σ e^(z-m) and moment = Σ e^(z-m) (z-m).
    """
    n = states.shape[0]
    top = states.new_full((n, 1), -torch.inf, dtype=torch.float32)
    total, moment, chosen = (torch.zeros_like(top) for _ in range(3))
    slope = torch.ones_like(top)  # d z / d product at the target
    # Σ e^(z-m) d z / d state, and Σ e^(z-m) (z-m) d z / d state
    sums = [states.new_zeros(states.shape, dtype=torch.float32) for _ in range(wanted)]
    for start in range(0, head.weight.shape[0], _COLUMNS):
        tile = head.weight[start : start + _COLUMNS]
        z, bend = _logits(states, tile, start, head)
        new = torch.maximum(top, z.amax(dim=1, keepdim=True))
        # On the first tile the shift is infinite, and 0 times infinity would be NaN.
        shift = torch.where(top.isinf(), 0.0, top - new)
        decay = torch.where(top.isinf(), 0.0, shift.exp())
        inside = ((targets >= start) & (targets < start + tile.shape[0])).nonzero().flatten()
        if inside.numel():
            columns = targets[inside] - start
            chosen[inside, 0] = z[inside, columns]
            if bend is not None:
                slope[inside, 0] = bend[inside, columns]
        z.sub_(new)
        p = z.exp()
        moment = decay * (moment + shift * total) + torch.linalg.vecdot(p, z).unsqueeze(1)
        total = decay * total + p.sum(dim=1, keepdim=True)
        if bend is not None:
            p *= bend
        if wanted > 1:
            sums[1].add_(shift * sums[0]).mul_(decay).addmm_(p * z, tile.float())
        if wanted:
            sums[0].mul_(decay).addmm_(p, tile.float())
        top = new
    log_total, mean = total.log(), moment / total
    logprobs, entropy = chosen - top - log_total, log_total - mean
    out = (logprobs.squeeze(1), entropy.squeeze(1))
    if not wanted:
        return out
    factor = head.scale / head.temperature
    by_total = sums[0] / total
    by_logprob = (slope * head.weight[targets].float() - by_total) * factor
    if wanted == 1:
        return (*out, by_logprob)
    return (*out, by_logprob, (mean * by_total - sums[1] / total) * factor)


def _logits(states: Tensor, tile: Tensor, start: int, head: Head) -> tuple[Tensor, Tensor | None]:
    """Compute a tile's logits in float32, and d logit / d product if it is not constant."""
    z = (states @ tile.t()).float()
    if head.bias is not None:
        z += head.bias[start : start + tile.shape[0]].float()
    bend = None
    if head.scale != 1.0:
        z *= head.scale
    if head.softcap is not None:
        bent = torch.tanh(z / head.softcap)
        z, bend = head.softcap * bent, 1 - bent.square()
    if head.temperature != 1.0:
        z /= head.temperature
    return z, bend
