# SPDX-License-Identifier: Apache-2.0
"""Frozen tensors of which each process holds an equal part, put together on demand.

Processes compute passes over their own rows, so they need different blocks at different times, and
not equally often. So nothing is gathered at fixed places. In each *round* every process names the
block that it needs, or says that it waits, and all send the parts that are asked for. A process
that waits in an exchange takes part in rounds until all wait. The bytes are never read as numbers:
4-bit codes that look like NaN stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .world import World, lost_as_error

_ALIGNED = 256
"""Bytes to which tensors in a block are aligned, as by torch's own allocators."""

_WAITS = -1


class Shards:
    """The parts that this process holds.

    Attributes:
        parts: Bytes of each block, (total / processes,) uint8.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self.parts: list[Tensor] = []
        self._world, self._device = world, device
        self._whole: tuple[int, Tensor | None] = (_WAITS, None)
        world.waiting = self.serve

    def add(self, tensors: Sequence[Tensor]) -> tuple[int, list[int]]:
        """Keep this process's part of tensors that all processes have.

        Returns:
            The block's number, and the place of each tensor in it, in bytes.
        """
        places, total = [], 0
        for tensor in tensors:
            places.append(total)
            total += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        size = -(-total // (self._world.size * _ALIGNED)) * _ALIGNED
        block = torch.zeros(size * self._world.size, dtype=torch.uint8)
        for tensor, place in zip(tensors, places, strict=True):
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            block[place : place + len(flat)] = flat
        mine = block[size * self._world.rank :][:size].clone()
        self.parts.append(mine.to(self._device))
        return len(self.parts) - 1, places

    def fetch(self, number: int) -> Tensor:
        """Return a whole block; the last one is kept, until another is fetched.

        Raises:
            SetupError: Another process is gone.
        """
        held, whole = self._whole
        if held != number or whole is None:
            self._whole = _WAITS, None
            del whole
            # Memory may run out here, before the others are told.
            made = self.parts[number].new_empty(self._world.size, len(self.parts[number]))
            self._round(number, made)
            self._whole = number, whole = number, made.view(-1)
        return whole

    def serve(self) -> None:
        """Send parts until no process needs any; called before each exchange."""
        while self._round(_WAITS, None):
            pass

    def _round(self, wanted: int, out: Tensor | None) -> bool:
        """Send and receive the parts of one round; tell if any process needed one."""
        rank, wants = self._world.rank, torch.empty(self._world.size, dtype=torch.int64)
        with lost_as_error():
            dist.all_gather_into_tensor(wants, torch.tensor([wanted]))
            group, moves = self._world.group(self._device), list[Any]()
            for other, number in enumerate(wants.tolist()):
                if other == rank:
                    continue
                if number != _WAITS:
                    moves.append(dist.P2POp(dist.isend, self.parts[number], other, group))
                if out is not None:
                    moves.append(dist.P2POp(dist.irecv, out[other], other, group))
            for work in dist.batch_isend_irecv(moves) if moves else ():
                work.wait()
        if out is not None:
            out[rank] = self.parts[wanted]
        return bool((wants != _WAITS).any())
