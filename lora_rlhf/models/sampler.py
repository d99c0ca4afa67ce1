# SPDX-License-Identifier: Apache-2.0
"""Plain sampling from a causal language model: no top-k, no top-p, no processor of any kind.

Beside the tokens it keeps what a rollout would have to compute again: the log-prob of every token
under the distribution that it was drawn from, and the states that enter one of the layers (those
of the frozen trunk). Rows that have ended leave the batch, so a long answer does not make the short
ones pay; transformers' `generate` gives neither, and pads ended rows until the last one ends.

B prompts at once, P tokens of the longest, t of one completion, H hidden size.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from . import trunk
from .base_model import BaseModel, pad_left

_LEAVE = 0.125
"""Ended share of a batch from which its rows are taken out: that copies the cache of the rest."""


@dataclass
class Sampled:
    """One completion, without padding.

    Attributes:
        ids: Tokens, the eos included where it came.
        logprobs: (t,) float32, of each token at the sampling temperature.
        states: (prompt + t, H) that leave the trunk, where they are kept.
    """

    ids: list[int]
    logprobs: Tensor
    states: Tensor | None = None


@dataclass
class _Row:
    """A row of the batch while it grows."""

    prompt: int
    uniform: Tensor
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
) -> list[Sampled]:
    """A completion for each prompt by whatever is active, in the order given.

    Args:
        base: The model and its tokenizer.
        prompts: Ids of each prompt.
        max_new_tokens: Longest completion.
        temperature: 0 is greedy.
        batch_size: Prompts at once; those of similar length go together. Default: as many as the
            memory holds.
        seed: Of the sampling, which then leaves the global random state as it was; None: draw from
            that.
        keep_states: Whether to keep the states that leave the trunk.
    """
    out: list[Sampled | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = max(map(len, prompts), default=0) + max_new_tokens
    size = batch_size or rows_that_fit(base, longest, len(prompts))
    was_training = base.causal.training
    base.causal.eval()
    try:
        with _seeded(seed, base.device):
            for start in range(0, len(order), size):
                index = order[start : start + size]
                # All of a row's uniforms at once: who else is in the batch, or leaves it, changes
                # nothing for a row; nor does it, where memory runs out, in smaller batches.
                uniform = torch.rand(len(index), max_new_tokens)

                def run(part: Sequence[tuple[int, Tensor]]) -> None:
                    rows = [list(prompts[i]) for i, _ in part]
                    uniforms = torch.stack([u for _, u in part])
                    growing = _Batch(base, rows, uniforms, temperature, keep_states)
                    for (i, _), row in zip(part, growing.run(), strict=True):
                        states = torch.cat(row.states) if row.states else None
                        out[i] = Sampled(row.ids, torch.tensor(row.logprobs), states)

                drawn = list(zip(index, uniform, strict=True))
                base.backoff.for_each_batch("generation", drawn, len(drawn), run)
    finally:
        base.causal.train(was_training)
    return [found for found in out if found is not None]


def rows_that_fit(base: BaseModel, tokens: int, wanted: int) -> int:
    """How many rows of this length the KV cache has room for, at most `wanted`; on a CPU all."""
    if base.device.type != "cuda" or not wanted:
        return max(wanted, 1)
    free, _ = torch.cuda.mem_get_info(base.device)
    return max(1, min(wanted, int(0.8 * free // (tokens * kv_bytes(base.causal)))))


def kv_bytes(causal: PreTrainedModel) -> int:
    """Bytes of keys and values of one token in all layers; sliding windows counted as whole."""
    config = causal.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * causal.dtype.itemsize)


class _Batch:
    """Prompts that are sampled together: prefill, then one token a step for each row.

    A row *ends* with its eos or at the longest; it is *done* once nothing of it is asked for: where
    states are kept, its last token still has to pass through the trunk.
    """

    def __init__(
        self,
        base: BaseModel,
        prompts: list[list[int]],
        uniform: Tensor,
        temperature: float,
        keep_states: bool,
    ) -> None:
        self.base, self.longest, self.temperature = base, uniform.shape[1], temperature
        self.keep_states = keep_states
        uniforms = uniform.to(base.device)
        self.rows = [_Row(len(p), u) for p, u in zip(prompts, uniforms, strict=True)]
        self.eos = set(base.eos_ids)
        self.ids, self.mask = (
            x.to(base.device) for x in pad_left(prompts, base.tokenizer.pad_token_id)
        )
        self.cache = DynamicCache(config=base.causal.config)
        names = inspect.signature(type(base.causal).forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # until 5.23
        self._takes_positions = "position_ids" in names

    def run(self) -> list[_Row]:
        """Sample every row to its end; in the order of the prompts."""
        inside = list(self.rows)  # those that are still in the batch, done ones included
        lowest = self.base.layers[trunk.depth(self.base)]
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(trunk.caught(lowest)) if self.keep_states else []
            while True:
                over = all(row.ended for row in inside)
                logits = self._step(only_trunk=over)
                if self.keep_states:
                    _keep(inside, found.pop())
                uniform = torch.stack([row.uniform[len(row.ids) % self.longest] for row in inside])
                tokens, logprobs = draw(logits, self.temperature, uniform)
                drawn = zip(inside, tokens.tolist(), logprobs.tolist(), strict=True)
                for row, token, logprob in drawn:
                    self._grow(row, token, logprob)
                if all(row.done for row in inside):
                    return self.rows
                inside, tokens = self._take_out(inside, tokens)
                self.ids = tokens.unsqueeze(1)
                self.mask = torch.cat([self.mask, self.mask.new_ones(len(inside), 1)], dim=1)

    def _grow(self, row: _Row, token: int, logprob: float) -> None:
        """Give a row its next token; one that had ended has been fed its last, and is done."""
        if not row.ended:
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.ended = token in self.eos or len(row.ids) == self.longest
            row.done = row.ended and not self.keep_states
        else:
            row.done = True

    def _take_out(self, inside: list[_Row], tokens: Tensor) -> tuple[list[_Row], Tensor]:
        """The batch without its done rows, once they are many: their cache has to be copied."""
        stay = [i for i, row in enumerate(inside) if not row.done]
        if len(inside) - len(stay) < max(1, _LEAVE * len(inside)):
            return inside, tokens
        index = torch.tensor(stay, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        return [inside[i] for i in stay], tokens[index]

    def _step(self, only_trunk: bool) -> Tensor:
        """Logits (B, V) after the last of `ids`, in float32."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "attention_mask": self.mask}
        if self._takes_positions:
            positions = (self.mask.long().cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -self.ids.shape[1] :]
        with trunk.alone(self.base) if only_trunk else contextlib.nullcontext():
            out = self.base.causal(
                **inputs, **{self._cache_name: self.cache}, use_cache=True, logits_to_keep=1
            )
        logits: Tensor = out.logits[:, -1].float()
        return logits


def _keep(rows: list[_Row], states: Tensor) -> None:
    """Give each row its states of one forward, (B, tokens, H): all of its prompt, then one each."""
    for row, mine in zip(rows, states, strict=True):
        if not row.done:
            row.states.append(mine if row.states else mine[len(mine) - row.prompt :])


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row and its log-prob, (B,) each.

    Args:
        logits: (B, V)
        temperature: 0 is greedy.
        uniform: (B,) in [0, 1): each is put through the inverse of its row's distribution.
            torch.multinomial would draw a number for every entry of the vocabulary.
    """
    logprobs = (logits / temperature if temperature else logits).log_softmax(dim=-1)
    if temperature:
        summed = logprobs.exp().cumsum(dim=-1)
        at = uniform.unsqueeze(1) * summed[:, -1:]
        # From the right, an entry of probability 0 is never found.
        tokens = torch.searchsorted(summed, at, right=True).clamp(max=summed.shape[1] - 1)
    else:
        tokens = logprobs.argmax(dim=-1, keepdim=True)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a random state of its own, or from the global one where there is no seed."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
