# SPDX-License-Identifier: Apache-2.0
"""Packages of the project's extras, imported where they are used, with one message if absent."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import SetupError, first_line


def load(module: str, user: str, extra: str) -> Any:
    """Import a module of an extra.

    Args:
        module: Its full name.
        user: The metric or feature that needs it, for the error.
        extra: The extra of `lora-rlhf` that installs it.

    Raises:
        SetupError: It cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        raise SetupError(
            f"{user} needs the package {module.split('.')[0]}: {first_line(error)}",
            remedy=f'pip install "lora-rlhf[{extra}]"',
        ) from error
