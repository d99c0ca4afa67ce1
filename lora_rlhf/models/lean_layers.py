# SPDX-License-Identifier: Apache-2.0
"""PEFT's and transformers' layers that keep less for backward, equal to the bit.

In half precision PEFT copies the input of every adapted layer to float32, because the adapters are
float32, and autograd keeps each copy; transformers' norms do the same. Here the half-precision
tensor is kept and copied again in backward. A gated MLP in half precision or in 4 bits keeps the
outputs of its two projections and computes the rest again, instead of keeping two or three more
tensors of its width. The operations and their order are those of the libraries, so outputs and
gradients have the same bits. `fused_layers` replaces plain float32 layers instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from . import trunk
from .backbone import Backbone

_LAYERS = {"Linear", "Linear4bit", "Linear8bitLt"}
"""PEFT's classes whose forward casts the input, applies dropout and calls lora_A."""

MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
"""Classes whose forward is down(act(gate(x)) up(x)); the tests compare each."""

_Gated = Callable[[], tuple[Any, Tensor, Tensor] | None]
"""Gives the activation, gate and up of which the input of a down projection is made."""


@contextlib.contextmanager
def layers(backbone: Backbone) -> Iterator[None]:
    """Replace forwards inside the context, for every role; nothing changes without gradients."""
    half = backbone.causal.dtype != torch.float32
    forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
    uncast: list[Any] = []
    made_by: dict[nn.Module, _Gated] = {}
    modules: list[Any] = list(backbone.decoder.modules())
    for module in modules:
        if half and type(module).__name__.endswith("RMSNorm"):
            forwards.append((module, _recomputed(module.forward)))
        elif type(module).__name__ in MLPS and (half or _is_quantised(module.gate_proj)):
            forward, made_by[module.down_proj] = _mlp(module)
            forwards.append((module, forward))
    for module in modules:
        if (half or module in made_by) and _casts_its_input(module):
            uncast.append(module)
            forwards += [(a, _low(a, made_by.get(module))) for a in module.lora_A.values()]
    before = [layer.cast_input_dtype_enabled for layer in uncast]
    try:
        for layer in uncast:
            layer.cast_input_dtype_enabled = False  # lora_A casts
        with trunk.replaced(forwards):
            yield
    finally:
        for layer, enabled in zip(uncast, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


def _is_quantised(layer: Any) -> bool:
    base = layer.base_layer if isinstance(layer, LoraLayer) else layer
    return not torch.is_floating_point(base.weight)


def _casts_its_input(layer: Any) -> bool:
    """Tell if this is LoRA whose lora_A may get the input as it is: no dropout and no variant."""
    if not isinstance(layer, LoraLayer) or type(layer).__name__ not in _LAYERS:
        return False
    plain = all(type(dropout) is nn.Identity for dropout in layer.lora_dropout.values())
    return plain and not layer.lora_variant and layer.cast_input_dtype_enabled


def _is_recorded(x: Tensor) -> bool:
    """Tell if autograd records this forward, and outside of autocast, which computes otherwise."""
    return torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def _recomputed(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep only the inputs of `own`."""

    def forward(*inputs: Tensor) -> Any:
        if not _is_recorded(inputs[0]):
            return own(*inputs)
        return _Recomputed.apply(own, *inputs)  # type: ignore[no-untyped-call]

    return forward


def _mlp(mlp: Any) -> tuple[Callable[..., Tensor], _Gated]:
    """Return the MLP's forward, and a function that gives the down projection what `x` is of."""
    now: list[tuple[Tensor, Tensor]] = []
    inner = _recomputed(lambda gate, up: mlp.act_fn(gate) * up)

    def forward(x: Tensor) -> Any:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        now.append((gate, up))
        try:
            return mlp.down_proj(inner(gate, up))
        finally:
            now.clear()

    return forward, lambda: (mlp.act_fn, *now[-1]) if now else None


def _low(lora_a: Any, made_by: _Gated | None) -> Callable[..., Tensor]:
    own = lora_a.forward

    def forward(x: Tensor) -> Any:
        if not _is_recorded(x):
            return own(x.to(lora_a.weight.dtype))
        act, *parts = (made_by and made_by()) or (None, x)
        return _Low.apply(x, lora_a.weight, act, *parts)  # type: ignore[no-untyped-call]

    return forward


class _Recomputed(torch.autograd.Function):
    """A function of frozen weights that keeps its inputs only; backward computes it again."""

    @staticmethod
    def forward(ctx: Any, own: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.own = own
        ctx.save_for_backward(*inputs)
        return own(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        inputs = [
            t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needs, strict=True)
        ]
        with torch.enable_grad():
            out = ctx.own(*inputs)
        by_input = iter(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grads))
        return None, *(next(by_input) if n else None for n in needs)


class _Low(torch.autograd.Function):
    """A x in A's precision. Keeps `parts`: x itself, or gate and up, if x is act(gate) up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, act: Any, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(a, *parts)
        ctx.act = act
        return nn.functional.linear(x.to(a.dtype), a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, x, *up = ctx.saved_tensors
        by_x = by_a = None
        if ctx.needs_input_grad[0]:
            by_x = (grads[0] @ a).to(x.dtype)
        if ctx.needs_input_grad[1]:
            x = ctx.act(x) * up[0] if up else x
            by_a = grads[0].flatten(0, -2).t() @ x.flatten(0, -2).to(a.dtype)
        return by_x, by_a, *[None] * (2 + len(up))
