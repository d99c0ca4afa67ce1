# SPDX-License-Identifier: Apache-2.0
"""LoRA added in place: the same function as PEFT's layer, with fewer passes over its output.

PEFT computes W x, then B A x, scales it and adds it: three tensors as large as the output, and as
many again in backward. Here the low-rank product is accumulated into the output, and its gradient
into the gradient of the input, by the matrix product itself. It differs from PEFT's by roundings.

Only for plain float32 layers: quantised ones and other dtypes keep PEFT's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from .backbone import Backbone


@contextlib.contextmanager
def lora(backbone: Backbone) -> Iterator[None]:
    """Compute like this inside the context, whichever role is active."""
    layers = [m for m in backbone.decoder.modules() if _plain(m)]
    for layer in layers:
        layer.__dict__["forward"] = _forward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _plain(layer: nn.Module) -> bool:
    """Whether this is LoRA on a frozen float32 `nn.Linear`, and nothing more."""
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear:
        return False
    weight = layer.base_layer.weight
    return weight.dtype == torch.float32 and not weight.requires_grad and not layer.lora_variant


def _forward(layer: Any) -> Any:
    own, base = layer.forward, layer.base_layer

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = layer._active_adapter
        if args or kwargs or len(active) != 1 or x.dtype != torch.float32 or layer.disable_adapters:
            result: Tensor = own(x, *args, **kwargs)
            return result
        name = active[0]
        if name not in layer.lora_A:
            return nn.functional.linear(x, base.weight, base.bias)
        return _Product.apply(  # type: ignore[no-any-return]
            x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight,
            layer.scaling[name],
        )  # fmt: skip

    return forward


class _Product(torch.autograd.Function):
    """W x + b + s B A x, W and b frozen. N rows, I and O features in and out, rank r."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        rows_ni = x.reshape(-1, x.shape[-1])
        low_nr = rows_ni @ a.t()
        out_no = nn.functional.linear(rows_ni, weight, bias)
        out_no.addmm_(low_nr, b.t(), alpha=s)
        ctx.save_for_backward(rows_ni, low_nr, weight, a, b)
        ctx.s, ctx.shape = s, x.shape
        return out_no.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ni, low_nr, weight, a, b = ctx.saved_tensors
        grad_no = grads[0].reshape(-1, weight.shape[0])
        back_nr = (grad_no @ b).mul_(ctx.s)
        by_x = by_a = by_b = None
        if ctx.needs_input_grad[0]:
            by_x = (grad_no @ weight).addmm_(back_nr, a).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            by_a = back_nr.t() @ rows_ni
        if ctx.needs_input_grad[4]:
            by_b = (grad_no.t() @ low_nr).mul_(ctx.s)
        return by_x, None, None, by_a, by_b, None
