# SPDX-License-Identifier: Apache-2.0
"""Shell side of the command line: errors as text and exit codes, signals, quiet libraries."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import typer

from lora_rlhf.distributed import launch
from lora_rlhf.errors import INTERRUPTED, LoraRlhfError, MemoryLimitError, first_line
from lora_rlhf.redaction import printable, safe
from lora_rlhf.runtime import interrupts

_USAGE: Any = typer.BadParameter.__base__
"""The class of all errors in the arguments; typer does not export it."""


@contextlib.contextmanager
def errors_as_text(debug: bool) -> Iterator[None]:
    """Turn an exception into a message on stderr and an exit code, without a traceback."""
    with _lasting_streams():
        try:
            yield
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            name = str(error) if isinstance(error, interrupts.Interrupted) else "SIGINT"
            _fail(debug, "Interrupted; run the same command to continue.", INTERRUPTED[name])
        except LoraRlhfError as error:
            _fail(debug, str(error), error.exit_code)
        except Exception as error:
            name, text = type(error).__name__, first_line(error)
            if name in ("OutOfMemoryError", "MemoryError"):
                known = MemoryLimitError(
                    f"the device ran out of memory: {text}",
                    remedy="a smaller base, model.load_in_4bit, or a smaller evaluate.batch_size",
                )
                _fail(debug, str(known), known.exit_code)
            what = name if text == name else f"{name}: {text}"
            hint = "" if debug else "; run again with --debug for the traceback"
            _fail(debug, f"unexpected error: {what}{hint}", 1)


@contextlib.contextmanager
def escaped_usage_errors() -> Iterator[None]:
    """Escape control characters and mask secrets in the arguments that an error quotes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, _USAGE):
            error.message = printable(safe(str(error.message)))
        raise


class _Lasting:
    """A stream that drops failed writes, so that a run does not end with its terminal.

    Args:
        only: The one error that is ignored; by default every OSError.
    """

    def __init__(self, stream: Any, only: int | None = None) -> None:
        self._stream, self._only = stream, only

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; drop it if that fails."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; ignore a failure."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., Any], *args: str) -> None:
        try:
            action(*args)
        except OSError as error:
            if self._only not in (None, error.errno):
                raise
            with contextlib.suppress(OSError):  # what waits in the buffer would fail at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def _lasting_streams() -> Iterator[None]:
    """Go on without the terminal; a closed stdout pipe still ends the command."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lasting(out, errno.EIO), _Lasting(err)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a text with its control characters escaped."""
    typer.echo(printable(str(text)), err=err, nl=nl)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other processes of the launch, if there are any, so that one reports errors."""
    if launch.read() is None:
        yield
        return
    from lora_rlhf.distributed.world import joined

    with joined():
        yield


def _fail(debug: bool, message: str, code: int) -> NoReturn:
    if launch.silent:
        raise typer.Exit(code) from None
    sys.stderr = launch.stderr or sys.stderr
    if debug:
        import traceback

        echo(safe(traceback.format_exc()), err=True, nl=False)
    echo(safe(message), err=True)
    raise typer.Exit(code) from None


_SAME_SIGNAL = 5.0
"""Seconds within which a second signal is the first one again, in a process of a launch."""


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Stop at the next boundary after the first SIGINT, SIGTERM or SIGHUP; at once after a second.

    A terminal that closes sends SIGHUP more than once, so a second one is ignored.
    """

    def again(number: int, frame: FrameType | None) -> None:
        # A launcher passes on the signal that the terminal has sent to all.
        if time.monotonic() - first[0] > _SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def stop_once(number: int, frame: FrameType | None) -> None:
        first.append(time.monotonic())
        for each in before:
            hangup = signal.Signals(each).name == "SIGHUP"
            later: Any = again if launched else signal.SIG_DFL
            signal.signal(each, signal.SIG_IGN if hangup else later)
        interrupts.receive(signal.Signals(number).name)

    before, first, launched = {}, list[float](), launch.read() is not None
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in INTERRUPTED if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, stop_once)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def room(name: str) -> Any:
    """Import a module that needs the heavy libraries."""
    import importlib

    with loading():
        importlib.import_module("lora_rlhf.runtime.optional_packages")  # may refuse
        return importlib.import_module(f"lora_rlhf.{name}")


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Print that libraries are loading, which takes seconds; a terminal clears the line."""
    live = sys.stderr.isatty()
    typer.echo("loading…", err=True, nl=not live)
    try:
        yield
    finally:
        if live:
            typer.echo("\r\033[K", err=True, nl=False)


def say_ignored() -> None:
    """Name the environment variables that would have changed the answers."""
    from lora_rlhf.runtime import environment

    if note := environment.note():
        echo(note, err=True)
