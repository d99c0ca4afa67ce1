# SPDX-License-Identifier: Apache-2.0
"""What every section of a recipe shares: strict types, errors about several keys, plain data."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


def conflict(said: str, *keys: str) -> PydanticCustomError:
    """An error about keys that do not go together, dotted and relative to the section.

    config.py tells the line of the first of them that the recipe has. What a recipe sets is told by
    its value and never by pydantic's `model_fields_set`: a run writes down every key, and reads it.
    """
    return PydanticCustomError("conflict", "{said}", {"said": said, "keys": list(keys)})


class Section(BaseModel):
    """Keys that belong together; unknown ones and wrong types are errors."""

    # Strict, so that `r: "4"`, `load_in_4bit: 1` and infinities are errors; 1 is still a float.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    def changed(self, *keys: str) -> list[str]:
        """Those of the keys that differ from their defaults."""
        fields = type(self).model_fields
        return [
            k for k in keys if getattr(self, k) != fields[k].get_default(call_default_factory=True)
        ]


def plain_data(value: Any) -> Any:
    """The value, if YAML can hold it; else an error that shows what it cannot."""
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"the key {wrong[0]!r} is not text")
        return {key: plain_data(found) for key, found in value.items()}
    if isinstance(value, list):
        return [plain_data(found) for found in value]
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{value!r:.80} is no plain data, such as a number, text or a list")
    return value
