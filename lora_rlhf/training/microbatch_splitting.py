# SPDX-License-Identifier: Apache-2.0
"""A micro-batch in pieces: forward and backward of one after the other, with the same gradient.

Left of TRL's trainers. Where memory runs out, in the forward or in the backward, the gradients are
put back to what they were before the micro-batch, and it is done again in pieces half as large. For
that the gradient is taken where the loss is computed, not after it.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_rlhf.errors import MemoryLimitError
from lora_rlhf.runtime.oom import BatchSizeBackoff, tried

T = TypeVar("T")

_Base: Any = object
"""The trainers of TRL that `InPieces` stands before have no common class that mypy knows."""


class InPieces(_Base):
    """A trainer whose micro-batches can be cut; stands left of TRL's class.

    Attributes:
        halving: Says into how many rows; without it a lack of memory raises.
        micro_batch: The inputs of the loss at hand, whole.
    """

    halving: BatchSizeBackoff | None = None
    micro_batch: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, its gradient added to the parameters here, in pieces where memory ran out.

        What is returned has no graph: Trainer's backward of it adds nothing. Evaluation is TRL's.
        """
        if return_outputs or not torch.is_grad_enabled():
            return self.whole_loss(model, inputs, return_outputs, num_items_in_batch)
        self.micro_batch = inputs
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:  # as Trainer.training_step decides it
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        window = 1 if scaled else self.current_gradient_accumulation_steps

        def step(piece: Any) -> Tensor:
            loss = self.whole_loss(model, piece, False, num_items_in_batch)
            if piece is not inputs:
                loss = loss * self.share(piece, inputs, num_items_in_batch)
            with torch.autocast(self.args.device.type, enabled=False):
                self.accelerator.backward(loss if window == 1 else loss / window)
            return loss.detach()  # type: ignore[no-any-return]

        cut = functools.partial(self.part, inputs)
        losses = self.in_pieces(inputs, self.rows(inputs), cut, step, self.moved_by_loss())
        return torch.stack(losses).sum().requires_grad_()

    def whole_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss as TRL computes it, with its graph."""
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def rows(self, inputs: Any) -> int:
        """What a micro-batch can be cut into."""
        return len(inputs["prompt_ids"] if "prompt_ids" in inputs else inputs["input_ids"])

    def part(self, inputs: Any, start: int, stop: int) -> Any:
        """Some rows of a micro-batch; what is said of it as a whole stays."""
        rows = self.rows(inputs)
        return {
            k: v[start:stop] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v
            for k, v in inputs.items()
        }

    def share(self, piece: Any, inputs: Any, num_items_in_batch: Any) -> float:
        """What a piece's loss counts for in that of its micro-batch: 1 where both are sums."""
        return 1.0

    def can_be_cut(self) -> bool:
        """Whether the loss of a micro-batch is the sum of its pieces' shares, and nothing else."""
        return not getattr(self, "aux_loss_enabled", False)  # of a mixture of experts: a mean

    def moved_by_loss(self) -> Iterable[torch.nn.Parameter]:
        """The parameters that the loss has gradients for."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def in_pieces(
        self,
        whole: Any,
        rows: int,
        cut: Callable[[int, int], Any],
        step: Callable[[Any], T],
        parameters: Iterable[torch.nn.Parameter],
    ) -> list[T]:
        """`step`, a forward and backward, on a micro-batch or on its pieces one after the other.

        Where memory runs out, gradients and metrics are put back and the pieces halved.

        Args:
            whole: The micro-batch.
            rows: Of it.
            cut: A piece of it: rows from and to.
            step: Adds the gradient of a piece's share of the loss.
            parameters: All that `step` may add to.

        Raises:
            MemoryLimitError: There is no room for one row.
        """
        limit = self.halving
        parameters = list(parameters)
        before = [None if p.grad is None else p.grad.clone() for p in parameters] if limit else []
        lists = self._metrics["train"]
        noted = {name: len(found) for name, found in lists.items()}
        tokens = getattr(self, "_total_train_tokens", None)

        def run(size: int) -> list[T]:
            with in_one_block(parameters):
                if size >= rows:
                    return [step(whole)]
                return [step(cut(i, min(i + size, rows))) for i in range(0, rows, size)]

        if limit is None:
            return run(rows)
        while True:
            size = limit.rows("training", rows)
            found, why = tried(lambda size=size: run(size))  # type: ignore[misc]
            if found is not None:
                return found
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            for name in list(lists):
                del lists[name][noted.get(name, 0) :]
            if tokens is not None:
                self._total_train_tokens = tokens
            if not self.can_be_cut():
                raise MemoryLimitError(
                    f"memory ran out in training, with {size} rows at once: {why}",
                    expected="room for the micro-batch: this loss is no sum over its rows",
                    remedy="lower per_device_train_batch_size, or take another loss",
                )
            limit.ran_out("training", size, why or "")


@contextlib.contextmanager
def in_one_block(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Let the gradients that a backward makes lie side by side; one that it does not make is None.

    By itself it would leave hundreds of small ones strewn over the room of the activations, none
    of which then fits the next layer's: the heap of a CPU grew by half (docs/decisions/0032).
    CUDA's allocator keeps small and large apart, and there they come as the activations go. On
    the meta device it is told as on a CPU.
    """
    wanted = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is None and parameter.requires_grad:
            if parameter.device.type in ("cpu", "meta"):
                wanted[parameter.dtype, parameter.device].append(parameter)
    lent: list[tuple[torch.nn.Parameter, Tensor, int]] = []
    try:
        for (dtype, device), those in wanted.items():
            _lend(those, dtype, device, lent)
        yield
    finally:
        for parameter, gradient, version in lent:
            if parameter.grad is gradient and gradient._version == version:
                parameter.grad = None


def _lend(
    those: list[torch.nn.Parameter], dtype: torch.dtype, device: torch.device, lent: list[Any]
) -> None:
    """A gradient of zeros each, side by side; `lent` is told of it, and of its version."""
    block = torch.zeros(sum(p.numel() for p in those), dtype=dtype, device=device)
    start = 0
    for parameter in those:
        stop = start + parameter.numel()
        # `data` has a version of its own, which tells whether anything was added to it.
        gradient = block[start:stop].view(parameter.shape).data
        parameter.grad, start = gradient, stop
        lent.append((parameter, gradient, gradient._version))
