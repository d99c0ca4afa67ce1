# SPDX-License-Identifier: Apache-2.0
"""Packages that may be absent; those that cannot be imported are hidden, as if they were absent.

An interpreter in which transformers cannot be imported is refused first.

PEFT and TRL import bitsandbytes whenever it is installed, and fail if it cannot be loaded on this
machine, even in a run without 4-bit. Import this module before PEFT and TRL.

bitsandbytes decorates four functions with `torch.compile`, which imports the whole compiler: a
sixth of the start of a command. Here they are compiled when they are first called.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

from lora_rlhf.errors import SetupError, first_line
from lora_rlhf.extras import load as load

BROKEN: dict[str, str] = {}
"""Package -> error of its import."""

if sys.flags.optimize > 1:
    raise SetupError(
        "PYTHONOPTIMIZE=2 (python -OO) removes docstrings, which transformers reads",
        remedy="unset PYTHONOPTIMIZE, or leave -OO out",
    )


def _import_bitsandbytes() -> None:
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compile_now


# It warns about a missing optional kernel on CPUs with bfloat16 instructions.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
try:
    _import_bitsandbytes()
except Exception as error:
    if not (isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"):
        BROKEN["bitsandbytes"] = first_line(error)
        for module in [m for m in sys.modules if m.split(".")[0] == "bitsandbytes"]:
            del sys.modules[module]
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
