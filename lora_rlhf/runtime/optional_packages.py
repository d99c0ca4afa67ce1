# SPDX-License-Identifier: Apache-2.0
"""Hide packages that are installed but cannot be imported, as if they were absent.

PEFT and TRL import bitsandbytes whenever it is installed, and fail if it cannot be loaded on this
machine, even in a run without 4-bit. Import this module before PEFT and TRL.
"""

from __future__ import annotations

import importlib
import sys

from lora_rlhf.errors import first_line

BROKEN: dict[str, str] = {}
"""Package -> error of its import."""


try:
    importlib.import_module("bitsandbytes")
except Exception as error:
    if not (isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"):
        BROKEN["bitsandbytes"] = first_line(error)
        for module in [m for m in sys.modules if m.split(".")[0] == "bitsandbytes"]:
            del sys.modules[module]
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
