# SPDX-License-Identifier: Apache-2.0
"""Packages that may be absent; those that cannot be imported are hidden, as if they were absent.

An interpreter in which transformers cannot be imported is refused first.

PEFT and TRL import bitsandbytes whenever it is installed, and fail if it cannot be loaded on this
machine, even in a run without 4-bit. Import this module before PEFT and TRL.
"""

from __future__ import annotations

import importlib
import logging
import sys

from lora_rlhf.errors import SetupError, first_line
from lora_rlhf.extras import load as load

BROKEN: dict[str, str] = {}
"""Package -> error of its import."""

if sys.flags.optimize > 1:
    raise SetupError(
        "PYTHONOPTIMIZE=2 (python -OO) removes docstrings, which transformers reads",
        remedy="unset PYTHONOPTIMIZE, or leave -OO out",
    )

# It warns about a missing optional kernel on CPUs with bfloat16 instructions.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
try:
    importlib.import_module("bitsandbytes")
except Exception as error:
    if not (isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"):
        BROKEN["bitsandbytes"] = first_line(error)
        for module in [m for m in sys.modules if m.split(".")[0] == "bitsandbytes"]:
            del sys.modules[module]
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
