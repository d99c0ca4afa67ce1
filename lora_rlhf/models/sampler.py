# SPDX-License-Identifier: Apache-2.0
"""Plain sampling from a causal language model, without top-k, top-p or logits processors.

Also keeps values that a rollout would compute again: the log-prob of every token under the
distribution that it was drawn from, and the states that leave the frozen trunk. Rows that have
ended leave the batch. transformers' `generate` returns neither, and pads ended rows until the last
one ends.

B prompts at once, P tokens of the longest, t of one completion, H hidden size.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lora_rlhf.data.padding import pad_left, position_ids
from lora_rlhf.distributed.world import world

from . import decode_graph, trunk
from .base_model import BaseModel
from .decode_graph import DecodeGraph
from .memory import rows_that_fit

_MIN_ENDED = 0.125
"""Share of ended rows from which they are removed; removal copies the other rows' cache."""


@dataclass
class Sampled:
    """One completion, without padding.

    Attributes:
        ids: Tokens, including the eos if one was sampled.
        logprobs: (t,) float32, of each token at the sampling temperature.
        states: Trunk states (prompt + t, H), if they are kept.
    """

    ids: list[int]
    logprobs: Tensor
    states: Tensor | None = None


@dataclass
class _Row:
    """A row of the batch while it is sampled."""

    prompt: int
    uniforms: Tensor
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    ended: bool = False
    done: bool = False


@torch.no_grad()
def sample(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int | None = None,
    seed: int | None = None,
    keep_states: bool = False,
    seeds: Sequence[int] | None = None,
) -> list[Sampled]:
    """Sample a completion of each prompt from the active role, in the order given.

    Several processes share the prompts; each keeps the states of its own.

    Args:
        prompts: Ids of each prompt.
        temperature: 0 is greedy.
        batch_size: Prompts at once, sorted by length. Default: as many as the memory holds.
        seed: Seed of a separate random state; None: use the global one.
        keep_states: Keep the states that leave the trunk.
        seeds: A seed for each prompt, whose answer is then the same beside any other prompts.
    """
    out: dict[int, Sampled] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = max(map(len, prompts), default=0) + max_new_tokens
    own = world().own(len(prompts))
    size = batch_size or rows_that_fit(base.causal, longest, len(own))

    def run(part: Sequence[tuple[int, Tensor]]) -> None:
        rows = [list(prompts[i]) for i, _ in part]
        uniforms = torch.stack([u for _, u in part])
        grown = _Batch(base, rows, uniforms, temperature, keep_states).run()
        for (i, _), row in zip(part, grown, strict=True):
            states = torch.cat(row.states) if row.states else None
            out[i] = Sampled(row.ids, torch.tensor(row.logprobs), states)

    was_training = base.causal.training
    base.causal.eval()
    try:
        with _seeded(seed, base.device):
            # Uniforms drawn up front, so that a sample does not depend on its batch or process.
            if seeds is None:
                uniforms = list(torch.rand(len(order), max_new_tokens))
            else:
                uniforms = [_uniforms(seeds[i], max_new_tokens) for i in order]
            drawn = [(i, u) for i, u in zip(order, uniforms, strict=True) if i in own]
            base.backoff.for_each_batch("generation", drawn, size, run)
    finally:
        base.causal.train(was_training)
    if world().size > 1:
        small = {i: Sampled(one.ids, one.logprobs) for i, one in out.items()}
        out = world().merged(small) | out
    return [out[i] for i in range(len(prompts))]


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


