# SPDX-License-Identifier: Apache-2.0
"""PEFT's and transformers' adapted layers with fewer passes over memory, equal up to rounding.

PEFT computes W x, then B A x, scales it and adds it: three tensors as large as the output, and as
many again in backward. Here the matrix product accumulates the low-rank product into the output,
and its gradient into the input's gradient. A gated MLP keeps the outputs of its two projections for
backward and recomputes the rest, instead of keeping two more tensors as wide as the MLP; an RMS
norm keeps its input and one number per row.

Only plain float32 layers are replaced; for quantised ones and other dtypes there is `lean_layers`.
Hooks on the projections of a replaced MLP are not called. docs/log.md has the measured gain.

N rows (batch times tokens), I and O features in and out, r rank, M width of the MLP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from . import lean_layers, sharded_layers, trunk
from .backbone import Backbone

_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"}
"""Classes whose forward is w x / sqrt(mean(x²) + ε), compared in the same test."""


@contextlib.contextmanager
def layers(backbone: Backbone) -> Iterator[None]:
    """Replace the layers' forwards inside the context, whichever role is active."""
    modules: list[Any] = list(backbone.decoder.modules())
    forwards = [(m, _lora(m)) for m in modules if _is_plain(m)]
    if forwards:  # without adapters the outputs stay exact
        forwards += [(m, _mlp(m)) for m in modules if _is_gated(m)]
        norms = [m for m in modules if type(m).__name__ in _NORMS and _is_frozen(m.weight)]
        forwards += [(m, _norm(m)) for m in norms]
    with lean_layers.layers(backbone), trunk.replaced(forwards):
        yield


def _is_frozen(weight: Tensor) -> bool:
    """Tell if this is a plain weight, which no other process holds a part of."""
    here = sharded_layers.of(weight) is None
    return here and weight.dtype == torch.float32 and not weight.requires_grad


def _is_plain(layer: nn.Module) -> bool:
    """Tell if this is LoRA on a frozen float32 `nn.Linear`, without a variant such as DoRA."""
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear:
        return False
    return _is_frozen(layer.base_layer.weight) and not layer.lora_variant


def _is_gated(mlp: Any) -> bool:
    if type(mlp).__name__ not in lean_layers.MLPS or "SiLU" not in type(mlp.act_fn).__name__:
        return False
    return all(
        _is_plain(part) or (type(part) is nn.Linear and _is_frozen(part.weight))
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )


class _Factors(NamedTuple):
    """A layer with its active adapter: W x + b + s B A x, or W x + b if A is None."""

    weight: Tensor  # (O, I)
    bias: Tensor | None
    a: Tensor | None  # (r, I)
    b: Tensor | None  # (O, r)
    s: float


def _factors(layer: Any) -> _Factors | None:
    """Return the layer's factors; None if only PEFT can compute it."""
    if type(layer) is nn.Linear:
        return _Factors(layer.weight, layer.bias, None, None, 0.0)
    active, base = layer._active_adapter, layer.base_layer
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    name = active[0]
    if name not in layer.lora_A:
        return _Factors(base.weight, base.bias, None, None, 0.0)
    if layer.lora_bias[name] or type(layer.lora_dropout[name]) is not nn.Identity:
        return None
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _Factors(base.weight, base.bias, a, b, layer.scaling[name])


def _is_float32(x: Tensor) -> bool:
    """Tell if results computed from `x` are float32 as well."""
    return x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


def _lora(layer: Any) -> Callable[..., Tensor]:
    own = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        factors = _factors(layer)
        if args or kwargs or factors is None or not _is_float32(x):
            return own(x, *args, **kwargs)
        if factors.a is None:
            return nn.functional.linear(x, factors.weight, factors.bias)
        return _Product.apply(x, *factors)  # type: ignore[no-untyped-call]

    return forward


