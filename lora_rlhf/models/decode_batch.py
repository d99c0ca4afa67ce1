# SPDX-License-Identifier: Apache-2.0
"""Prompts that join and leave a batch between two tokens, each with its own adapter.

A row's numbers do not depend on its neighbours. Prompts are computed one at a time, in pieces.
Each group of rows (samples of one prompt) has keys and values of its own, and attends to them over
its own length. The linear layers see all rows at once: kernels on a CPU use another order of
summation for few rows than for many. From how many rows it stays the same depends on the processor
and on the shapes, and is measured; a smaller batch is filled up to that.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from lora_rlhf.errors import first_line

from . import sampler
from .base_model import BaseModel
from .stacked_lora import BASE, StackedLora

ROWS = (4, 8, 16, 32)
"""Rows to which a batch may be filled up; the fewest with which a row's numbers stay the same."""

PIECE = 512
"""Tokens of a prompt that are computed at once, so that other answers go on in between."""

_NAME, _GROWTH = "lora_rlhf_groups", 256
_CHECK = 24  # tokens of the comparison with one whole forward
_NOW = threading.local()  # `cache` of the forward in this thread; other engines have other threads


@dataclass
class Group:
    """Samples of one prompt, all of one length.

    Attributes:
        adapter: PEFT's name, or `BASE`.
        rows: Samples that are still growing.
        length: Tokens in the cache.
        kv: Keys and values of each layer, (2, rows, heads, capacity, width).
        caches: A cache of transformers for each row, where `why_single` says so.
    """

    adapter: str
    prompt: list[int]
    rows: int
    length: int = 0
    kv: list[Tensor] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows."""
        self.rows = len(rows)
        if self.kv:
            index = torch.tensor(rows, device=self.kv[0].device)
            self.kv = [each.index_select(1, index) for each in self.kv]
        self.caches = [self.caches[i] for i in rows] if self.caches else []

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token's keys and values; returns all of the layer, (rows, heads, n, width)."""
        held = self.kv[layer]
        if self.length == held.shape[3]:
            held = self.kv[layer] = nn.functional.pad(held, (0, 0, 0, max(_GROWTH, self.length)))
        held[0, :, :, self.length] = key[:, :, 0]
        held[1, :, :, self.length] = value[:, :, 0]
        keys, values = held.narrow(3, 0, self.length + 1).unbind()
        return keys, values


class _Groups(Cache):  # type: ignore[misc]
    """The cache as the model sees it; keys and values are kept in `_attend`."""

    def __init__(self, groups: Sequence[Group], own: str) -> None:
        super().__init__(layers=[])
        self.groups, self.own, self.layer = groups, own, 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.layer = layer_idx
        return key, value

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0


