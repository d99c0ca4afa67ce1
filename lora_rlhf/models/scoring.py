# SPDX-License-Identifier: Apache-2.0
"""Log-probs, values and scores of the roles, from the backbone's hidden states.

Sequences are a left-padded prompt followed by a right-padded completion, as in TRL's rollouts.
B episodes, L prompt and completion tokens, T completion tokens, H hidden size. Masks follow from
lengths. No tensor has the shape (B, L, vocabulary): only completion tokens reach the LM head, in
tiles. With `trunk_states`, the hidden states (B, L, H) that leave the frozen layers, only the
adapted layers run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_rlhf.data.padding import pad_left, position_ids
from lora_rlhf.distributed.world import world

from . import trunk
from .backbone import Backbone
from .logprobs import Head, logprobs_and_entropy

Episode = tuple[list[int], list[int]]
"""Ids of a prompt and of its completion, without padding."""


def hidden_states(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    trunk_states: Tensor | None = None,
) -> Tensor:
    """Compute the last hidden states of the active role, (B, L, H)."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    # Models that derive positions from the mask themselves (OPT) may not take them as an argument.
    if "position_ids" in inspect.signature(type(backbone.decoder).forward).parameters:
        inputs["position_ids"] = position_ids(attention_mask)
    with trunk.start_from(backbone, trunk_states):
        states: Tensor = backbone.decoder(**inputs, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def mean_states(backbone: Backbone, texts: Sequence[list[int]], batch_size: int = 32) -> Tensor:
    """Compute the mean of the base's last hidden states over each text's tokens, (N, H)."""
    out = torch.zeros(len(texts), backbone.causal.config.get_text_config().hidden_size)

    def visit(part: Batch) -> None:
        states = hidden_states(backbone, part.ids, part.mask).float()
        weights = part.mask.unsqueeze(-1)
        out[part.index] = ((states * weights).sum(1) / weights.sum(1)).cpu()

    with backbone.role(None):
        for_each_batch(backbone, [(ids, []) for ids in texts], batch_size, None, visit)
    rows = world().completed(list(out))
    return torch.stack(rows) if rows else out


def trunk_states(backbone: Backbone, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Compute the hidden states that leave the frozen trunk, (B, L, H), equal for every role."""
    lowest = backbone.layers[trunk.depth(backbone)]
    with torch.no_grad(), trunk.alone(backbone), trunk.inputs_of(lowest) as states:
        hidden_states(backbone, input_ids, attention_mask)
    return states[0]


def completion_states(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    tokens: int,
    trunk_states: Tensor | None = None,
) -> Tensor:
    """Compute the hidden states that predict the last `tokens` ids, (B, T, H)."""
    with trunk.top_tokens(backbone, tokens + 1):
        states = hidden_states(backbone, input_ids, attention_mask, trunk_states)
    return states[:, -tokens - 1 : -1]


def completion_logprobs(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    tokens: int,
    temperature: float,
    trunk_states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log-probs of the last `tokens` ids, differentiable, and entropies; (B, T) float32.

    Logits are divided by `temperature`, as in sampling. Padding gets finite, meaningless numbers.
    """
    states = completion_states(backbone, input_ids, attention_mask, tokens, trunk_states)
    return logprobs_of(backbone, states, input_ids, temperature)


def logprobs_of(
    backbone: Backbone,
    states: Tensor,
    input_ids: Tensor,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute log-probs and entropies, (B, T), from `completion_states` (B, T, H)."""
    shape = states.shape[:2]
    rows, targets = states.reshape(-1, states.shape[-1]), input_ids[:, -shape[1] :].reshape(-1)
    head = Head.of(backbone.causal, temperature)
    logprobs, entropy = logprobs_and_entropy(rows, targets, head, entropy_gradient)
    return logprobs.reshape(shape).float(), entropy.reshape(shape).float()


def token_values(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    tokens: int,
    trunk_states: Tensor | None = None,
) -> Tensor:
    """Compute the value of the state *before* each of the last `tokens` ids, (B, T) float32."""
    states = completion_states(backbone, input_ids, attention_mask, tokens, trunk_states)
    return values_of(backbone, states)


def values_of(backbone: Backbone, states: Tensor) -> Tensor:
    """Compute values (B, T) from `completion_states` (B, T, H)."""
    values: Tensor = backbone.head("value")(states.float()).squeeze(-1)
    return values


def last_token_scores(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    role: str,
    trunk_states: Tensor | None = None,
) -> Tensor:
    """Compute the raw score of each row at its last valid token by length, (B,) float32."""
    states = hidden_states(backbone, input_ids, attention_mask, trunk_states)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (columns * attention_mask.bool()).argmax(dim=1)
    rows = torch.arange(input_ids.shape[0], device=input_ids.device)
    scores: Tensor = backbone.head(role)(states[rows, last].float()).squeeze(-1)
    return scores


@dataclass
class Batch:
    """Episodes of similar length as one left-padded batch.

    Attributes:
        index: Position of each episode in the caller's order.
        ids: (B, L), as `mask`.
        tokens: T, the length of the longest completion.
        states: Trunk states (B, L, H), where the caller has them.
    """

    index: list[int]
    ids: Tensor
    mask: Tensor
    tokens: int
    states: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, int]:
        """Arguments of `completion_states`."""
        return self.ids, self.mask, self.tokens

    def scatter(self, rows: Tensor, episodes: Sequence[Episode], out: list[Tensor]) -> None:
        """Put each row of (B, T) at its episode's position, without padding.

        After an empty prompt the first token of the completion is left out: nothing predicts it.
        """
        for row, i in zip(rows, self.index, strict=True):
            predicted = len(episodes[i][1]) - (not episodes[i][0])
            out[i] = row[self.tokens - predicted :]


def by_length(episodes: Sequence[Episode]) -> list[int]:
    """Sort the episodes' positions by length, the shortest first."""
    return sorted(range(len(episodes)), key=lambda i: len(episodes[i][0]) + len(episodes[i][1]))


def batch(
    backbone: Backbone,
    episodes: Sequence[Episode],
    index: Sequence[int],
    states: Sequence[Tensor] | None = None,
) -> Batch:
    """Pad the episodes at `index` to one batch."""
    rows = [episodes[i][0] + episodes[i][1] for i in index]
    ids, mask = pad_left(rows, backbone.tokenizer.pad_token_id)
    tokens = min(max(len(episodes[i][1]) for i in index), ids.shape[1] - 1)
    padded = None
    if states is not None:
        known = [states[i] for i in index]
        padded = pad_sequence(known, batch_first=True, padding_side="left").to(backbone.device)
    return Batch(list(index), ids.to(backbone.device), mask.to(backbone.device), tokens, padded)


def for_each_batch(
    backbone: Backbone,
    episodes: Sequence[Episode],
    size: int,
    states: Sequence[Tensor] | None,
    visit: Callable[[Batch], None],
) -> None:
    """Call `visit` on this process's episodes in batches sorted by length: padding stays short.

    After memory ran out, the failed batch and the remaining episodes come in smaller batches.
    """
    own = world().own(len(episodes))
    backbone.backoff.for_each_batch(
        "scoring",
        [i for i in by_length(episodes) if i in own],
        size,
        lambda index: visit(batch(backbone, episodes, index, states)),
    )


@torch.no_grad()
def scores(
    backbone: Backbone,
    episodes: Sequence[Episode],
    role: str = "reward",
    batch_size: int = 32,
    states: Sequence[Tensor] | None = None,
) -> list[float]:
    """Score each episode by a reward role, without its offset, in the order given.

    Args:
        states: Trunk states (L, H) of each episode, if they are known.
    """
    out = [0.0] * len(episodes)

    def visit(batch: Batch) -> None:
        rows = last_token_scores(backbone, batch.ids, batch.mask, role, batch.states)
        for i, score in zip(batch.index, rows.tolist(), strict=True):
            out[i] = score

    with backbone.role(role):
        for_each_batch(backbone, episodes, batch_size, states, visit)
    return world().completed(out)


@torch.no_grad()
def _per_token(
    backbone: Backbone,
    episodes: Sequence[Episode],
    role: str | None,
    batch_size: int,
    states: Sequence[Tensor] | None,
    compute: Callable[[Batch], Tensor],
) -> list[Tensor]:
    """Apply `compute`, which returns (B, T), to all batches; returns (t,) for each episode."""
    out: list[Tensor] = [torch.empty(0)] * len(episodes)
    with backbone.role(role):
        for_each_batch(
            backbone, episodes, batch_size, states, lambda b: b.scatter(compute(b), episodes, out)
        )
    return world().completed(out)


def episode_logprobs(
    backbone: Backbone,
    episodes: Sequence[Episode],
    role: str | None,
    batch_size: int = 32,
    temperature: float = 1.0,
    states: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Compute the log-probs of each completion's tokens, (t,) float32 each, in the order given."""

    def compute(batch: Batch) -> Tensor:
        return completion_logprobs(backbone, *batch.inputs, temperature, batch.states)[0]

    return _per_token(backbone, episodes, role, batch_size, states, compute)


def episode_values(
    backbone: Backbone,
    episodes: Sequence[Episode],
    batch_size: int = 32,
    states: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Compute the value before each completion token, (t,) float32 each, in the order given."""

    def compute(batch: Batch) -> Tensor:
        return token_values(backbone, *batch.inputs, batch.states)

    return _per_token(backbone, episodes, "value", batch_size, states, compute)


def sequence_logprobs(
    backbone: Backbone,
    episodes: Sequence[Episode],
    role: str | None,
    batch_size: int = 32,
    temperature: float = 1.0,
) -> list[float]:
    """Sum the log-probs of each completion given its prompt, in nats."""
    rows = episode_logprobs(backbone, episodes, role, batch_size, temperature or 1.0)
    return [float(row.double().sum()) for row in rows]
