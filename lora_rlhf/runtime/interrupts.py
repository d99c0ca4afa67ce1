# SPDX-License-Identifier: Apache-2.0
"""When a run has to stop early: at a signal, or when its minutes are used up.

A trainer can only stop well where its state is whole, after an optimizer step. While one trains, a
signal therefore waits for that boundary; anywhere else it raises at once, because there is nothing
to save that is not on disk already. Nothing heavy is imported here: the command line needs it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, by name; libraries treat it as they treat Ctrl-C."""


class OutOfTime(Exception):
    """The run's minutes are used up; what was done so far is kept."""


class _State:
    """Of this process: signals and clocks belong to all of it."""

    waiting: str | None = None
    inside = 0
    deadline: float | None = None
    say: Callable[[str], None] | None = None


_state = _State()


def request(name: str) -> None:
    """A signal arrived: remember it until the next boundary, or raise where there is none.

    Raises:
        Interrupted: No trainer is at work.
    """
    _state.waiting = name
    if not _state.inside:
        raise Interrupted(name)
    if _state.say is not None:
        _state.say(f"{name}: saving at the next boundary; a second one stops at once")


def wanted() -> bool:
    """Whether to stop at the next boundary."""
    return _state.waiting is not None or out_of_time()


def out_of_time() -> bool:
    """Whether the run's minutes are used up."""
    return _state.deadline is not None and time.monotonic() >= _state.deadline


def leave() -> None:
    """Stop now, if that is wanted.

    Raises:
        Interrupted: A signal waited for this.
        OutOfTime: The minutes are used up.
    """
    if _state.waiting is not None:
        name, _state.waiting = _state.waiting, None
        raise Interrupted(name)
    if out_of_time():
        raise OutOfTime


def sleep(seconds: float) -> None:
    """Wait, then stop if a signal came: Python drops what is raised inside a callback.

    Raises:
        Interrupted: A signal came, and where it came its exception was lost.
    """
    time.sleep(seconds)
    if _state.waiting is not None and not _state.inside:
        leave()


@contextlib.contextmanager
def at_boundaries(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Signals wait inside, for code that looks at `wanted`; they raise when it is left.

    Raises:
        Interrupted, OutOfTime: As `leave`.
    """
    _state.inside, _state.say = _state.inside + 1, say
    try:
        yield
    finally:
        _state.inside -= 1
    leave()


@contextlib.contextmanager
def budget(minutes: float | None) -> Iterator[None]:
    """Let `wanted` be true from so many minutes on; None: never."""
    before = _state.deadline
    _state.waiting = None
    _state.deadline = None if minutes is None else time.monotonic() + 60 * minutes
    try:
        yield
    finally:
        _state.deadline = before
