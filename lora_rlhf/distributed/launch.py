# SPDX-License-Identifier: Apache-2.0
"""The variables by which torchrun, `accelerate launch` and SLURM scripts name a process.

Nothing heavy is imported here, because the command line needs this module.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, NamedTuple

from lora_rlhf.errors import SetupError

_TAKEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE",
          "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID")  # fmt: skip
"""Variables that are taken out of the environment, since libraries would split batches by them."""

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """The place of this process among `size` others.

    Attributes:
        local_rank: Its number on this machine, which chooses its GPU.
        agent: Whether the launcher serves the port; else the first process does.
        attempt: Number of restarts by the launcher.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    agent: bool
    attempt: int


silent = False
"""Whether another process reports the error with which this one ends."""

stderr: Any = None
"""The real stream of a process whose output is muted."""


def read() -> Launch | None:
    """Read the launch from the environment; None for one process.

    Raises:
        SetupError: A variable is missing or no number.
    """
    given = os.environ.get("WORLD_SIZE", "")
    if not given.isdigit() or int(given) < 2 or os.environ.get("RANK") is None:
        return None  # `environment.settle` refuses what is neither one process nor a launch
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise SetupError(
            f"WORLD_SIZE={given} is set, and {', '.join(missing)} is not",
            expected=f"the variables of torchrun: {', '.join(_NEEDED)}, LOCAL_RANK",
            remedy="start it by torchrun or `accelerate launch`",
        )
    try:
        rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local = int(os.environ.get("LOCAL_RANK", 0))
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    except ValueError as error:
        raise SetupError(
            f"a variable of the launch is not a whole number: {error}",
            expected=f"whole numbers in {', '.join(_NEEDED)}, LOCAL_RANK",
        ) from None
    if not 0 <= rank < size:
        raise SetupError(f"RANK={rank} and WORLD_SIZE={size}", expected=f"0 to {size - 1}")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(rank, size, local, os.environ["MASTER_ADDR"], port, agent, attempt)


def refuse(what: str) -> None:
    """Refuse a command that supports one process only.

    Raises:
        SetupError: There are several.
    """
    global silent
    if (given := read()) is not None:
        silent = given.rank > 0
        raise SetupError(
            f"{what} is for one process, and this launch has {given.size}",
            expected="several processes only for `run` and the verbs of its stages",
            remedy="start it without torchrun and `accelerate launch`",
        )


def take() -> dict[str, str]:
    """Take the variables out of the environment; return them, to be put back."""
    return {name: os.environ.pop(name) for name in _TAKEN if name in os.environ}


def mute() -> None:
    """Drop the output of all processes but the first, except the error that ends the run."""
    global stderr
    with contextlib.suppress(SetupError):  # which the verb raises again
        if (launch := read()) is None:
            return
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported
        if launch.rank > 0:
            stderr = sys.stderr
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
