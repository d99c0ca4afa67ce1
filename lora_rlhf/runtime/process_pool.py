# SPDX-License-Identifier: Apache-2.0
"""Commands as child processes, a few at a time: by Ray where it is installed, else by threads.

A child has a process group of its own: Ctrl-C reaches it once, by `stop`, and it can save. `stop`
is a file, because Ray's own cancelling of a task does not always arrive.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

STOPPED = 143
"""Exit code of a command that was stopped before it began, as of one that SIGTERM ends."""


def start(processes: int, folder: Path) -> Pool:
    """Return an engine for so many processes at a time; a folder that all of them can read."""
    return (RayPool if importlib.util.find_spec("ray") else Pool)(processes, folder)


def run_child(
    command: Sequence[str], log: Path, changes: dict[str, str], stop: Path, place: Path
) -> int:
    """Run a command to its end, with its output in a file; return its exit code.

    Args:
        changes: Changes of its environment.
        stop: A file; once it is there, the command gets SIGTERM, or does not begin.
        place: The folder in which it runs; that of a worker of Ray may be another.
    """
    if stop.exists():
        return STOPPED
    ending = False
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **changes},
            cwd=place,
            start_new_session=True,
        )
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=1.0)
            if stop.exists() and not ending:  # a second SIGTERM would end it without saving
                process.terminate()
                ending = True


class Pool:
    """A thread waits for each process; several GPUs are taken in turn."""

    def __init__(self, processes: int, folder: Path) -> None:
        self._file, self._futures = folder.absolute() / "stop", list["Future[int]"]()
        self._place = Path.cwd()
        self._file.unlink(missing_ok=True)
        count = getattr(os, "sched_getaffinity", None)
        cores = len(count(0)) if count else os.cpu_count() or 1
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes)))
        self._changes = {"OMP_NUM_THREADS": threads}
        self._open(processes)

    def _open(self, processes: int) -> None:
        self._threads = ThreadPoolExecutor(processes)
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
        self._gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
        for i in range(processes if len(gpus) > 1 else 0):
            self._gpus.put(gpus[i % len(gpus)])

    def submit(self, command: Sequence[str], log: Path) -> Future[int]:
        """Run a command when its turn comes; the future has its exit code."""
        self._futures.append(self._submit(list(command), log.absolute()))
        return self._futures[-1]

    def _submit(self, command: list[str], log: Path) -> Future[int]:
        return self._threads.submit(self._on_a_gpu, command, log)

    def _on_a_gpu(self, command: list[str], log: Path) -> int:
        if self._gpus.empty():  # there is at most one: no choice
            return run_child(command, log, self._changes, self._file, self._place)
        gpu = self._gpus.get()
        try:
            changes = {**self._changes, "CUDA_VISIBLE_DEVICES": gpu}
            return run_child(command, log, changes, self._file, self._place)
        finally:
            self._gpus.put(gpu)

    def stop(self) -> None:
        """Begin nothing more, end what runs (a run then saves), and wait for it."""
        if not all(future.done() for future in self._futures):
            self._file.touch()
            wait(self._futures)
        self._file.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        self._threads.shutdown()


class RayPool(Pool):
    """A task of Ray for each process; a cluster that the caller has joined is used."""

    def _open(self, processes: int) -> None:
        import ray  # type: ignore[import-not-found, unused-ignore]

        self._ray: Any = ray
        self._own = not ray.is_initialized()
        if self._own:
            before = signal.getsignal(signal.SIGTERM)
            ray.init(
                num_cpus=processes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
            if threading.current_thread() is threading.main_thread():  # where Ray sets its own
                signal.signal(signal.SIGTERM, before)
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / processes)
        self._task = ray.remote(run_child).options(num_cpus=1, num_gpus=gpus, max_retries=0)

    def _submit(self, command: list[str], log: Path) -> Future[int]:
        future: Future[int]
        future = self._task.remote(command, log, self._changes, self._file, self._place).future()
        return future

    def _close(self) -> None:
        if self._own:
            self._ray.shutdown()
