# SPDX-License-Identifier: Apache-2.0
"""Processes of one run as forks, each with the variables that torchrun would give it."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from killed import start, wait
from safetensors.torch import load_file
from transformers.utils import logging

from lora_rlhf.cli.app import main


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def launch(
    size: int,
    run: Callable[..., object],
    *args,
    port: int | None = None,
    only: int | None = None,
) -> list[int]:
    """Call a function in several children, or in one of them; returns their process ids."""
    port, children = port or free_port(), []
    for rank in range(size) if only is None else [only]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        children.append(start(_named, place, run, *args))
    return children


def _named(place: dict[str, int], run: Callable[..., object], *args) -> object:
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    if log := os.environ.get("KILLED_LOG"):
        os.environ["KILLED_LOG"] = f"{log}.{place['RANK']}"
    return run(*args)


def command(size: int, args: list[str], log: Path, **place) -> list[int]:
    """Start `lora-rlhf` in several children; process N writes to `LOG.N`."""
    return launch(size, _command, args, log, **place)


def _command(args: list[str], log: Path) -> None:
    rank = os.environ["RANK"]
    handle = os.open(f"{log}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    logging.set_verbosity_error()  # as in a process that imports transformers itself
    sys.argv = ["lora-rlhf", *args]
    main()


def said(log: Path, size: int) -> list[str]:
    """What each process wrote."""
    return [Path(f"{log}.{rank}").read_text() for rank in range(size)]


def finish(size: int, run: Callable[..., object], *args, log: Path) -> None:
    """Call a function in several children, which must end well."""
    os.environ["KILLED_LOG"] = str(log)
    codes = [wait(child) for child in launch(size, run, *args)]
    logs = [path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*"))]
    assert codes == [0] * size, "\n".join(logs)


def assert_near(one: Path, other: Path) -> None:
    """Two runs have the same adapters within 1e-5."""
    adapters = sorted(one.glob("adapters/*/adapter_model.safetensors"))
    assert adapters
    for path in adapters:
        a, b = load_file(path), load_file(other / path.relative_to(one))
        worst = max(float((a[name] - b[name]).abs().max()) for name in a)
        assert worst < 1e-5, f"{path.parent.name}: {worst}"
