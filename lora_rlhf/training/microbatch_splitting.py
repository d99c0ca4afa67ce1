# SPDX-License-Identifier: Apache-2.0
"""Micro-batches split where memory runs out, with the same gradient.

A micro-batch is tried whole. Where memory runs out in its forward or backward, gradients are put
back to what they were before it, and it is done again in pieces half as large, one after the other.
For that, the gradient is taken where the loss is computed and not after it.
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
"""The TRL trainers after this mixin have no common class that mypy knows."""


class MicrobatchSplitting(_Base):
    """Mixin placed before a TRL trainer whose micro-batches can be split.

    Attributes:
        backoff: Gives the rows of a piece; without it, running out of memory raises.
        micro_batch: The whole inputs of the current loss.
    """

    backoff: BatchSizeBackoff | None = None
    micro_batch: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute TRL's loss and add its gradient, in pieces where memory ran out.

        The loss returned has no graph: Trainer's backward of it adds nothing. Evaluation is TRL's.
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
        """Compute the loss as TRL does, with its graph."""
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def rows(self, inputs: Any) -> int:
        """Count the rows that a micro-batch can be split into."""
        return len(inputs["prompt_ids"] if "prompt_ids" in inputs else inputs["input_ids"])

    def part(self, inputs: Any, start: int, stop: int) -> Any:
        """Take some rows of a micro-batch; entries that belong to all of it stay."""
        rows = self.rows(inputs)
        return {
            k: v[start:stop] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v
            for k, v in inputs.items()
        }

    def share(self, piece: Any, inputs: Any, num_items_in_batch: Any) -> float:
        """Return the weight of a piece's loss in that of its micro-batch: 1 where both are sums."""
        return 1.0

    def can_be_cut(self) -> bool:
        """Return True if the loss of a micro-batch is the weighted sum of its pieces' losses."""
        return not getattr(self, "aux_loss_enabled", False)  # of a mixture of experts: a mean

    def moved_by_loss(self) -> Iterable[torch.nn.Parameter]:
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
        """Run a forward and backward on a micro-batch, or on its pieces one after the other.

        Where memory runs out, gradients and metrics are put back and the pieces halved.

        Args:
            rows: Of the whole micro-batch.
            cut: Takes the rows from one index to another.
            step: Adds the gradient of a piece's part of the loss.
            parameters: All whose gradient `step` may change.

        Raises:
            MemoryLimitError: There is no room for one row.
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
            if not self.can_be_cut():
                raise MemoryLimitError(
                    f"memory ran out in training, with {size} rows at once: {why}",
                    expected="room for the micro-batch: this loss is no sum over its rows",
                    remedy="lower per_device_train_batch_size, or take another loss",
                )
            limit.halve("training", size, why or "")


@contextlib.contextmanager
def in_one_block(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Let a backward put its gradients into one block of memory; those it does not make stay None.

    Hundreds of small gradients between the activations would leave gaps that the next layer's do
    not fit: the heap of a CPU grew by half (docs/decisions/0032). CUDA's allocator keeps small and
    large apart. The meta device is treated as a CPU.
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
                # `data` has a version of its own, which tells whether anything was added to it.
                gradient = part.view(parameter.shape).data
                parameter.grad = gradient
                lent.append((parameter, gradient, gradient._version))
        yield
    finally:
        for parameter, gradient, version in lent:
            if parameter.grad is gradient and gradient._version == version:
                parameter.grad = None
