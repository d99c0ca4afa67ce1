# SPDX-License-Identifier: Apache-2.0
"""A closed terminal: the run saves and ends, or goes on if it was told to ignore the signal."""

import os
import pty
import signal
import sys
import time

import killed
import pytest
import typer
from typer.testing import CliRunner

from lora_rlhf.cli import app, shell
from lora_rlhf.runtime import interrupts


def work(terminal: int, ignore: bool, done) -> int:
    """Wait for the terminal to close, and write to it afterwards."""
    sys.stderr = os.fdopen(terminal, "w", buffering=1)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignore else signal.SIG_DFL)
    try:
        with shell.errors_as_text(False), shell.signals_raise(), interrupts.deferred(print):
            done.with_suffix(".ready").touch()
            for _ in range(500):
                if interrupts._state.waiting or done.with_suffix(".closed").exists():
                    break
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGHUP)  # a shell sends it once more
            print("saving", file=sys.stderr, flush=True)
            done.touch()
    except typer.Exit as error:
        return error.exit_code
    return 0


@pytest.mark.parametrize(("ignore", "code"), [(False, 129), (True, 0)])
def test_a_closed_terminal_ends_no_run_without_saving(tmp_path, ignore, code):
    ours, theirs = pty.openpty()
    child = killed.start(work, theirs, ignore, tmp_path / "done")
    os.close(theirs)
    while not (tmp_path / "done.ready").exists():
        time.sleep(0.01)
    os.close(ours)
    if not ignore:
        os.kill(child, signal.SIGHUP)
    (tmp_path / "done.closed").touch()
    assert killed.wait(child) == code
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "args",
    [["\x1b[31mverb"], ["--\x1b[31m"], ["demo", "--\x1b]0;owned\x07"],
     ["demo", "\x9b31mextra"], ["card", "run", "--\u202ex"]],
)  # fmt: skip
def test_what_an_error_of_the_options_quotes_is_escaped(args):
    result = CliRunner().invoke(app.app, args)
    assert result.exit_code == 2 and not set(result.output) & set("\x1b\x07\x9b\u202e")
    assert "\\x" in result.output or "\\u202e" in result.output
