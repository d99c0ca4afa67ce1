# SPDX-License-Identifier: Apache-2.0
"""What the roles compute from the backbone's hidden states: log-probs, values and scores.

Sequences are a left-padded prompt followed by a right-padded completion, as in TRL's rollouts.
B episodes, L prompt and completion tokens, T completion tokens, H hidden size. Masks are by length.
Nothing of shape (B, L, vocabulary) is built: only completion tokens reach the LM head, in tiles.
Where the states that leave the trunk are given, (B, L, H), only the adapted layers run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import trunk
from .backbone import Backbone
from .base_model import pad_left
from .logprobs import Transform, logprobs_and_entropy

Episode = tuple[list[int], list[int]]
"""Ids of a prompt and of its completion, without padding."""


def position_ids(attention_mask: Tensor) -> Tensor:
    """0, 1, 2 … over valid tokens, whatever the padding (2403.17031, detail 2). Shape (B, L)."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def hidden_states(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    trunk_states: Tensor | None = None,
) -> Tensor:
    """Last hidden states of whatever role is active, (B, L, H)."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    # Models that derive positions from the mask themselves (OPT) may not take them as an argument.
    if "position_ids" in inspect.signature(type(backbone.decoder).forward).parameters:
        inputs["position_ids"] = position_ids(attention_mask)
    with trunk.kept(backbone, trunk_states):
        states: Tensor = backbone.decoder(**inputs, use_cache=False).last_hidden_state
    return states


def trunk_states(backbone: Backbone, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What leaves the frozen trunk, (B, L, H): the same for every role."""
    lowest = backbone.layers[trunk.depth(backbone)]
    with torch.no_grad(), trunk.alone(backbone), trunk.caught(lowest) as found:
        hidden_states(backbone, input_ids, attention_mask)
    return found[0]


def completion_states(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    tokens: int,
    trunk_states: Tensor | None = None,
) -> Tensor:
    """Hidden states that predict the last `tokens` ids, of the active role; (B, T, H)."""
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
    """Log-probs of the last `tokens` ids and the entropy there, of the active role; each (B, T).

    Both are float32.
    Logits are divided by `temperature`, the one that sampled. Padding gets a finite meaningless
    number: mask it. The log-probs are differentiable.
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
    """The same from `completion_states`: the LM head over (B, T, H) in tiles; each (B, T)."""
    tokens = states.shape[1]
    head = backbone.causal.get_output_embeddings()
    softcap, scale = _logit_transform(backbone.causal.config.get_text_config())
    logprobs, entropy = logprobs_and_entropy(
        states.reshape(-1, states.shape[-1]),
        head.weight,
        head.bias,
        input_ids[:, -tokens:].reshape(-1),
        Transform(temperature, softcap, scale),
        entropy_gradient,
    )
    shape = (input_ids.shape[0], tokens)
    return logprobs.reshape(shape).float(), entropy.reshape(shape).float()


def token_values(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    tokens: int,
    role: str = "value",
    trunk_states: Tensor | None = None,
) -> Tensor:
    """V of the state *before* each of the last `tokens` ids, in float32; (B, T)."""
    states = completion_states(backbone, input_ids, attention_mask, tokens, trunk_states)
    return values_of(backbone, states, role)


def values_of(backbone: Backbone, states: Tensor, role: str = "value") -> Tensor:
    """The same from `completion_states`; (B, T) float32."""
    values: Tensor = backbone.head(role)(states.float()).squeeze(-1)
    return values


def last_token_scores(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    role: str,
    trunk_states: Tensor | None = None,
) -> Tensor:
    """Raw score of each row, read at its last valid token by length; (B,) float32."""
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
        index: Where each stands in the order that was given.
        ids: (B, L), as `mask`.
        tokens: T, of the longest completion.
        states: (B, L, H) that leave the trunk, where they were given.
    """

    index: list[int]
    ids: Tensor
    mask: Tensor
    tokens: int
    states: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, int]:
        """As `completion_states` takes them."""
        return self.ids, self.mask, self.tokens

    def scatter(self, found: Tensor, episodes: Sequence[Episode], out: list[Tensor]) -> None:
        """Put each row of (B, T) where its episode stands, without padding.

        Nothing predicts the first token of an empty prompt's completion: there it is left out.
        """
        for row, i in zip(found, self.index, strict=True):
            predicted = len(episodes[i][1]) - (not episodes[i][0])
            out[i] = row[self.tokens - predicted :]


