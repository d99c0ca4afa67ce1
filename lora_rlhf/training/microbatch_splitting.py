# SPDX-License-Identifier: Apache-2.0
"""Micro-batches split when memory runs out, with the same gradient.

If memory runs out in the forward or backward of a micro-batch, its gradients are restored and it
is repeated in pieces half as large, one after the other. The backward therefore runs inside
`compute_loss`.
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
from lora_rlhf.runtime.oom import BatchSizeBackoff, attempt

T = TypeVar("T")

_Base: Any = object
"""Base for mypy, which knows no common class of TRL's trainers."""


class MicrobatchSplitting(_Base):
    """Mixin placed before a TRL trainer whose micro-batches can be split.

    Attributes:
        backoff: Determines the rows of a piece; without it, running out of memory raises.
        micro_batch: The whole inputs of the current loss.
    """

    backoff: BatchSizeBackoff | None = None
    micro_batch: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute TRL's loss and add its gradient, in pieces if memory runs out.

        The returned loss has no graph to the model, so Trainer's backward of it adds nothing.
        Without gradients this is TRL's own method.
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
        losses = self.in_pieces(inputs, self.rows(inputs), cut, step, self.loss_parameters())
        return torch.stack(losses).sum().requires_grad_()

    def whole_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute TRL's loss with its graph."""
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def rows(self, inputs: Any) -> int:
        """Count the rows that a micro-batch can be split into."""
        return len(inputs["prompt_ids"] if "prompt_ids" in inputs else inputs["input_ids"])

    def part(self, inputs: Any, start: int, stop: int) -> Any:
        """Select some rows of a micro-batch; entries without rows are kept."""
        rows = self.rows(inputs)
        return {
            k: v[start:stop] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v
            for k, v in inputs.items()
        }

    def share(self, piece: Any, inputs: Any, num_items_in_batch: Any) -> float:
        """Return the weight of a piece's loss in its micro-batch's: 1 if both are sums."""
        return 1.0

    def can_be_split(self) -> bool:
        """Return True if the loss of a micro-batch is the weighted sum of its pieces' losses."""
        # A mixture of experts adds a loss that is not a sum over rows.
        return not getattr(self, "aux_loss_enabled", False)

    def loss_parameters(self) -> Iterable[torch.nn.Parameter]:
        """Return the parameters that get a gradient from the loss."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def in_pieces(
        self,
        whole: Any,
        rows: int,
        cut: Callable[[int, int], Any],
        step: Callable[[Any], T],
        parameters: Iterable[torch.nn.Parameter],
    ) -> list[T]:
        """Run forward and backward on a micro-batch, or on its pieces one after the other.

        When memory runs out, gradients and metrics are restored and the pieces halved.

        Args:
            rows: Number of rows in `whole`.
            cut: Selects the rows from `start` to `stop`.
            step: Adds the gradient of one piece.
            parameters: All whose gradient `step` may change.

        Raises:
            MemoryLimitError: Memory runs out with one row, or the loss cannot be split.
        """
        limit = self.backoff
        parameters = list(parameters)
        before = [None if p.grad is None else p.grad.clone() for p in parameters] if limit else []
        lists = self._metrics["train"]
        noted = {name: len(values) for name, values in lists.items()}
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
            results, why = attempt(lambda size=size: run(size))  # type: ignore[misc]
            if results is not None:
                return results
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            for name in list(lists):
                del lists[name][noted.get(name, 0) :]
            if tokens is not None:
                self._total_train_tokens = tokens
            if not self.can_be_split():
                raise MemoryLimitError(
                    f"memory ran out in training, with {size} rows at once: {why}",
                    expected="room for the micro-batch: this loss cannot be split over its rows",
                    remedy="lower per_device_train_batch_size, or use another loss",
                )
            limit.halve("training", size, why or "")


@contextlib.contextmanager
def in_one_block(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Let a backward write its gradients into one block of memory; unused gradients stay None.

    On a CPU, hundreds of small gradients between the activations fragment the heap, which grew by
    half (docs/decisions/0032). CUDA's allocator separates small and large blocks. The meta device
    is treated as a CPU.
    """
    groups = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is None and parameter.requires_grad:
            if parameter.device.type in ("cpu", "meta"):
                groups[parameter.dtype, parameter.device].append(parameter)
    lent: list[tuple[torch.nn.Parameter, Tensor, int]] = []
    try:
        for (dtype, device), group in groups.items():
            sizes = [p.numel() for p in group]
            block = torch.zeros(sum(sizes), dtype=dtype, device=device)
            for parameter, part in zip(group, block.split(sizes), strict=True):
                # `data` has its own version counter, which shows whether anything was added.
                gradient = part.view(parameter.shape).data
                parameter.grad = gradient
                lent.append((parameter, gradient, gradient._version))
        yield
    finally:
        for parameter, gradient, version in lent:
            if parameter.grad is gradient and gradient._version == version:
                parameter.grad = None
