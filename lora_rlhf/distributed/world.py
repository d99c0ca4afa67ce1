# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: which rows are whose, and the few exchanges between them.

Every process makes the same random draws over the whole batch, and computes passes only for its own
rows. Results are exchanged, so all else (advantages, statistics, updates) is computed equally
everywhere. Libraries see one process. With one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from lora_rlhf.errors import SetupError, first_line

from . import launch
from .heartbeat import Heartbeat, exit_now

T = TypeVar("T")

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_JOIN = datetime.timedelta(minutes=10)
"""Time in which all processes must have started."""

_WORK = datetime.timedelta(days=30)
"""Time that an exchange waits for a slow process; the heartbeat notices one that is gone."""

_FIRST_SPEAKS = 3.0
"""Seconds for which other processes let the first one report an error, since most have it too."""


class World:
    """This process among those of the run.

    Attributes:
        rank: Number of this process; 0 writes the files and prints.
        size: Number of processes.
        waiting: Called before each exchange, where this process may wait for the others.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Any = None, hosts: bool = False
    ) -> None:
        self.rank, self.size, self._store, self._hosts = rank, size, store, hosts
        self._gpu: Any = None  # group for tensors on GPUs
        self.waiting: Callable[[], None] = lambda: None
        self._server: Any = None

    @property
    def first(self) -> bool:
        """True in the process that writes the files and prints."""
        return self.rank == 0

    def own(self, count: int) -> range:
        """Return this process's positions in a list of `count`, dealt out in turn."""
        return range(self.rank, count, self.size)

    def block(self, count: int) -> tuple[int, int]:
        """Return start and stop of this process's rows in a batch of `count`."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def group(self, device: torch.device) -> Any:
        """Return the processes' group for tensors on this device; None is the default one."""
        return self._gpu if device.type == "cuda" else None

    def gathered(self, mine: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [mine]
        values: list[Any] = [None] * self.size
        self.waiting()
        with lost_as_error():
            dist.all_gather_object(values, mine)
        return values

    def merged(self, mine: Mapping[int, T]) -> dict[int, T]:
        """Return the entries of all processes together."""
        return {key: value for part in self.gathered(dict(mine)) for key, value in part.items()}

    def completed(self, rows: list[T]) -> list[T]:
        """Fill in the rows of a list that other processes have computed."""
        if self.size == 1:
            return rows
        own = {i: rows[i] for i in self.own(len(rows))}
        # A row that is a view would be sent with the whole batch, each time.
        sent: Any = {i: row.clone() if torch.is_tensor(row) else row for i, row in own.items()}
        whole = self.merged(sent)
        return [whole[i] for i in range(len(rows))]

    def of_first(self, compute: Callable[[], T]) -> T:
        """Compute in the first process only; return its result in all."""
        if self.size == 1:
            return compute()
        value = [compute() if self.first else None]
        self.waiting()
        with lost_as_error():
            dist.broadcast_object_list(value, src=0)
        return value[0]  # type: ignore[return-value]

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients of all processes, in one bucket; unused everywhere, they stay None."""
        if self.size == 1:
            return
        parameters = list(parameters)
        used = [float(p.grad is not None) for p in parameters]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        bucket = torch.cat(
            [*(part.reshape(-1).float() for part in parts), parts[0].new_tensor(used)]
        )
        self.waiting()
        with lost_as_error():
            dist.all_reduce(bucket, group=self.group(bucket.device))
        *sums, used_by = bucket.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, total, users in zip(parameters, sums, used_by.tolist(), strict=True):
            if users:
                total = total.view(parameter.shape).to(parameter.dtype)
                if parameter.grad is None:
                    parameter.grad = total.clone()
                else:
                    parameter.grad.copy_(total)

    def agree(self, what: str, facts: Mapping[str, Any]) -> None:
        """Check that all processes have the same facts.

        Raises:
            SetupError: They differ.
        """
        first, *others = self.gathered(dict(facts))
        for rank, other in enumerate(others, start=1):
            wrong = [k for k in first.keys() | other.keys() if first.get(k) != other.get(k)]
            if wrong:
                rows = [
                    f"  {k}: {first.get(k)!r} in process 0, {other.get(k)!r} in process {rank}"
                    for k in sorted(wrong)
                ]
                raise SetupError(
                    f"the processes of this run have different {what}:\n" + "\n".join(rows),
                    expected="the same in all: each computes a part of every batch",
                    remedy="give them the same recipe, data, package versions and kind of device",
                )

    def reports_error(self) -> bool:
        """Return True in the one process that reports an error with which all end."""
        try:
            until = time.monotonic() + (0 if self.first else _FIRST_SPEAKS)
            while not self._store.check(["error"]) and time.monotonic() < until:
                time.sleep(0.05)
            mine = self._store.add("error", 1) == 1
            self._store.add("heard", 1)
            return bool(mine)
        except Exception:  # the process that holds the store is gone
            return self.rank == 1

    def linger(self) -> None:
        """Keep the store for a moment, so that the others learn that the error was reported."""
        with contextlib.suppress(Exception):
            until = time.monotonic() + _FIRST_SPEAKS
            dist.destroy_process_group()
            while (
                self._hosts and time.monotonic() < until and self._store.add("heard", 0) < self.size
            ):
                time.sleep(0.05)


_world = World()


def world() -> World:
    """Return the processes of the run, one by default."""
    return _world


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Join the other processes of the launch, if there are any.

    Raises:
        SetupError: They cannot be reached, or one is gone.
    """
    global _world
    if _world.size > 1 or (given := launch.read()) is None:
        yield _world
        return
    before, alone = launch.take(), _world
    try:
        _pin_gpu(given.local_rank)
        _world, heartbeat = _connect(given)
        heartbeat.start()
        try:
            yield _world
        except BaseException:
            launch.silent = not _world.reports_error()
            heartbeat.stop("failed")
            _world.linger()
            raise
        with contextlib.suppress(Exception):
            _world.gathered(None)  # the first process may hold the store: it must not end early
        heartbeat.stop()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    finally:
        _world = alone
        os.environ.update(before)


def _connect(given: launch.Launch) -> tuple[World, Heartbeat]:
    """Open the store and the process groups."""
    hosts = given.rank == 0 and not given.agent
    if given.address in _LOOPBACK:
        _use_loopback()
    place, prefix = f"{given.address}:{given.port}", f"lora-rlhf/{given.attempt}"

    def connection(host: bool) -> Any:
        made = TCPStore(
            given.address, given.port, is_master=host, timeout=_JOIN, wait_for_workers=False
        )
        return PrefixStore(prefix, made)

    try:
        store = connection(hosts)
        dist.init_process_group(
            "gloo", store=store, rank=given.rank, world_size=given.size, timeout=_JOIN
        )
        made = World(given.rank, given.size, connection(False), hosts)
        made._server = store  # with its last reference the server would end
        dist.barrier()
        dist.destroy_process_group()
        work = PrefixStore("work", store)
        dist.init_process_group(
            "gloo", store=work, rank=given.rank, world_size=given.size, timeout=_WORK
        )
        if torch.cuda.is_available():
            made._gpu = dist.new_group(backend="nccl", timeout=_WORK)
    except (RuntimeError, ValueError) as error:
        here = given.address in _LOOPBACK  # else the error may be on another screen
        launch.silent = given.rank > 0 and here and not isinstance(error, SetupError)
        raise _cannot_join(place, given, error) from None

    def gone(rank: int | None) -> NoReturn:
        name = "the first process" if rank is None else f"process {rank}"
        if made.reports_error():
            stream = launch.stderr or sys.stderr
            stream.write(f"{_lost(name)}\n")
            stream.flush()
        exit_now(SetupError.exit_code)

    return made, Heartbeat(connection(False), given.rank, given.size, gone)


def _use_loopback() -> None:
    """Let gloo use the loopback interface, unless the user chose one.

    Without a choice gloo looks up the machine's own name, which fails on machines without one.
    """
    if name := {"linux": "lo", "darwin": "lo0"}.get(sys.platform):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _cannot_join(place: str, given: launch.Launch, error: Exception) -> SetupError:
    text = first_line(error)
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return SetupError(
            f"{place} is in use",
            expected="a free port, at which the processes of a run meet",
            remedy="give another MASTER_PORT, or --master_port to the launcher",
        )
    return SetupError(
        f"the {given.size} processes of this run did not meet at {place}: {text:.300}",
        expected=f"{given.size} processes within {_JOIN.seconds // 60} minutes",
        remedy="look for the error of a process that did not start; check MASTER_ADDR, "
        "MASTER_PORT and firewalls",
    )


def _lost(name: str) -> SetupError:
    return SetupError(
        f"{name} of this run ended, or its machine cannot be reached",
        expected="all processes until the end",
        remedy="run the same command to continue from the last checkpoint",
    )


@contextlib.contextmanager
def lost_as_error() -> Iterator[None]:
    """Turn a failed exchange into an error with a remedy."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # of this process: it has its own error and remedies
    except RuntimeError as error:
        raise _lost("another process") from error


def _pin_gpu(local_rank: int) -> None:
    """Show this process one GPU only, before CUDA starts: its backbone and updates lie there.

    Raises:
        SetupError: There are fewer GPUs than processes on this machine, or CUDA has started.
    """
    count = torch.cuda.device_count()
    if count == 0 or (count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ):
        return  # no GPU, or the scheduler has chosen one
    if local_rank >= count:
        raise SetupError(
            f"process {local_rank} on this machine has no GPU: {count} are visible",
            expected="a GPU for each process",
            remedy="start fewer processes",
        )
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank]
    if torch._C._cuda_getDeviceCount() != 1:
        raise SetupError(
            "CUDA was started before the processes of this run met",
            expected="each process to see one GPU",
            remedy="start `lora-rlhf` itself by the launcher, or set CUDA_VISIBLE_DEVICES to one "
            "GPU per process",
        )
