# SPDX-License-Identifier: Apache-2.0
"""The progress line of a run, for people."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lora_rlhf.recipe.stage_keys import stage_of
from lora_rlhf.redaction import printable, safe

_ROLLOUTS = ("reward/score", "kl/sequence", "rewards/gold", "completions/length")
_PAIRS = ("loss", "accuracy", "margin")
_SHOWN = {"sft": ("loss",), **dict.fromkeys(("ppo", "grpo", "rloo"), _ROLLOUTS), "evaluate": ()}
"""Training -> the metrics on its line, most important first; default: those of pairs."""

_WIDTH = 80
"""Longest line; metrics that would not fit are left out."""

_PLAIN_SECONDS = 15.0


class Progress:
    """Stage, step, phase, rate, time left: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True)
        self._live: Live | None = None
        self.stage, self.phase_name, self.total, self.step_count, self._first = "", "", 0, 0, 0
        self._last_printed = -1  # step
        self._shown: dict[str, float] = {}
        self._stages: tuple[str, ...] = ()
        self._work: dict[str, float] = {}
        self._spent, self._worked = 0.0, 0.0  # seconds and work of the trainings that are done
        self._started = self._printed = time.monotonic()
        self._early: tuple[int, float] | None = None  # steps and seconds at the first report
        self._laps: dict[str, float] = {}  # phase -> seconds since `laps` was called
        self._lap_began = time.perf_counter()

    def plan(self, stages: Sequence[str], work: Mapping[str, float]) -> None:
        """Announce the stages of the run, and the work of each training that is still to do.

        Args:
            work: Training -> its share of the work, in any unit, in order.
        """
        self._stages, self._work, self._spent, self._worked = tuple(stages), dict(work), 0.0, 0.0

    def say(self, text: str) -> None:
        """Print a permanent line."""
        if not self.quiet:
            self.console.print(printable(safe(text)), highlight=False, markup=False)

    def begin(self, stage: str, total: int, first: int = 0) -> None:
        """Start a training of `total` steps, of which `first` are done already."""
        self.end()
        self.stage, self.total, self.step_count, self._shown = stage, total, first, {}
        self._started = self._printed = time.monotonic()
        self.phase_name, self._last_printed, self._first, self._early = "", -1, first, None
        self._laps = {}
        if not self.quiet and self.console.is_terminal:
            self._live = Live(
                self._line(), console=self.console, transient=True, refresh_per_second=4
            )
            self._live.start()

    def phase(self, name: str) -> None:
        """Show the phase of the stage: rollout, score, update."""
        self._end_lap()
        self.phase_name = name
        self._refresh()

    def laps(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call."""
        self._end_lap()
        taken, self._laps = {k: round(v, 4) for k, v in self._laps.items()}, {}
        return taken

    def _end_lap(self) -> None:
        now = time.perf_counter()
        if self.phase_name:
            known = self._laps.get(self.phase_name, 0.0)
            self._laps[self.phase_name] = known + now - self._lap_began
        self._lap_began = now

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a finished step with its main metrics; a step logged twice has one plain line."""
        self.step_count = step
        if self._early is None:
            self._early = step, time.monotonic() - self._started
        known = {k: metrics[k] for k in _SHOWN.get(self.stage, _PAIRS) if k in metrics}
        self._shown |= {k: float(v) for k, v in known.items() if isinstance(v, float)}
        if self._live is not None:
            self._refresh()
        elif (not self.quiet and step != self._last_printed) and (
            time.monotonic() - self._printed > _PLAIN_SECONDS or step >= self.total
        ):
            self._printed, self._last_printed = time.monotonic(), step
            self.console.print(self._line().plain, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def counting(self, backoff: Any, stage: str, total: int) -> Iterator[None]:
        """Show as steps the rows that `backoff.for_each_batch` has processed inside the block."""

        def count(kind: str, rows: int) -> None:
            self.phase_name = "sample" if kind == "generation" else "score"
            self.step(min(self.step_count + rows, total), {})

        self.begin(stage, total)
        backoff.processed = count
        try:
            yield
        finally:
            backoff.processed = lambda kind, rows: None
            self.end()

    def end(self) -> None:
        """Close the live line of the training."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self.stage in self._work:
            self._spent += time.monotonic() - self._started
            self._worked += self._work.pop(self.stage)
        self.stage = ""

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._line())

    def _whole(self, seconds: float, left: float) -> str:
        """Return the time until the end of the run, at the speed so far; `~` while it is a guess.

        Until a tenth of the work is done, slow first steps count for much, and the speed of one
        training stands for all.
        """
        work = self._work.get(self.stage, 0.0)
        done = self._worked + work * seconds / (seconds + left)
        later = sum(self._work.values()) - work
        guess = "~" if done < 0.1 * (self._worked + work + later) else ""
        return guess + clock(left + (later * (self._spent + seconds) / done if done else 0.0))

    def _rate(self, seconds: float) -> tuple[float, str]:
        """Return steps a second without those of the first report, which also warm up.

        With them, and `~`, while there are no others.
        """
        steps, then = self._early or (self._first, 0.0)
        if self.step_count > steps and seconds > then:
            return (self.step_count - steps) / (seconds - then), ""
        return (self.step_count - self._first) / seconds, "~"

    def _line(self) -> Text:
        seconds, steps = time.monotonic() - self._started, self.step_count - self._first
        head = f"{self.stage} {self.step_count}/{self.total}"
        if (stage := stage_of(self.stage)) in self._stages:
            head = f"{self._stages.index(stage) + 1}/{len(self._stages)} {head}"
        parts = [head + (f" {self.phase_name}" if self.phase_name and self._live else "")]
        if steps > 0 and seconds > 0:
            rate, guess = self._rate(seconds)
            left = (self.total - self.step_count) / rate
            parts.append(f"{rate:.2f} steps/s" if rate >= 1 else f"{1 / rate:.2f} s/step")
            whole = f" (run {self._whole(seconds, left)})" if self._work else ""
            parts.append(f"{guess * (left > 0)}{clock(left)} left{whole}")
        for name, value in self._shown.items():
            shown = f"{name.split('/')[0] if name == 'kl/sequence' else name.split('/')[-1]}"
            if len("  ".join([*parts, f"{shown} {value:.3g}"])) <= _WIDTH:
                parts.append(f"{shown} {value:.3g}")
        return Text("  ".join(parts))


def clock(seconds: float) -> str:
    """Format a duration as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