class _Batch:
    """Prompts that are sampled together: prefill, then one token per step and row.

    A row has *ended* with its eos or at the maximal length. It is *done* once no forward needs it:
    if states are kept, its last token still has to pass through the trunk.
    """

    def __init__(
        self,
        base: BaseModel,
        prompts: list[list[int]],
        uniforms: Tensor,
        temperature: float,
        keep_states: bool,
    ) -> None:
        self.base, self.longest, self.temperature = base, uniforms.shape[1], temperature
        self.keep_states = keep_states
        on_device = uniforms.to(base.device)
        self.rows = [_Row(len(p), u) for p, u in zip(prompts, on_device, strict=True)]
        self.eos = set(base.eos_ids)
        ids, mask = pad_left(prompts, base.tokenizer.pad_token_id)
        self.ids, self.mask = ids.to(base.device), mask.to(base.device)
        self.cache = DynamicCache(config=base.causal.config)
        self.graph: DecodeGraph | None = None
        self._cache_name = cache_argument(base.causal)
        self._takes_positions = takes_positions(base.causal)

    def run(self) -> list[_Row]:
        """Sample every row to its end; returns the rows in the order of the prompts."""
        inside = list(self.rows)  # rows in the batch, done ones included
        logits, states = self._step(only_trunk=False)
        if decode_graph.is_possible(self.base, self.cache):
            self.graph = self._captured()
        while True:
            if states is not None:
                _append_states(inside, states)
            uniforms = [row.uniforms[len(row.ids) % self.longest] for row in inside]
            tokens, logprobs = draw(logits, self.temperature, torch.stack(uniforms))
            drawn = zip(inside, tokens.tolist(), logprobs.tolist(), strict=True)
            for row, token, logprob in drawn:
                self._append_token(row, token, logprob)
            if all(row.done for row in inside):
                return self.rows
            if self.graph is not None:  # its rows stay, since another shape is another capture
                logits, states = self.graph.step(tokens)
                continue
            inside, tokens = self._remove_done(inside, tokens)
            self.ids = tokens.unsqueeze(1)
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(inside), 1)], dim=1)
            logits, states = self._step(only_trunk=all(row.ended for row in inside))

    def _captured(self) -> DecodeGraph:
        return DecodeGraph(
            self.base,
            self.cache,
            self.mask,
            self.mask.shape[1] + self.longest,
            cache_name=self._cache_name,
            takes_positions=self._takes_positions,
            keep_states=self.keep_states,
        )

    def _append_token(self, row: _Row, token: int, logprob: float) -> None:
        """Append a row's next token; a row that had ended before is done now."""
        if row.ended:
            row.done = True
            return
        row.ids.append(token)
        row.logprobs.append(logprob)
        row.ended = token in self.eos or len(row.ids) == self.longest
        row.done = row.ended and not self.keep_states

    def _remove_done(self, inside: list[_Row], tokens: Tensor) -> tuple[list[_Row], Tensor]:
        """Remove done rows from the batch once they are many, since it copies the others' cache."""
        stay = [i for i, row in enumerate(inside) if not row.done]
        if len(inside) - len(stay) < max(1, _MIN_ENDED * len(inside)):
            return inside, tokens
        index = torch.tensor(stay, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        return [inside[i] for i in stay], tokens[index]

    def _step(self, only_trunk: bool) -> tuple[Tensor, Tensor | None]:
        """Compute the logits (B, V) after the last of `ids`, in float32, and the trunk states."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "attention_mask": self.mask}
        if self._takes_positions:
            inputs["position_ids"] = position_ids(self.mask)[:, -self.ids.shape[1] :]
        lowest = self.base.layers[trunk.depth(self.base)]
        with (
            trunk.alone(self.base) if only_trunk else contextlib.nullcontext(),
            trunk.inputs_of(lowest)
            if self.keep_states
            else contextlib.nullcontext([None]) as states,
        ):
            out = self.base.causal(
                **inputs, **{self._cache_name: self.cache}, use_cache=True, logits_to_keep=1
            )
        logits: Tensor = out.logits[:, -1].float()
        return logits, states[0]


def cache_argument(causal: nn.Module) -> str:
    """Return the name of the forward's argument for the cache."""
    named = "cache" in inspect.signature(type(causal).forward).parameters
    return "cache" if named else "past_key_values"  # until transformers 5.23


def takes_positions(causal: nn.Module) -> bool:
    """Tell if the forward takes `position_ids`."""
    return "position_ids" in inspect.signature(type(causal).forward).parameters


def _append_states(rows: list[_Row], states: Tensor) -> None:
    """Append each row's states of one forward, (B, tokens, H), without the prompt's padding."""
    for row, mine in zip(rows, states, strict=True):
        if not row.done:
            row.states.append(mine if row.states else mine[len(mine) - row.prompt :])


def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token for each row by inverse transform sampling; tokens and log-probs, (B,) each.

    torch.multinomial would draw a random number for every entry of the vocabulary.

    Args:
        logits: (B, V)
        temperature: 0 is greedy.
        uniforms: (B,) in [0, 1).
    """
    logprobs = (logits / temperature if temperature else logits).log_softmax(dim=-1)
    if temperature:
        summed = logprobs.exp().cumsum(dim=-1)
        at = uniforms.unsqueeze(1) * summed[:, -1:]
        # With right=True, an entry of probability 0 is never drawn.
        tokens = torch.searchsorted(summed, at, right=True).clamp(max=summed.shape[1] - 1)
    else:
        tokens = logprobs.argmax(dim=-1, keepdim=True)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Use a separate random state with this seed; None: the global one."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
