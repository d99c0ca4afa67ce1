# SPDX-License-Identifier: Apache-2.0
"""The frozen base over several processes: each holds a part of every layer's matrices.

A layer's matrices are put together when a pass comes to its first one, and dropped when it comes to
another layer, forward and backward. A matrix that is not there reads as NaN, in 4 bits as zeros.
Nothing of the base is saved for backward, which asks for the matrix again. Adapters, heads, norms,
embeddings and the LM head stay whole in every process: put together, the latter would take the same
memory.

O and I: features out of and into a matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_rlhf.distributed.shards import Shards
from lora_rlhf.distributed.world import world
from lora_rlhf.errors import BaseModelError, IdentityError, SetupError
from lora_rlhf.runtime.devices import pick_device

from .base_model import BaseModel
from .memory import held_tensors, tensor_bytes

_LEAST = 0.9
"""Share of a layer's bytes that must be in matrices that can be split."""

_TOLERANCE = 1e-3
"""Largest difference of logits before and after sharding, as a share of the largest logit.

The kernels and their inputs are the same, so it is 0; 4-bit weights that another library damaged
differed by about a hundredth (bitsandbytes#1945).
"""

_TOKENS = 24  # of each of the two rows on which outputs are compared


class Piece:
    """One matrix of a block.

    Attributes:
        module: The module that computes with it.
    """

    def __init__(self, module: Any, shards: Shards, number: int, place: int) -> None:
        self.module, self._shards, self._number, self._place = module, shards, number, place
        data: Tensor = module.weight.data
        self._shape, self._dtype, self._bytes = data.shape, data.dtype, data.nbytes
        nothing = float("nan") if data.is_floating_point() else 0
        one = torch.full((1,), nothing, dtype=data.dtype, device=pick_device())
        self._absent = one.expand(data.shape)
        module.weight.data = self._absent
        module.weight.piece = self  # found by `of`
        self._own: Callable[..., Tensor] = type(module).forward
        module.__dict__["forward"] = self.forward

    def whole(self) -> Tensor:
        """Put the matrix together, as the module holds it; packed in 4 bits."""
        block = self._shards.fetch(self._number)
        return block[self._place :][: self._bytes].view(self._dtype).view(self._shape)

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Give the module its matrix inside the context."""
        weight: Any = self.module.weight
        weight.data = self.whole()
        try:
            yield
        finally:
            weight.data = self._absent

    def forward(self, states: Tensor) -> Tensor:
        """Compute the module's output; no gradient reaches its weights."""
        out: Tensor = _Frozen.apply(states, self)  # type: ignore[no-untyped-call]
        return out

    def computed(self, states: Tensor) -> Tensor:
        """Compute the output as the module itself does."""
        with self.present():
            return self._own(self.module, states)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (O, I), unpacked if it has 4 bits."""
        whole = self.whole()
        if (state := getattr(self.module.weight, "quant_state", None)) is not None:
            from bitsandbytes.functional import dequantize_4bit

            whole = dequantize_4bit(whole, state)
        elif isinstance(self.module, Conv1D):
            whole = whole.t()
        return whole.to(dtype)


class _Frozen(torch.autograd.Function):
    """A linear module with frozen weights that are elsewhere, before and after."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, piece: Piece) -> Tensor:
        ctx.piece = piece
        return piece.computed(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.piece.matrix(grads[0].dtype), None


def of(weight: Any) -> Piece | None:
    """Return the piece of a parameter that is split between processes, else None."""
    piece: Piece | None = getattr(weight, "piece", None)
    return piece


def matrices(layer: nn.Module) -> list[Any]:
    """List the modules of a layer whose matrix can be split, in order."""
    return [m for m in layer.modules() if type(m) in (nn.Linear, Conv1D) or _is_4bit(m)]


def _is_4bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit"


def shard(base: BaseModel) -> str:
    """Split the matrices of a base that lies in the host's memory; move the rest to the device.

    Returns:
        A line about it for people.

    Raises:
        SetupError: There is one process.
        BaseModelError: The base cannot be split.
        IdentityError: Its outputs are not the same afterwards.
    """
    check(base)
    device, shared = pick_device(), world()
    _move_rest(base, device)
    before = _logits(base, device)
    _move_rest(base, device)  # the norms went back to the host with their layers
    shards = Shards(shared, device)
    for layer in base.layers:
        modules = matrices(layer)
        number, places = shards.add([m.weight.data for m in modules])
        for module, place in zip(modules, places, strict=True):
            if (state := getattr(module.weight, "quant_state", None)) is not None:
                state.to(device)
            Piece(module, shards, number, place)
    base.shards = shards
    gap = float((_logits(base, device) - before).abs().max() / before.abs().max())
    wrong = [one for one in shared.gathered(gap) if not one <= _TOLERANCE]  # NaN too
    if wrong:
        raise IdentityError(
            f"model.shard: the base's logits differ by {wrong[0]:.2g} of the largest one after its "
            "layers were split between the processes",
            expected="the same numbers",
            remedy="leave model.shard out; please report it with the base's name and the versions "
            "of torch and bitsandbytes",
        )
    held = sum(part.nbytes for part in shards.parts) / 1e6
    return (
        f"{shared.size} processes, and the base's layers are split: each holds {held:,.1f} of "
        f"{held * shared.size:,.1f} MB; the base's logits are the same as before"
    )


def check(base: BaseModel) -> None:
    """Refuse a base that cannot be split.

    Raises:
        SetupError: `device_map` has spread the base over devices.
        BaseModelError: Its layers hold other weights than linear ones, or share them.
    """
    places = set(map(str, getattr(base.causal, "hf_device_map", {}).values()))
    if len(places) > 1:
        raise SetupError(
            "model.shard splits the base between processes, and the base lies on "
            f"{', '.join(sorted(places))} by a device_map, in one process",
            expected="two or more processes, each with a GPU of its own",
            remedy="start it by torchrun --nproc_per_node 2, or leave model.shard out",
        )
    if reason := why_not(base):
        raise BaseModelError(
            f"model.shard: {reason}",
            expected=f"layers of which {_LEAST:.0%} of the bytes can be split: no mixture of "
            "experts, and no quantisation but 4-bit by bitsandbytes",
            remedy="leave model.shard out, or choose another base",
        )


def why_not(base: BaseModel) -> str:
    """Say why a base's layers cannot be split; empty if they can."""
    inside = [t for layer in base.layers for p in layer.parameters() for t in held_tensors(p)]
    inside += [b for layer in base.layers for b in layer.buffers()]
    taken = [m.weight for layer in base.layers for m in matrices(layer)]
    share = tensor_bytes(t for p in taken for t in held_tensors(p)) / tensor_bytes(inside)
    name = type(base.causal).__name__
    if len({id(p) for p in taken}) < len(taken):
        return f"{name} cannot be split between processes: its layers have weights in common"
    if share < _LEAST:
        kinds = {type(m).__name__ for layer in base.layers for m in layer.modules()}
        return (
            f"{name} cannot be split between processes: {share:.0%} of its layers' bytes are "
            f"plain or 4-bit linear weights; found {', '.join(sorted(kinds)[:8])}"
        )
    return ""


def _move_rest(base: BaseModel, device: torch.device) -> None:
    """Move all but the layers' matrices to the device."""
    taken = {id(m.weight) for layer in base.layers for m in matrices(layer)}
    for module in base.causal.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in taken:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


@torch.no_grad()
def _logits(base: BaseModel, device: torch.device) -> Tensor:
    """Compute logits of a fixed input; whole layers come to the device one at a time."""
    rows = torch.arange(2 * _TOKENS, device=device).view(2, -1) * 7919
    ids = rows % base.causal.config.get_text_config().vocab_size
    with contextlib.ExitStack() as stack:
        if base.shards is None and device.type != "cpu":
            for layer in base.layers:
                come = layer.register_forward_pre_hook(lambda m, _: m.to(device) and None)
                go = layer.register_forward_hook(lambda m, *_: m.to("cpu") and None)
                stack.callback(come.remove)
                stack.callback(go.remove)
        logits: Tensor = base.causal(ids, use_cache=False).logits.float()
    return logits
