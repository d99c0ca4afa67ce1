# SPDX-License-Identifier: Apache-2.0
"""Memory plan of a recipe: bytes of each phase, their peak, and the GPU memory needed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

CUDA_CONTEXT = 800 * 2**20
"""Assumed bytes of GPU memory for CUDA's context, its kernels and cuBLAS' workspaces."""

FRAGMENTATION = 0.05
"""Assumed share of the peak that the caching allocator reserves beyond what tensors use."""


LOADED_LATER = 50 * 10**6
"""Bytes of a CPU's process for libraries and rows that a run loads after its plan: 28 to 45 MB were
measured, with freed memory given back (`docs/plan.md`)."""


@dataclass(frozen=True)
class Phase:
    """Bytes that one phase holds at its peak."""

    resident: int
    kv_cache: int = 0
    trunk_states: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.resident + self.kv_cache + self.trunk_states + self.activations


@dataclass(frozen=True)
class Plan:
    """Memory of a recipe on a device, in bytes.

    Attributes:
        device: cpu or cuda.
        dtype: Compute dtype of the weights.
        backbone: The frozen base.
        roles: Adapter and head of each role.
        optimizer: Adam's moments of the stage that trains the most parameters; its gradients take
            half as much.
        logits: Part of an update's activations that the LM head takes.
        sampled_at_once: Rows of a rollout sampled in one batch; 0 without rollouts.
        micro_batch: per_device_train_batch_size of the policy's updates.
        prompt: Tokens of the longest prompt.
        completion: Tokens of the longest completion of a rollout.
        phases: Phases in the order of the run.
    """

    device: str
    dtype: str
    backbone: int
    roles: dict[str, int]
    optimizer: int
    logits: int
    sampled_at_once: int
    micro_batch: int
    prompt: int
    completion: int
    phases: dict[str, Phase]

    @property
    def worst(self) -> str:
        """Name of the phase with the highest peak."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> int:
        """Bytes of the highest peak."""
        return self.phases[self.worst].total

    @property
    def needed(self) -> int:
        """Memory that a GPU needs: the peak, fragmentation, and CUDA's context."""
        if self.device == "cpu":
            return self.peak
        return math.ceil(self.peak * (1 + FRAGMENTATION)) + CUDA_CONTEXT

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON and for the record."""
        head: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        head |= {"peak": self.peak, "phase": self.worst, "needed": self.needed}
        phases = {name: asdict(p) | {"total": p.total} for name, p in self.phases.items()}
        return head | asdict(self) | {"phases": phases}


def largest_peak(capacity: int) -> int:
    """Return the highest peak whose `needed` fits a GPU of `capacity` bytes."""
    return max(0, int((capacity - CUDA_CONTEXT) / (1 + FRAGMENTATION)) - 1)


def format_bytes(count: int) -> str:
    """Format bytes with two decimals, in powers of ten: "1.25 GB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"
