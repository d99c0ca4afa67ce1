# SPDX-License-Identifier: Apache-2.0
"""When memory runs out: the same mathematics, fewer rows at once, from then on.

Three kinds of pass have a limit each, which all stages of a process share: `generation` and
`scoring` (prompts and episodes of a forward) and `training` (rows of a forward and backward; the
micro-batch that they are cut from is what it was, and so is its gradient). A limit is halved when a
pass does not fit and never raised again: what has failed once fails again an update later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from lora_rlhf.errors import MemoryLimitError, first_line

T = TypeVar("T")

KINDS = ("generation", "scoring", "training")

_TOLD = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
"""What CUDA, cuBLAS and cuDNN say, beside what accelerate knows."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return bool(should_reduce_batch_size(error)) or any(text in str(error) for text in _TOLD)


def tried(run: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `run` returns, and None; or None, and why there was no memory for it.

    The error is not handed out: its traceback holds every frame, and each frame its tensors.
    """
    try:
        return run(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, first_line(error)


class BatchSizeBackoff:
    """The most rows at once of each kind of pass on one backbone.

    Attributes:
        most: Kind -> rows; a kind that never ran out of memory is not in it.
        say: Tells the user that a limit was halved.
    """

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self.say: Callable[[str], None] = lambda _: None

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint: sums of other batches round otherwise."""
        return dict(self.most)

    def load_state_dict(self, found: dict[str, int]) -> None:
        """Put back what `state_dict` gave."""
        self.most = dict(found)

    def rows(self, kind: str, wanted: int) -> int:
        """How many of `wanted` rows go at once."""
        return min(wanted, self.most.get(kind, wanted))

    def ran_out(self, kind: str, rows: int, why: str) -> None:
        """Half as many from now on.

        Raises:
            MemoryLimitError: It was one row.
        """
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        if rows <= 1:
            raise MemoryLimitError(
                f"memory ran out in {kind}, with one row at once: {why}",
                expected="room for one row",
                remedy="make each row, or the model, smaller",
            )
        self.most[kind] = (rows + 1) // 2
        self.say(
            f"memory ran out in {kind} at {rows} rows ({why:.160}): {self.most[kind]} at once from "
            "now on, with the same result"
        )

    def at_most(self, kind: str, wanted: int, run: Callable[[int], T]) -> T:
        """`run` with `wanted` rows at once, or with as many as there is memory for.

        Raises:
            MemoryLimitError: There is no room for one.
        """
        while True:
            rows = self.rows(kind, max(wanted, 1))
            found, why = tried(lambda rows=rows: run(rows))  # type: ignore[misc]
            if why is None:
                return found  # type: ignore[return-value]
            self.ran_out(kind, rows, why)

    def for_each_batch(
        self, kind: str, items: Sequence[T], size: int, run: Callable[[Sequence[T]], Any]
    ) -> None:
        """`run` on all items, `size` or fewer at once; it may be given the same items again.

        Raises:
            MemoryLimitError: There is no room for one of them.
        """
        start = 0

        def step(rows: int) -> int:
            run(items[start : start + rows])
            return rows

        while start < len(items):
            start += self.at_most(kind, min(size, len(items) - start), step)