class DecodeBatch:
    """Computes prompts and next tokens of groups on one base with its adapters.

    Attributes:
        why_single: Why rows are computed one at a time; empty: they are not.
        least_rows: 1 is faster for a row alone on a CPU, and less exact beside others; 0 if no
            number of rows would do.
        kept_tokens: Tokens whose keys and values are kept for the next prompt that begins with
            them, of all adapters together; 0: none. For one conversation only: how long a prompt
            takes tells what came before it, and numbers differ in the last bits.
    """

    def __init__(self, base: BaseModel, adapters: Sequence[str]) -> None:
        self.base, self._stacked = base, StackedLora(base.causal, adapters)
        self._argument = sampler.cache_argument(base.causal)
        self._positions = sampler.takes_positions(base.causal)
        self._original = str(base.causal.config._attn_implementation)
        self.least_rows = 1
        if base.device.type == "cpu":
            self.least_rows = _least_rows(base.causal, self._stacked.weights)
        AttentionInterface.register(_NAME, _attend)
        self.kept_tokens = 0
        self._kept: dict[str, tuple[list[int], list[Tensor]]] = {}  # by adapter, the newest last
        self.why_single = self._tried(adapters)

    def begin(
        self, prompt: Sequence[int], adapter: str, rows: int
    ) -> Iterator[tuple[Group, Tensor]]:
        """Compute a prompt in pieces; yields the group and the logits (V,) after each piece.

        The logits are those of the next token after the last piece.
        """
        group = Group(adapter, list(prompt), rows)
        # Sliding windows are applied by masks here, and by the length of the keys in `_attend`.
        cache = DynamicCache(config=self.base.causal.config) if self.why_single else DynamicCache()
        ids, kept = self._kept.get(adapter, ([], []))
        # Logits come from a forward of the last token at least.
        group.length = len(os.path.commonprefix([ids, group.prompt[:-1]]))
        for layer, held in enumerate(kept if group.length else []):
            cache.update(*held[..., : group.length, :].unbind(), layer)
        while group.length < len(prompt):
            piece = prompt[group.length : group.length + PIECE]
            logits = self._forward([piece], [group.length], [adapter], cache)[0]
            group.length += len(piece)
            if group.length == len(prompt):
                self._fill(group, cache)
            yield group, logits

    def keep(self, group: Group, answer: Sequence[int]) -> None:
        """Keep the keys and values of a group that has ended, for a prompt that begins like it.

        They replace what is kept of its adapter, and the oldest make room.

        Args:
            answer: The sample's tokens, of a group of one; others share only the prompt.
        """
        ids = [*group.prompt, *answer][: group.length]
        if self.why_single or not group.kv or len(ids) > self.kept_tokens:
            return
        self._kept.pop(group.adapter, None)
        while sum(len(i) for i, _ in self._kept.values()) > self.kept_tokens - len(ids):
            del self._kept[next(iter(self._kept))]
        self._kept[group.adapter] = ids, [kv[:, :1, :, : len(ids)].clone() for kv in group.kv]

    def forget(self) -> None:
        """Drop what is kept for later prompts."""
        self._kept.clear()

    def _fill(self, group: Group, cache: Any) -> None:
        if self.why_single:
            group.caches = [cache, *(copy.deepcopy(cache) for _ in range(group.rows - 1))]
            return
        for layer in cache.layers:
            both = torch.stack([layer.keys, layer.values]).expand(-1, group.rows, -1, -1, -1)
            group.kv.append(nn.functional.pad(both, (0, 0, 0, _GROWTH)))

    def step(self, groups: Sequence[Group], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Add a token to each row; returns the logits of the next ones, (all rows, V) float32."""
        if self.why_single:
            rows = [
                self._forward([[token]], [group.length], [group.adapter], cache)
                for group, each in zip(groups, tokens, strict=True)
                for token, cache in zip(each, group.caches, strict=True)
            ]
            logits = torch.cat(rows)
        else:
            logits = self._together(groups, [token for each in tokens for token in each])
        for group in groups:
            group.length += 1
        return logits

    def _together(self, groups: Sequence[Group], tokens: list[int]) -> Tensor:
        starts = [group.length for group in groups for _ in range(group.rows)]
        names = [group.adapter for group in groups for _ in range(group.rows)]
        filled = max(0, self.least_rows - len(tokens))
        ids = [[token] for token in [*tokens, *[0] * filled]]
        cache = _Groups(groups, self._original)
        config = self.base.causal.config
        _NOW.cache = cache
        config._attn_implementation = _NAME
        try:
            logits = self._forward(ids, [*starts, *[0] * filled], [*names, *[BASE] * filled], cache)
        finally:
            config._attn_implementation = self._original
            del _NOW.cache
        return logits[: len(tokens)]

    def _forward(
        self, ids: Sequence[Sequence[int]], starts: Sequence[int], names: Sequence[str], cache: Any
    ) -> Tensor:
        """Compute the logits (B, V) after the last ids; `starts` are the positions of the first."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor(ids, device=self.base.device)}
        if self._positions:
            first = torch.tensor(starts, device=self.base.device).unsqueeze(1)
            inputs["position_ids"] = first + torch.arange(len(ids[0]), device=self.base.device)
        inputs[self._argument] = cache
        with self._stacked.rows(names):
            out = self.base.causal(**inputs, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def logits(self, ids: Sequence[int], adapter: str, count: int) -> Tensor:
        """Compute the logits after the last `count` ids of a row, (count, V) float32."""
        row = torch.tensor([ids], device=self.base.device)
        with self._stacked.rows([adapter]):
            out = self.base.causal(input_ids=row, use_cache=False, logits_to_keep=count)
        logits: Tensor = out.logits[0].float()
        return logits

    @torch.inference_mode()
    def _tried(self, adapters: Sequence[str]) -> str:
        """Compare tokens of a batch with whole forwards; returns why batches cannot be used."""
        causal = self.base.causal
        if not self.least_rows:
            return "on this processor a row's numbers depend on the rows beside it"
        if not getattr(causal, "_supports_attention_backend", False):
            return f"{type(causal).__name__} takes no other attention"
        self.why_single = ""
        names = [BASE, *adapters[-1:]]
        prompt = [7 + 3 * i % 40 for i in range(_CHECK)]
        try:
            groups = []
            for i, name in enumerate(names):
                for group, _ in self.begin(prompt[: _CHECK - 2 - i], name, 2):
                    groups.append(group)
            for _ in range(2):
                tokens = [[prompt[group.length]] * group.rows for group in groups]
                got = self.step(groups, tokens)
            wanted = [self.logits(prompt[: group.length], group.adapter, 1)[0] for group in groups]
        except Exception as error:  # an architecture with another idea of a cache
            return f"{type(causal).__name__} cannot: {first_line(error)}"
        expected = torch.stack([row for row in wanted for _ in range(2)])
        tolerance = 1e-3 if causal.dtype == torch.float32 else 0.05
        worst = float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        return "" if worst < tolerance else f"the logits of a batch differ by {worst:.1g}"


@torch.inference_mode()
def _least_rows(causal: Any, adapters: Sequence[Tensor]) -> int:
    """Return the fewest of `ROWS` beside which every product gives a row what it gives beside more.

    0: beside none of them. Products of one kind and shape are tried once.
    """
    products: dict[tuple[Any, ...], tuple[Callable[[Tensor], Tensor], int, torch.dtype]] = {}
    for name, layer in causal.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and "lora_" not in name:
            weight = layer.weight
            if isinstance(layer, nn.Linear):  # the shape of packed weights tells only their number
                shape = layer.in_features, layer.out_features
            else:
                shape = layer.nx, layer.nf
            dtype = weight.dtype if weight.is_floating_point() else causal.dtype
            products.setdefault((type(layer), *shape, dtype), (layer, shape[0], dtype))
    for weight in adapters:
        product = functools.partial(nn.functional.linear, weight=weight)
        products.setdefault((*weight.shape, weight.dtype), (product, len(weight[0]), weight.dtype))
    candidates = list(ROWS)
    for function, width, dtype in products.values():
        rows = torch.linspace(-1, 1, 4 * ROWS[-1] * width).sin().reshape(-1, 1, width).to(dtype)
        while candidates and not _steady(function, rows, candidates[0]):
            del candidates[0]
    return candidates[0] if candidates else 0


def _steady(function: Callable[[Tensor], Tensor], rows: Tensor, least: int) -> bool:
    """Tell whether the first rows give the same bits beside any more."""
    first = function(rows[:least])
    more = (least + 1, least + 3, 2 * least - 1, 2 * least, 3 * least + 1, len(rows))
    return all(torch.equal(function(rows[:count])[:least], first) for count in more)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend each group's rows to its own keys: an attention function of transformers."""
    cache: _Groups = _NOW.cache
    window = options.get("sliding_window")
    outs, row = [], 0
    for group in cache.groups:
        rows = slice(row, row + group.rows)
        keys, values = group.append(cache.layer, key[rows], value[rows])
        if window is not None and keys.shape[2] > window:
            keys, values = keys[:, :, -window:], values[:, :, -window:]
        outs.append(_one(module, query[rows], keys, values, options, cache.own))
        row += group.rows
    if row < len(query):
        outs.append(outs[0].new_zeros(len(query) - row, *outs[0].shape[1:]))
    return torch.cat(outs), None


def _one(
    module: Any, query: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any], own: str
) -> Tensor:
    """Attend one token of each row to all keys; (rows, 1, heads, width)."""
    if own != "sdpa":
        eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
        function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
        out: Tensor = function(module, query, keys, values, None, **options)[0]
        return out
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, keys.shape[1], -1, width)  # heads that share a key
    out = nn.functional.scaled_dot_product_attention(
        grouped, keys, values, scale=options.get("scaling")
    )
    return out.reshape(rows, heads, 1, -1).transpose(1, 2)
