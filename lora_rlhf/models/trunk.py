# SPDX-License-Identifier: Apache-2.0
"""The frozen trunk: the layers below the lowest adapted one, which are equal for all roles.

With `lora.top_fraction` below 1 the trunk runs once per rollout; policy, reference, rewards and
value, and every PPO epoch, start from its kept states. Inside a context the `forward` of the lower
layers returns its input, and that of the last one returns the kept states, so that masks,
positions, PEFT, checkpointing, 4-bit and `layers` work as before.

B rows, L tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .base_model import BaseModel


def depth(base: BaseModel) -> int:
    """Count the layers below the lowest adapted one; 0: there is no trunk."""
    return base.adapted_layers[0]


@contextlib.contextmanager
def start_from(base: BaseModel, states: Tensor | None) -> Iterator[None]:
    """Start from these trunk states (B, L, H); None: from the tokens.

    The embedding still runs, because masks and positions depend on its shape.
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
    """Compute the trunk only; the layers above it return their input."""
    with replaced((layer, _pass_on) for layer in base.layers[depth(base) :]):
        yield


@contextlib.contextmanager
def top_tokens(base: BaseModel, count: int) -> Iterator[None]:
    """Compute the top layer's MLP for the last `count` tokens only: its other outputs are not read.

    The MLP is three quarters of the layer's work, and prompts are often half of the tokens. Does
    nothing if the layer is checkpointed, because its recomputation runs after this context, or if
    the architecture does not call its MLP `mlp`.
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
        out = own(states[:, -count:].contiguous(), *args, **kwargs) if skipped > 0 else None
        if not isinstance(out, Tensor):  # a mixture of experts returns its router's logits too
            return own(states, *args, **kwargs)
        return nn.functional.pad(out, (0, 0, skipped, 0))

    with replaced([(mlp, forward)]):
        yield


@contextlib.contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states that enter a layer, one tensor per forward."""
    states: list[Tensor] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(_pass_on(*args, **kwargs).detach())

    with layer.register_forward_pre_hook(keep, with_kwargs=True):
        yield states


def _pass_on(*args: Any, **kwargs: Any) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


@contextlib.contextmanager
def replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
    """Replace the `forward` of modules inside the context; restores earlier overrides."""
    overrides = [(module, module.__dict__.get("forward"), forward) for module, forward in forwards]
    for module, _, forward in overrides:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, own, _ in overrides:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own
