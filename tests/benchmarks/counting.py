# SPDX-License-Identifier: Apache-2.0
"""What one update of ours really does: operations and passes by phase, and time by kind of op."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import common
import torch
from torch.utils.flop_counter import FlopCounterMode

_KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "optimizer": ("adam",),
    "copies": ("copy_", "clone", "cat", "contiguous", "_to_copy", "index", "gather", "scatter",
               "fill_", "zero_", "zeros", "empty", "slice_backward", "stack"),
    "log-probs": ("softmax", "logsumexp", "exp", "log", "max", "amax"),
}  # fmt: skip
"""Kind -> names of operators, matched in this order; one with `_` in it is looked for inside."""


def watch(order: str, updates: common.Updates, backbone: Any) -> Any:
    """Something that looks on for one update where `order` asks for it, else None."""
    kinds = {"flops": Operations, "profile": Times}
    return kinds[order](updates, backbone) if order in kinds else None


def _product(_: Any, a: Any, b: Any, **__: Any) -> int:
    """Operations of (m, k) times (k, n), from the two shapes."""
    return int(2 * a[0] * a[1] * b[1])


class Operations:
    """Counts the operations of every phase, and how often tokens pass lowest and highest layer."""

    def __init__(self, updates: common.Updates, backbone: Any) -> None:
        self.updates, self.phase = updates, "train"
        self.flops: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.tokens: dict[str, Counter[str]] = {"lowest": Counter(), "highest": Counter()}
        self.seen = 0
        self.hooks = [
            backbone.layers[at].mlp.register_forward_pre_hook(self._count(name))
            for name, at in (("lowest", 0), ("highest", -1))
        ]
        # torch counts the product that is added to a tensor in place as nothing.
        in_place = {torch.ops.aten.addmm_: _product}
        self.mode = FlopCounterMode(display=False, custom_mapping=in_place)
        self.mode.__enter__()
        updates.heard = self._new_phase

    def _count(self, name: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            self.tokens[name][self.phase] += args[0].shape[0] * args[0].shape[1]

        return hook

    def _new_phase(self, name: str) -> None:
        total = self.mode.get_total_flops()
        self.flops[self.phase] += total - self.seen
        self.phase, self.seen = name, total

    def step(self) -> None:
        """An optimizer step is over."""

    def finish(self) -> dict[str, Any]:
        """`flops` of each phase and `tokens` through the lowest and the highest layer."""
        self._new_phase("train")
        self.mode.__exit__(None, None, None)
        self.updates.heard = None
        for hook in self.hooks:
            hook.remove()
        by_op = {str(k): v for k, v in self.mode.get_flop_counts()["Global"].items()}
        return {
            "flops": dict(self.flops),
            "flops_by_op": by_op,
            "tokens": {k: dict(v) for k, v in self.tokens.items()},
        }


_PROFILED_STEPS = 4
"""Optimizer steps that are profiled: minutes of post-processing would tell nothing more."""


class Times:
    """Profiles scoring and the first optimizer steps: seconds by kind of operator.

    Wall seconds, for the profiler knows no others: of these only shares of the whole are told.
    """

    def __init__(self, updates: common.Updates, _: Any) -> None:
        self.updates, self.steps, self.found = updates, 0, dict[str, Any]()
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        updates.heard = self._new_phase

    def _new_phase(self, name: str) -> None:
        if name == "score":
            self.updates.heard = None
            self.start = time.perf_counter()
            self.profiler.__enter__()

    def step(self) -> None:
        """An optimizer step is over."""
        self.steps += 1
        if self.steps == _PROFILED_STEPS:
            self._stop()

    def _stop(self) -> None:
        seconds = time.perf_counter() - self.start
        self.profiler.__exit__(None, None, None)
        kinds: Counter[str] = Counter()
        events = self.profiler.key_averages()
        for event in events:
            kinds[_kind(event.key)] += event.self_cpu_time_total / 1e6
        slowest = sorted(events, key=lambda e: -e.self_cpu_time_total)[:25]
        self.found = {
            "profiled_seconds": round(seconds, 4),
            "seconds_by_kind": {k: round(s, 4) for k, s in kinds.most_common()},
            "slowest": [[e.key, e.count, round(e.self_cpu_time_total / 1e6, 4)] for e in slowest],
        }

    def finish(self) -> dict[str, Any]:
        """`seconds_by_kind`, and the operators that take longest."""
        if not self.found:
            self._stop()
        return self.found


def _kind(key: str) -> str:
    name = key.removeprefix("aten::").lower()
    for kind, words in _KINDS.items():
        for word in words:
            if name in (word, f"_{word}") or ("_" in word and word in name):
                return kind
    if "adam" in name or name.startswith(("_foreach", "optimizer")):
        return "optimizer"
    return "element-wise and the rest"
