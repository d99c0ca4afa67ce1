# SPDX-License-Identifier: Apache-2.0
"""Early stops of a run: signals and the time budget.

The state of a trainer is consistent only after an optimizer step. While a trainer runs, a signal
therefore waits for the end of the step; anywhere else it raises at once, because everything is on
disk already. Nothing heavy is imported here, because the command line needs this module.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, given by name; libraries treat it like Ctrl-C."""


class OutOfTime(Exception):
    """The time budget of the run is used up; everything so far is saved."""


class _State:
    """State of the process: signals and clocks are global."""

    waiting: str | None = None
    deferred = 0
    deadline: float | None = None
    agreed: bool | None = None  # with several processes: whether they agreed that time is up
    say: Callable[[str], None] | None = None


_state = _State()


def receive(name: str) -> None:
    """Handle a signal: defer it inside `deferred`, else raise.

    Raises:
        Interrupted: Signals are not deferred.
    """
    _state.waiting = name
    if not _state.deferred:
        raise Interrupted(name)
    # A launcher sends SIGTERM to the others when a process dies, whose end is then the error.
    if _state.say is not None and not (name == "SIGTERM" and _state.agreed is not None):
        shown, again = ("Ctrl-C", "Press") if name == "SIGINT" else (name, "Send")
        _state.say(
            f"{shown}: finishing this step, then saving. {again} again to quit without saving."
        )


def out_of_time() -> bool:
    """Return whether the time budget is used up; with several processes, if they agreed on it."""
    return _late() if _state.agreed is None else _state.agreed


def _late() -> bool:
    return _state.deadline is not None and time.monotonic() >= _state.deadline


def stop_if_requested() -> None:
    """Raise Interrupted if a signal waits, or OutOfTime if the time budget is used up."""
    if _state.waiting is not None:
        name, _state.waiting = _state.waiting, None
        raise Interrupted(name)
    if out_of_time():
        raise OutOfTime


def agree(gathered: Callable[[Any], list[Any]]) -> bool:
    """Return whether any process of the run is to stop; called by all at the same point.

    Only this answer is the same in all: a signal or the end of the time may come right after it.

    Args:
        gathered: Returns the values of all processes.
    """
    late = out_of_time() if _state.agreed is None else _late()
    states = gathered((_state.waiting, late))
    signal = next((name for name, _ in states if name), None)
    late = any(late for _, late in states)
    _state.waiting = _state.waiting or signal
    if _state.agreed is not None:
        _state.agreed = late
    return signal is not None or late


def sleep(seconds: float) -> None:
    """Sleep, then raise Interrupted if a signal came: Python drops exceptions inside callbacks."""
    time.sleep(seconds)
    if _state.waiting is not None and not _state.deferred:
        stop_if_requested()


@contextlib.contextmanager
def deferred(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Defer signals to the next `stop_if_requested`, which is called at the end as well."""
    _state.deferred, _state.say = _state.deferred + 1, say
    try:
        yield
    finally:
        _state.deferred -= 1
    stop_if_requested()


@contextlib.contextmanager
def time_budget(minutes: float | None, *, alone: bool = True) -> Iterator[None]:
    """Make `out_of_time` true after this many minutes; None: never.

    Args:
        alone: False if several processes have to `agree` on it.
    """
    before = _state.deadline
    _state.waiting, _state.agreed = None, None if alone else False
    _state.deadline = None if minutes is None else time.monotonic() + 60 * minutes
    try:
        yield
    finally:
        _state.deadline, _state.agreed = before, None
