# SPDX-License-Identifier: Apache-2.0
"""The frozen trunk: the layers below the lowest adapted one, one function of the tokens for all.

With `lora.top_fraction` below 1 no role changes what these layers compute. So they run once per
rollout; policy, reference, rewards and value, and every PPO epoch, start from the states that were
kept. For the time of a context the lower layers' own `forward` hands on what it is given and the
last of them returns the kept states: masks, positions, PEFT, checkpointing and 4-bit stay as they
are, and `layers` is left alone.

B rows, L tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base_model import BaseModel


def depth(base: BaseModel) -> int:
    """How many layers lie below the lowest adapted one; 0: there is no trunk."""
    return base.adapted_layers[0]


@contextlib.contextmanager
def kept(base: BaseModel, states: Tensor | None) -> Iterator[None]:
    """Compute from these states (B, L, H), not from the tokens; None: from the tokens.

    The embedding still runs, for what follows from its shape, and is not used.
    """
    if states is None:
        yield
        return
    below = list(base.layers[: depth(base)])
    forwards = [(layer, _pass_on) for layer in below[:-1]]
    forwards += [(layer, lambda *_, **__: states) for layer in below[-1:]]
    with replaced(forwards):
        yield


@contextlib.contextmanager
def alone(base: BaseModel) -> Iterator[None]:
    """Compute the trunk only: the layers above it hand on what they are given."""
    with replaced((layer, _pass_on) for layer in base.layers[depth(base) :]):
        yield


@contextlib.contextmanager
def top_tokens(base: BaseModel, count: int) -> Iterator[None]:
    """Compute the top layer's MLP for the last `count` tokens only: nobody reads the others.

    It is three quarters of the layer's work, and prompts are often half of the tokens. Not where
    the layer is checkpointed, whose second forward comes after this context; nor where the
    architecture does not call it `mlp`.
    """
    top: Any = base.layers[-1]
    mlp = getattr(top, "mlp", None)
    checkpointed = torch.is_grad_enabled() and getattr(top, "gradient_checkpointing", False)
    if mlp is None or checkpointed:
        yield
        return
    own = mlp.forward

    def forward(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        skipped = states.shape[1] - count
        found = own(states[:, -count:].contiguous(), *args, **kwargs) if skipped > 0 else None
        if not isinstance(found, Tensor):  # a mixture of experts has more to say
            return own(states, *args, **kwargs)
        return nn.functional.pad(found, (0, 0, skipped, 0))

    with replaced([(mlp, forward)]):
        yield


@contextlib.contextmanager
def caught(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that enter a layer, one tensor for each forward."""
    found: list[Tensor] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).detach())

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def pad(rows: Sequence[Tensor], width: int) -> Tensor:
    """(B, width, H) from B states of different lengths, padded on the left with zeros."""
    out = rows[0].new_zeros((len(rows), width, rows[0].shape[-1]))
    for i, row in enumerate(rows):
        out[i, width - len(row) :] = row
    return out


def _pass_on(*args: Any, **kwargs: Any) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


@contextlib.contextmanager
def replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
    """With another `forward` of these modules; whatever was there before is put back."""
    found = [(module, module.__dict__.get("forward"), forward) for module, forward in forwards]
    for module, _, forward in found:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, own, _ in found:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own
