# SPDX-License-Identifier: Apache-2.0
"""Micro-batches split over processes, and when memory runs out, with the same gradient.

With several processes each computes its own rows of every micro-batch. If memory runs out in the
forward or backward, gradients are restored and the rows repeated in pieces half as large, one after
the other. The backward therefore runs inside `compute_loss`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_rlhf.distributed.world import world
from lora_rlhf.errors import MemoryLimitError
from lora_rlhf.runtime.oom import BatchSizeBackoff, attempt

T = TypeVar("T")

_Base: Any = object
"""Base for mypy, which knows no common class of TRL's trainers."""


class MicrobatchSplitting(_Base):
    """Mixin placed before a TRL trainer whose micro-batches can be split.

    Attributes:
        by_token: Metrics that are means over tokens; the others are means over rows.
        backoff: Determines the rows of a piece; without it, running out of memory raises.
        micro_batch: The whole inputs of the current loss.
    """

    by_token: frozenset[str] = frozenset({"entropy", "mean_token_accuracy"})
    backoff: BatchSizeBackoff | None = None
    micro_batch: Any = None
    _pieces = 0  # of this optimizer step

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
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)
        if world().size > 1:
            loss = torch.stack([part.to(loss) for part in world().gathered(loss.cpu())]).sum()
        return loss.requires_grad_()

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

    def metric_weight(self, name: str, piece: Any) -> float:
        """Return the weight of a process's rows in the mean of a metric over the micro-batch."""
        if name not in self.by_token:
            return self.rows(piece)
        masks = [piece[n] for n in ("completion_mask", "attention_mask") if n in piece]
        labels = piece.get("labels")
        return int((labels != -100).sum() if labels is not None else masks[0].sum())

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

        With several processes each takes its rows, and all end with the metrics of the whole. When
        memory runs out, gradients and metrics are restored and the pieces halved.

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
        start, stop = world().block(rows)

        def run(size: int) -> list[T]:
            with in_one_block(parameters), self.own_random_numbers():
                if size >= rows and world().size == 1:
                    return [step(whole)]
                return [step(cut(i, min(i + size, stop))) for i in range(start, stop, size)]

        while True:
            size = limit.rows("training", rows) if limit else rows
            results, why = attempt(lambda size=size: run(size)) if limit else (run(size), None)  # type: ignore[misc]
            if results is not None:
                if world().size > 1:
                    self.share_metrics(cut(start, stop) if start < stop else None, noted, tokens)
                return results
            assert limit is not None
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
    def own_random_numbers(self) -> Iterator[None]:
        """Draw dropout masks of this process, and leave the random state that all share alone."""
        if world().size == 1:
            yield
            return
        self._pieces += 1
        place = f"{self.args.seed} {self.state.global_step} {self._pieces} {world().rank}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "big")
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def share_metrics(self, piece: Any, noted: dict[str, int], tokens: int | None) -> None:
        """Replace what the processes noted of their rows by the numbers of the micro-batch."""
        lists = self._metrics["train"]
        mine = {}
        for name, values in lists.items():
            new = values[noted.get(name, 0) :]
            if new and piece is not None:
                mine[name] = (
                    sum(new) / len(new),
                    self.metric_weight(name, piece),
                    min(new),
                    max(new),
                )
        added = self._total_train_tokens - tokens if tokens is not None else 0
        parts = world().gathered((mine, added))
        for name in sorted({name for each, _ in parts for name in each}):
            values = [each[name] for each, _ in parts if name in each]
            total = sum(weight for _, weight, _, _ in values)
            mean = (
                sum(value * weight for value, weight, _, _ in values) / total if total else math.nan
            )
            most, least = max(v[3] for v in values), min(v[2] for v in values)
            ends = {"max": most, "start": most, "min": least}
            end = next((end for end in ends if end in name.replace("/", "_").split("_")), "")
            lists[name][noted.get(name, 0) :] = [ends.get(end, mean)]
        if tokens is not None:
            self._total_train_tokens = tokens + sum(added for _, added in parts)
            if "num_tokens" in lists:
                lists["num_tokens"] = [self._total_train_tokens]


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
