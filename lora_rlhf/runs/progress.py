# SPDX-License-Identifier: Apache-2.0
"""The progress line of a run, for people."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lora_rlhf.redaction import safe

_ROLLOUTS = ("reward/score", "rewards/gold", "kl/sequence", "completions/length")
_SHOWN = {
    "sft": ("loss",),
    "reward": ("loss", "accuracy"),
    "held_out": ("loss", "accuracy"),
    "ppo": _ROLLOUTS,
    "grpo": _ROLLOUTS,
    "rloo": _ROLLOUTS,
    "dpo": ("loss", "accuracy", "margin"),
}
_PLAIN_SECONDS = 15.0


class Progress:
    """Step, phase, rate and time left: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True)
        self._live: Live | None = None
        self.stage, self.phase_name, self.total, self.step_count = "", "", 0, 0
        self._last_printed = -1  # step
        self._shown: dict[str, float] = {}
        self._started = self._printed = time.monotonic()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        if not self.quiet:
            self.console.print(safe(text), highlight=False, markup=False)

    def begin(self, stage: str, total: int) -> None:
        """Start a stage of `total` steps."""
        self.stage, self.total, self.step_count, self._shown = stage, total, 0, {}
        self._started = self._printed = time.monotonic()
        self.phase_name, self._last_printed = "", -1
        if not self.quiet and self.console.is_terminal:
            self._live = Live(
                self._line(), console=self.console, transient=True, refresh_per_second=4
            )
            self._live.start()

    def phase(self, name: str) -> None:
        """Show the phase of the stage: rollout, score, update."""
        self.phase_name = name
        self._refresh()

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a finished step with its main metrics; a step logged twice has one plain line."""
        self.step_count = step
        names = _SHOWN.get(self.stage, ())
        self._shown.update(
            {k: float(metrics[k]) for k in names if isinstance(metrics.get(k), float)}
        )
        if self._live is not None:
            self._refresh()
        elif (not self.quiet and step != self._last_printed) and (
            time.monotonic() - self._printed > _PLAIN_SECONDS or step >= self.total
        ):
            self._printed, self._last_printed = time.monotonic(), step
            self.console.print(self._line().plain, highlight=False, markup=False, soft_wrap=True)

    def end(self) -> None:
        """Close the live line of the stage."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._line())

    def _line(self) -> Text:
        seconds = time.monotonic() - self._started
        rate = self.step_count / seconds if seconds > 0 else 0.0
        left = (self.total - self.step_count) / rate if rate > 0 else 0.0
        parts = [f"{self.stage:8s} {self.step_count}/{self.total}"]
        if self.phase_name:
            parts.append(f"{self.phase_name:7s}")
        if rate:
            parts.append(f"{rate:.2f} steps/s, {int(left // 60)}:{int(left % 60):02d} left")
        parts += [f"{name} {value:.3g}" for name, value in self._shown.items()]
        return Text("  ".join(parts))
