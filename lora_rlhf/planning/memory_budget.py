# SPDX-License-Identifier: Apache-2.0
"""Bytes of a recipe on a device: its phases, the worst of them, and what a card must have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

CUDA_CONTEXT = 800 * 2**20
"""Assumed bytes of a GPU that CUDA's context, its kernels and cuBLAS' workspaces take."""

FRAGMENTATION = 0.05
"""Assumed share of the peak that the caching allocator holds beside what tensors use."""


@dataclass(frozen=True)
class Phase:
    """What one phase holds at its peak, in bytes."""

    resident: int
    kv_cache: int = 0
    trunk: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return self.resident + self.kv_cache + self.trunk + self.activations


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on a device.

    Attributes:
        device: cpu or cuda.
        dtype: What the weights are computed in.
        backbone: Bytes of the frozen base.
        roles: Bytes of each role's adapter and head.
        optimizer: Adam's moments of the stage that trains most; half of it are the gradients.
        logits: Of the activations of an update, what the LM head holds.
        phases: In their order.
        sampled: Rows of a rollout that are sampled at once; 0 where there is none.
        micro_batch: per_device_train_batch_size of the policy's updates.
        prompt: Tokens of the longest prompt.
        completion: Tokens of the longest completion of a rollout.
    """

    device: str
    dtype: str
    backbone: int
    roles: dict[str, int]
    optimizer: int
    logits: int
    phases: dict[str, Phase]
    sampled: int
    micro_batch: int
    prompt: int
    completion: int

    @property
    def worst(self) -> str:
        """The phase at which memory peaks."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> int:
        """Bytes at that peak."""
        return self.phases[self.worst].total

    @property
    def needed(self) -> int:
        """Bytes that a card must have: the peak, its fragmentation, and CUDA's own."""
        if self.device == "cpu":
            return self.peak
        return math.ceil(self.peak * (1 + FRAGMENTATION)) + CUDA_CONTEXT

    def as_dict(self) -> dict[str, Any]:
        """For JSON and for the record."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "peak": self.peak,
            "phase": self.worst,
            "needed": self.needed,
            "backbone": self.backbone,
            "roles": self.roles,
            "optimizer": self.optimizer,
            "logits": self.logits,
            "sampled_at_once": self.sampled,
            "micro_batch": self.micro_batch,
            "prompt": self.prompt,
            "completion": self.completion,
            "phases": {
                name: {
                    "resident": p.resident,
                    "kv_cache": p.kv_cache,
                    "trunk_states": p.trunk,
                    "activations": p.activations,
                    "total": p.total,
                }
                for name, p in self.phases.items()
            },
        }


def largest(card: int) -> int:
    """The highest peak, in bytes, whose `needed` a card has."""
    return max(0, int((card - CUDA_CONTEXT) / (1 + FRAGMENTATION)) - 1)
