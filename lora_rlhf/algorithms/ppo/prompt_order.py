# SPDX-License-Identifier: Apache-2.0
"""The order of a training's prompts, known one rollout ahead."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch

from lora_rlhf._trl import RepeatSampler


class PromptOrder(torch.utils.data.Sampler[int]):
    """TRL's sampler, which also tells the prompts of the next rollout; the order is the same.

    Args:
        sampler: Yields each rollout's prompts once for every micro-batch that is trained on them.
    """

    def __init__(self, sampler: RepeatSampler) -> None:
        self._sampler, self._epoch = sampler, _copied(sampler)

    @property
    def generator(self) -> torch.Generator | None:
        """The random state of the next epoch; a checkpoint holds and restores it."""
        return getattr(self._sampler, "generator", None)

    def __iter__(self) -> Iterator[int]:
        self._epoch = _copied(self._sampler)
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)

    def following(self, update: int) -> list[int]:
        """Return the rows of the rollout after that of `update`, in this epoch or the next one."""
        chunk = self._sampler.batch_size * self._sampler.mini_repeat_count
        rollouts = len(self) // (chunk * self._sampler.repeat_count)
        start = (update % rollouts + 1) * chunk * self._sampler.repeat_count
        again = _copied(self._epoch)
        both = itertools.chain.from_iterable(iter(again) for _ in range(2))
        return list(itertools.islice(both, start, start + chunk))


def _copied(sampler: RepeatSampler) -> RepeatSampler:
    """Copy a sampler with its random state, and without its data."""
    made = copy.copy(sampler)
    if getattr(sampler, "generator", None) is not None:
        made.generator = sampler.generator.clone_state()
    return made
