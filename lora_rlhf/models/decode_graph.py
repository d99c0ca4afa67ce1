# SPDX-License-Identifier: Apache-2.0
"""One decoding step of fixed shapes, which CUDA replays as a graph.

One token per row is so little work that a GPU waits for Python to launch it: at 8 rows of an 8B
model most of the time of a step. A CUDA graph launches all kernels of a step at once, but needs
tensors that stay where they are, hence transformers' static cache and a mask over its whole length.

B rows, P tokens of the padded prompts, L of the cache, H hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from . import trunk
from .base_model import BaseModel

DEVICES = ("cuda",)
"""Types of device that sample this way; tests add the CPU, where a step is not captured."""

_WARM_UP = 2
"""Steps before the capture: cuBLAS and bitsandbytes allocate their workspaces in them."""

_TOLERANCE = 0.02
"""Largest difference of a graph's logits from launched ones, as a share of the largest logit."""


def is_possible(base: BaseModel, cache: DynamicCache) -> bool:
    """Tell if a step can be replayed: CUDA, torch's attention, no sliding window, whole layers."""
    return (
        base.device.type in DEVICES
        and base.shards is None
        and base.causal.config.get_text_config()._attn_implementation == "sdpa"
        and all(type(layer) is DynamicLayer for layer in cache.layers)
    )


class DecodeGraph:
    """A step after the prompts: one token per row in, logits and trunk states out.

    It reads the weights where they were when it was made, so it serves one batch of one role.

    Args:
        cache: Keys and values of the prompts; empty afterwards.
        prompt_mask: (B, P), 0 for padding.
        length: L, tokens of the longest row.
        cache_name: Name of the model's argument for the cache.
        takes_positions: The model has an argument `position_ids`.
        keep_states: Also return the states that enter the lowest adapted layer.
    """

    def __init__(
        self,
        base: BaseModel,
        cache: DynamicCache,
        prompt_mask: Tensor,
        length: int,
        *,
        cache_name: str,
        takes_positions: bool,
        keep_states: bool,
    ) -> None:
        rows, self._start = prompt_mask.shape
        self.base, self._cache_name, self._takes_positions = base, cache_name, takes_positions
        self._keep_states = keep_states
        self._cache = StaticCache(config=base.causal.config, max_cache_len=length)
        for layer, grown in zip(self._cache.layers, cache.layers, strict=True):
            layer.lazy_initialization(grown.keys, grown.values)
            layer.keys[:, :, : self._start] = grown.keys
            layer.values[:, :, : self._start] = grown.values
            grown.keys = grown.values = None
        self._ids = prompt_mask.new_zeros(rows, 1)
        self._mask = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=base.device)
        self._positions = prompt_mask.new_zeros(rows, 1)
        self._at = prompt_mask.new_zeros(1)
        self._prompt_mask = prompt_mask
        self._graph: Any = None
        self._rewind()
        if base.device.type == "cuda":
            self._capture()

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Append a token (B,) to every row; returns logits (B, V) and trunk states (B, 1, H).

        The next step overwrites the logits.
        """
        self._ids.copy_(tokens.unsqueeze(1))
        if self._graph is None:
            return self._forward()
        self._graph.replay()
        logits, states = self._out
        return logits, None if states is None else states.clone()

    def _rewind(self) -> None:
        """Go back to the end of the prompts."""
        self._mask.zero_()
        self._mask[:, 0, 0, : self._start] = self._prompt_mask.bool()
        self._positions.copy_(self._prompt_mask.sum(dim=1, keepdim=True))
        self._at.fill_(self._start)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._start)

    def _capture(self) -> None:
        """Capture a step; without a graph that repeats it, steps are launched one by one."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                launched = self._forward()[0].clone()
                self._rewind()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._out = self._forward()
            self._rewind()
            graph.replay()
            apart = float((self._out[0] - launched).abs().max() / launched.abs().max())
            failure = "" if apart < _TOLERANCE else f"its logits differ by {apart:.1%}"
        except RuntimeError as error:  # memory ran out, or a kernel that cannot be captured
            torch.cuda.synchronize()
            failure = str(error)
        self._rewind()
        if failure:
            message = f"sampling is slower without a CUDA graph of its step: {failure}"
            warnings.warn(message, stacklevel=2)
        else:
            self._graph = graph

    def _forward(self) -> tuple[Tensor, Tensor | None]:
        self._mask.index_fill_(3, self._at, True)
        inputs: dict[str, Any] = {
            "input_ids": self._ids,
            "attention_mask": self._mask,
            self._cache_name: self._cache,
        }
        if self._takes_positions:
            inputs["position_ids"] = self._positions
        layer = self.base.layers[trunk.depth(self.base)]
        with trunk.inputs_of(layer) as states:
            out = self.base.causal(**inputs, use_cache=True, logits_to_keep=1)
        self._positions.add_(1)
        self._at.add_(1)
        return out.logits[:, -1].float(), states[0] if self._keep_states else None
