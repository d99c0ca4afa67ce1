# SPDX-License-Identifier: Apache-2.0
"""A thread that notices when another process is gone, however long its work takes.

A slow process still beats, so no time limit is set on the work itself. A killed process closes its
connections, which gloo reports at once; NCCL and a machine that vanished do not.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

SECONDS = 3.0
"""Time between two beats."""

SILENCE = 45.0
"""Time without a beat after which a process counts as gone."""

FAILED = 10.0
"""Time after which a process that ended with an error counts as gone: NCCL would wait for it."""


class Heartbeat:
    """Beats for this process, and watches the others.

    Args:
        store: A connection of its own to the store that all processes share.
        gone: Called with a process's number, or None if the store itself is gone; must not return.
    """

    def __init__(
        self, store: Any, rank: int, size: int, gone: Callable[[int | None], None]
    ) -> None:
        self.store, self.rank, self.size, self.gone = store, rank, size, gone
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self.store.set(f"beat/{self.rank}", "0")
        self._thread.start()

    def stop(self, last: str = "end") -> None:
        """Stop, and let the others know that this process ends by itself, or `failed`."""
        self._stopped.set()
        self._thread.join(timeout=10)
        try:
            self.store.set(f"beat/{self.rank}", last)
        except Exception:  # the store ended first
            return

    def _run(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        count = 0
        while not self._stopped.wait(SECONDS):
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", str(count))
                for other in range(self.size):
                    if other == self.rank or not self.store.check([f"beat/{other}"]):
                        continue
                    beat, now = self.store.get(f"beat/{other}"), time.monotonic()
                    if seen.get(other, (b"", 0.0))[0] != beat:
                        seen[other] = beat, now
                    elif beat != b"end" and now - seen[other][1] > (
                        FAILED if beat == b"failed" else SILENCE
                    ):
                        return self.gone(other)
            except Exception:
                if not self._stopped.is_set():
                    return self.gone(None)


def exit_now(code: int) -> NoReturn:
    """End the process from a thread, while the main thread waits inside a library."""
    os._exit(code)
