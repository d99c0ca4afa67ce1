# SPDX-License-Identifier: Apache-2.0
"""Smaller batches when memory runs out, with the same result.

All stages of a process share one limit of rows for each kind of pass: `generation` and `scoring`
(prompts and episodes of a forward) and `training` (rows of a forward and backward; the micro-batch
and its gradient stay the same). A limit is halved when a pass does not fit, and never raised again,
since the same pass would fail again an update later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from lora_rlhf.errors import MemoryLimitError, first_line

T = TypeVar("T")

_CUDA_MESSAGES = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
"""Messages of CUDA, cuBLAS and cuDNN that accelerate does not know."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device or the host ran out of memory."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        bool(should_reduce_batch_size(error)) or any(text in str(error) for text in _CUDA_MESSAGES)
    )


def attempt(run: Callable[[], T]) -> tuple[T | None, str | None]:
    """Call `run`; return its result and None, or None and the message if memory ran out.

    The error itself is not returned, because the frames of its traceback hold tensors.
    """
    try:
        return run(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, first_line(error)


class BatchSizeBackoff:
    """Limits of rows at once for each kind of pass on one backbone.

    Attributes:
        limits: Kind -> rows, for kinds that ran out of memory.
        say: Called with a message when a limit is halved.
    """

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self.say: Callable[[str], None] = lambda _: None
        # Called after each batch with its kind and number of rows.
        self.processed: Callable[[str, int], None] = lambda kind, rows: None

    def state_dict(self) -> dict[str, int]:
        """Return the limits for a checkpoint: with other batch sizes, sums round differently."""
        return dict(self.limits)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the limits."""
        self.limits = dict(state)

    def rows(self, kind: str, wanted: int) -> int:
        """Cap `wanted` rows at the limit."""
        return min(wanted, self.limits.get(kind, wanted))

    def halve(self, kind: str, rows: int, why: str) -> None:
        """Halve the limit after `rows` did not fit.

        Raises:
            MemoryLimitError: `rows` is 1.
        """
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        if rows <= 1:
            raise MemoryLimitError(
                f"memory ran out in {kind}, with one row at once: {why}",
                expected="room for one row",
                remedy="make each row, or the model, smaller",
            )
        self.limits[kind] = (rows + 1) // 2
        self.say(
            f"memory ran out in {kind} at {rows} rows ({why:.160}): {self.limits[kind]} at once "
            "from now on, with the same result"
        )

    def call(self, kind: str, wanted: int, run: Callable[[int], T]) -> T:
        """Call `run` with `wanted` rows, or with as many as fit.

        Raises:
            MemoryLimitError: Not even one row fits.
        """
        while True:
            rows = self.rows(kind, max(wanted, 1))
            result, why = attempt(partial(run, rows))
            if why is None:
                return result  # type: ignore[return-value]
            self.halve(kind, rows, why)

    def for_each_batch(
        self, kind: str, items: Sequence[T], size: int, run: Callable[[Sequence[T]], Any]
    ) -> None:
        """Call `run` on all items, at most `size` at once; it may get the same items again.

        Raises:
            MemoryLimitError: Not even one item fits.
        """
        start = 0

        def step(rows: int) -> int:
            run(items[start : start + rows])
            return rows

        while start < len(items):
            rows = self.call(kind, min(size, len(items) - start), step)
            start += rows
            self.processed(kind, rows)
