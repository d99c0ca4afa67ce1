# SPDX-License-Identifier: Apache-2.0
"""What the roles compute from the backbone's hidden states: log-probs, values and scores.

Sequences are a left-padded prompt followed by a right-padded completion, as in TRL's rollouts.
B episodes, L prompt and completion tokens, T completion tokens, H hidden size. Masks are by length.
Nothing of shape (B, L, vocabulary) is built: only completion tokens reach the LM head, in tiles.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._trl import ChunkedLogProbFunction
from .backbone import Backbone
from .base import pad_left

_TILE = 32768
"""Vocabulary entries projected at once."""

Episode = tuple[list[int], list[int]]
"""Ids of a prompt and of its completion, without padding."""


def position_ids(attention_mask: Tensor) -> Tensor:
    """0, 1, 2 … over valid tokens, whatever the padding (2403.17031, detail 2). Shape (B, L)."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def hidden_states(backbone: Backbone, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states of whatever role is active, (B, L, H)."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    # Models that derive positions from the mask themselves (OPT) may not take them as an argument.
    if "position_ids" in inspect.signature(type(backbone.decoder).forward).parameters:
        inputs["position_ids"] = position_ids(attention_mask)
    states: Tensor = backbone.decoder(**inputs, use_cache=False).last_hidden_state
    return states


def completion_states(
    backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, tokens: int
) -> Tensor:
    """Hidden states that predict the last `tokens` ids, of the active role; (B, T, H)."""
    return hidden_states(backbone, input_ids, attention_mask)[:, -tokens - 1 : -1]


def completion_logprobs(
    backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, tokens: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs of the last `tokens` ids and the entropy there, of the active role; each (B, T).

    Both are float32.
    Logits are divided by `temperature`, the one that sampled. Padding gets a finite meaningless
    number: mask it. Differentiable.
    """
    states = completion_states(backbone, input_ids, attention_mask, tokens)
    return logprobs_of(backbone, states, input_ids, temperature)


def logprobs_of(
    backbone: Backbone, states: Tensor, input_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same from `completion_states`: the LM head over (B, T, H) in tiles; each (B, T)."""
    tokens = states.shape[1]
    head = backbone.causal.get_output_embeddings()
    softcap, scale = _logit_transform(backbone.causal.config.get_text_config())
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        states.reshape(-1, states.shape[-1]), head.weight, head.bias,
        input_ids[:, -tokens:].reshape(-1), temperature, min(_TILE, head.weight.shape[0]),
        softcap, scale, ("entropy",),
    )  # fmt: skip
    shape = (input_ids.shape[0], tokens)
    return logprobs.reshape(shape).float(), entropy.reshape(shape).float()


def token_values(
    backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, tokens: int, role: str = "value"
) -> Tensor:
    """V of the state *before* each of the last `tokens` ids, in float32; (B, T)."""
    return values_of(backbone, completion_states(backbone, input_ids, attention_mask, tokens), role)


def values_of(backbone: Backbone, states: Tensor, role: str = "value") -> Tensor:
    """The same from `completion_states`; (B, T) float32."""
    values: Tensor = backbone.head(role)(states.float()).squeeze(-1)
    return values


def last_token_scores(
    backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, role: str
) -> Tensor:
    """Raw score of each row, read at its last valid token by length; (B,) float32."""
    states = hidden_states(backbone, input_ids, attention_mask)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (columns * attention_mask.bool()).argmax(dim=1)
    rows = torch.arange(input_ids.shape[0], device=input_ids.device)
    scores: Tensor = backbone.head(role)(states[rows, last].float()).squeeze(-1)
    return scores


@torch.no_grad()
def scores(
    backbone: Backbone, episodes: Sequence[Episode], role: str = "reward", batch_size: int = 32
) -> list[float]:
    """Raw reward of each episode by a reward role (without its offset), in the order given."""
    out = [0.0] * len(episodes)
    with backbone.role(role):
        for index, ids, mask, _ in _batches(backbone, episodes, batch_size):
            for i, score in zip(
                index, last_token_scores(backbone, ids, mask, role).tolist(), strict=True
            ):
                out[i] = score
    return out


@torch.no_grad()
def sequence_logprobs(
    backbone: Backbone,
    episodes: Sequence[Episode],
    role: str | None,
    batch_size: int = 32,
    temperature: float = 1.0,
) -> list[float]:
    """Log-probability of each completion given its prompt, in nats, summed over its tokens.

    Nothing predicts the first token of an empty prompt's completion: it is not counted.
    """
    out = [0.0] * len(episodes)
    with backbone.role(role):
        for index, ids, mask, tokens in _batches(backbone, episodes, batch_size):
            logprobs, _ = completion_logprobs(backbone, ids, mask, tokens, temperature or 1.0)
            for row, i in enumerate(index):
                predicted = len(episodes[i][1]) - (not episodes[i][0])
                out[i] = float(logprobs[row, tokens - predicted :].double().sum())
    return out


def _batches(
    backbone: Backbone, episodes: Sequence[Episode], size: int
) -> Iterator[tuple[list[int], Tensor, Tensor, int]]:
    """Left-padded batches of similar length: indices, ids, mask, longest completion."""
    order = sorted(range(len(episodes)), key=lambda i: len(episodes[i][0]) + len(episodes[i][1]))
    for start in range(0, len(order), size):
        index = order[start : start + size]
        rows = [episodes[i][0] + episodes[i][1] for i in index]
        ids, mask = pad_left(rows, backbone.tokenizer.pad_token_id)
        tokens = min(max(len(episodes[i][1]) for i in index), ids.shape[1] - 1)
        yield index, ids.to(backbone.device), mask.to(backbone.device), tokens


def _logit_transform(config: Any) -> tuple[float | None, float]:
    """Soft cap and scale that some architectures give their logits (Gemma 2, Cohere, Granite)."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    if scale is None and getattr(config, "logits_scaling", None):
        scale = 1 / config.logits_scaling
    return softcap, 1.0 if scale is None else scale
