# SPDX-License-Identifier: Apache-2.0
"""Packages that are installed and cannot be imported: for every library as if they were absent.

peft and TRL import bitsandbytes wherever it is installed. Where its libraries do not fit the
machine they would not load either, though a run without 4-bit needs none of it. Imported first by
the rooms through which peft and TRL are reached.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys

from lora_rlhf.errors import first_line

BROKEN: dict[str, str] = {}
"""Package -> what its import said."""


def look(name: str) -> None:
    """Import a package where it is installed; where that fails, hide it and note why."""
    found = None
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(name)
    if found is None:
        return
    try:
        importlib.import_module(name)
    except Exception as error:
        BROKEN[name] = first_line(error)
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            del sys.modules[module]
        sys.modules[name] = None  # type: ignore[assignment]


look("bitsandbytes")