def _mlp(mlp: Any) -> Callable[..., Tensor]:
    own = mlp.forward

    def forward(x: Tensor) -> Tensor:
        parts = [_factors(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        factors = [p for p in parts if p is not None and p.bias is None]
        if len(factors) < len(parts) or not _is_float32(x):
            return own(x)
        scales = tuple(f.s for f in factors)
        tensors = [t for f in factors for t in (f.weight, f.a, f.b)]
        return _Gated.apply(x, scales, *tensors)  # type: ignore[no-untyped-call]

    return forward


def _norm(module: Any) -> Callable[..., Tensor]:
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        if not _is_float32(x):
            return own(x)
        return _RMS.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]

    return forward


def _product(rows_ni: Tensor, factors: _Factors) -> tuple[Tensor, Tensor | None]:
    """Compute the output (N, O) and, for backward, A x (N, r)."""
    weight, bias, a, b, s = factors
    if a is None or b is None:
        return nn.functional.linear(rows_ni, weight, bias), None
    low_nr = rows_ni @ a.t()
    out_no = nn.functional.linear(rows_ni, weight, bias)
    return out_no.addmm_(low_nr, b.t(), alpha=s), low_nr


def _by_factors(
    grad_no: Tensor, rows_ni: Tensor, low_nr: Tensor | None, b: Tensor | None, s: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of A x (N, r), of A and of B."""
    if low_nr is None or b is None:
        return None, None, None
    back_nr = (grad_no @ b).mul_(s)
    return back_nr, back_nr.t() @ rows_ni, (grad_no.t() @ low_nr).mul_(s)


class _Product(torch.autograd.Function):
    """W x + b + s B A x, W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        rows_ni = x.reshape(-1, x.shape[-1])
        out_no, low_nr = _product(rows_ni, _Factors(weight, bias, a, b, s))
        ctx.save_for_backward(rows_ni, low_nr, weight, a, b)
        ctx.s, ctx.shape = s, x.shape
        return out_no.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ni, low_nr, weight, a, b = ctx.saved_tensors
        grad_no = grads[0].reshape(-1, weight.shape[0])
        back_nr, by_a, by_b = _by_factors(grad_no, rows_ni, low_nr, b, ctx.s)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (grad_no @ weight).addmm_(back_nr, a).view(ctx.shape)
        return by_x, None, None, by_a, by_b, None


class _Gated(torch.autograd.Function):
    """down(silu(gate(x)) up(x)), with frozen weights, each with LoRA or without."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Any) -> Tensor:
        (wg, ag, bg), (wu, au, bu), (wd, ad, bd) = (tensors[i : i + 3] for i in (0, 3, 6))
        rows_ni = x.reshape(-1, x.shape[-1])
        gate_nm, low_g = _product(rows_ni, _Factors(wg, None, ag, bg, scales[0]))
        up_nm, low_u = _product(rows_ni, _Factors(wu, None, au, bu, scales[1]))
        inner_nm = nn.functional.silu(gate_nm).mul_(up_nm)
        out_ni, low_d = _product(inner_nm, _Factors(wd, None, ad, bd, scales[2]))
        ctx.save_for_backward(rows_ni, gate_nm, up_nm, low_g, low_u, low_d, *tensors)
        ctx.scales, ctx.shape = scales, x.shape
        return out_ni.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ni, gate_nm, up_nm, low_g, low_u, low_d, *tensors = ctx.saved_tensors
        (wg, ag, bg), (wu, au, bu), (wd, ad, bd) = (tensors[i : i + 3] for i in (0, 3, 6))
        grad_ni = grads[0].reshape(rows_ni.shape)
        active_nm = nn.functional.silu(gate_nm)
        inner_nm = active_nm * up_nm if low_d is not None else up_nm
        back, by_ad, by_bd = _by_factors(grad_ni, inner_nm, low_d, bd, ctx.scales[2])
        del inner_nm
        by_inner = grad_ni @ wd
        if back is not None:
            by_inner.addmm_(back, ad)
        by_up = active_nm.mul_(by_inner)
        by_gate = by_inner.mul_(up_nm)
        torch.ops.aten.silu_backward.grad_input(by_gate, gate_nm, grad_input=by_gate)
        back_g, by_ag, by_bg = _by_factors(by_gate, rows_ni, low_g, bg, ctx.scales[0])
        back_u, by_au, by_bu = _by_factors(by_up, rows_ni, low_u, bu, ctx.scales[1])
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (by_gate @ wg).addmm_(by_up, wu)
            for low, a in ((back_g, ag), (back_u, au)):
                if low is not None:
                    by_x.addmm_(low, a)
            by_x = by_x.view(ctx.shape)
        return by_x, None, None, by_ag, by_bg, None, by_au, by_bu, None, by_ad, by_bd


class _RMS(torch.autograd.Function):
    """w x / sqrt(mean(x²) + ε) over the last dimension, w frozen (1910.07467, eq. 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        by_x = grads[0] * weight
        along = torch.linalg.vecdot(by_x, x).unsqueeze(-1)
        along.mul_(scale.pow(3)).div_(x.shape[-1])
        return by_x.mul_(scale).addcmul_(x, along, value=-1), None, None
