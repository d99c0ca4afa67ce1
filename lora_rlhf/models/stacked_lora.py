# SPDX-License-Identifier: Apache-2.0
"""Rows of one batch under different LoRA adapters, without a loop over the adapters.

All adapters' A stand below each other and all B side by side; a mask keeps, for each row, the
columns of its own adapter. The other columns add exact zeros, so a row's result does not depend on
the adapters of its neighbours.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from . import trunk

BASE = "__base__"
"""PEFT's name for rows without an adapter."""


class StackedLora:
    """The adapters `names` in a model's layers, by PEFT's names.

    Attributes:
        weights: The matrices (out, in) that rows are multiplied by.
    """

    def __init__(self, causal: nn.Module, names: Sequence[str]) -> None:
        self._rows: list[str] = []
        self.weights: list[Tensor] = []
        self._masks: dict[tuple[tuple[str, int], ...], Tensor | None] = {}
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        for module in causal.modules():
            if isinstance(module, LoraLayer):
                if known := [name for name in names if name in _ranks(module)]:
                    self._forwards.append((module, self._forward(module, known)))
            elif isinstance(module, ModulesToSaveWrapper):
                self._forwards.append((module, self._by_peft(module)))

    @contextlib.contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """Run forwards whose rows have these adapters (`BASE`: none)."""
        if list(names) != self._rows:
            self._rows = list(names)
            self._masks.clear()
        with trunk.replaced(self._forwards):
            yield

    def _forward(self, layer: Any, names: list[str]) -> Callable[..., Any]:
        plain = type(layer).__name__ in ("Linear", "Linear4bit", "Linear8bitLt")
        special = any(layer.lora_variant.get(n) or layer.lora_bias.get(n) for n in names)
        if not plain or special or layer.merged:
            return self._by_peft(layer)
        key = tuple((name, int(layer.lora_A[name].weight.shape[0])) for name in names)
        stacked_a = torch.cat([layer.lora_A[name].weight.data for name in names])
        scaled = [layer.lora_B[name].weight.data * layer.scaling[name] for name in names]
        stacked_b = torch.cat(scaled, dim=1)
        self.weights += [stacked_a, stacked_b]
        base = layer.base_layer

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = base(x, *args, **kwargs)
            if (mask := self._mask(key, stacked_a)) is None:
                return out
            if x.dim() == 2:  # OPT's MLP sees rows and tokens as one dimension
                mask = mask.squeeze(1)
            inner = nn.functional.linear(x.to(stacked_a.dtype), stacked_a) * mask
            return (out + nn.functional.linear(inner, stacked_b)).to(out.dtype)

        return forward

    def _by_peft(self, module: nn.Module) -> Callable[..., Any]:
        """PEFT's own mixed batch, for DoRA, embeddings and modules that are saved whole."""
        forward = functools.partial(type(module).forward, module)
        return lambda *args, **kwargs: forward(*args, adapter_names=self._rows, **kwargs)

    def _mask(self, key: tuple[tuple[str, int], ...], like: Tensor) -> Tensor | None:
        """(rows, 1, columns): 1 in the columns of a row's adapter; None if no row has one here."""
        if key not in self._masks:
            columns = [name for name, rank in key for _ in range(rank)]
            rows = [[float(column == name) for column in columns] for name in self._rows]
            mask = torch.tensor(rows, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.unsqueeze(1) if bool(mask.any()) else None
        return self._masks[key]


def _ranks(layer: Any) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}