def by_length(episodes: Sequence[Episode]) -> list[int]:
    """Where the episodes stand, the shortest first."""
    return sorted(range(len(episodes)), key=lambda i: len(episodes[i][0]) + len(episodes[i][1]))


def batch(
    backbone: Backbone,
    episodes: Sequence[Episode],
    index: Sequence[int],
    states: Sequence[Tensor] | None = None,
) -> Batch:
    """These episodes as one batch."""
    rows = [episodes[i][0] + episodes[i][1] for i in index]
    ids, mask = pad_left(rows, backbone.tokenizer.pad_token_id)
    tokens = min(max(len(episodes[i][1]) for i in index), ids.shape[1] - 1)
    given = None
    if states is not None:
        given = trunk.pad([states[i] for i in index], ids.shape[1]).to(backbone.device)
    return Batch(list(index), ids.to(backbone.device), mask.to(backbone.device), tokens, given)


def for_each_batch(
    backbone: Backbone,
    episodes: Sequence[Episode],
    size: int,
    states: Sequence[Tensor] | None,
    visit: Callable[[Batch], None],
) -> None:
    """Show every episode to `visit`, short ones first: no row is padded beyond those beside it.

    Where memory runs out the rest, and what was being visited, comes in smaller batches.
    """
    backbone.backoff.for_each_batch(
        "scoring",
        by_length(episodes),
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
    """Raw reward of each episode by a reward role (without its offset), in the order given.

    Args:
        backbone: With that role.
        episodes: Ids of prompt and completion.
        role: Which reward.
        batch_size: Episodes at once.
        states: (L, H) of each episode that leave the trunk, where they are known.
    """
    out = [0.0] * len(episodes)

    def visit(batch: Batch) -> None:
        found = last_token_scores(backbone, batch.ids, batch.mask, role, batch.states)
        for i, score in zip(batch.index, found.tolist(), strict=True):
            out[i] = score

    with backbone.role(role):
        for_each_batch(backbone, episodes, batch_size, states, visit)
    return out


@torch.no_grad()
def episode_logprobs(
    backbone: Backbone,
    episodes: Sequence[Episode],
    role: str | None,
    batch_size: int = 32,
    temperature: float = 1.0,
    states: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Log-probs of each completion's tokens, (t,) float32 each, in the order given."""
    out: list[Tensor] = [torch.empty(0)] * len(episodes)

    def visit(batch: Batch) -> None:
        found, _ = completion_logprobs(backbone, *batch.inputs, temperature, batch.states)
        batch.scatter(found, episodes, out)

    with backbone.role(role):
        for_each_batch(backbone, episodes, batch_size, states, visit)
    return out


@torch.no_grad()
def episode_values(
    backbone: Backbone,
    episodes: Sequence[Episode],
    batch_size: int = 32,
    states: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """V before each of a completion's tokens, (t,) float32 each, in the order given."""
    out: list[Tensor] = [torch.empty(0)] * len(episodes)

    def visit(batch: Batch) -> None:
        found = token_values(backbone, *batch.inputs, trunk_states=batch.states)
        batch.scatter(found, episodes, out)

    with backbone.role("value"):
        for_each_batch(backbone, episodes, batch_size, states, visit)
    return out


def sequence_logprobs(
    backbone: Backbone,
    episodes: Sequence[Episode],
    role: str | None,
    batch_size: int = 32,
    temperature: float = 1.0,
) -> list[float]:
    """Log-probability of each completion given its prompt, in nats, summed over its tokens."""
    found = episode_logprobs(backbone, episodes, role, batch_size, temperature or 1.0)
    return [float(row.double().sum()) for row in found]


def _logit_transform(config: Any) -> tuple[float | None, float]:
    """Soft cap and scale that some architectures give their logits (Gemma 2, Cohere, Granite)."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    if scale is None and getattr(config, "logits_scaling", None):
        scale = 1 / config.logits_scaling
    return softcap, 1.0 if scale is None else scale
