# SPDX-License-Identifier: Apache-2.0
"""The people behind a file of labels, in counts and without names: `FILE.labels.json` beside it.

The labelling room writes it with the file; a run copies it into its record, for the card.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_rlhf.errors import DataError

SUFFIX = ".labels.json"

_Count = Annotated[int, Field(ge=0)]
_Counts = dict[str, _Count]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Share(_Part):
    """A number with its two-sided 95 % interval, if there is one, and its n."""

    value: float
    low: float | None
    high: float | None
    n: _Count


class Agreement(_Part):
    """Agreement on questions that two or more people answered."""

    raw: Share | None
    alpha: float | None
    """Krippendorff's."""
    kendall: Share | None
    labelers: _Count
    questions: _Count


class Pool(_Part):
    """The people who gave the labels of one file, in counts."""

    version: Literal[1]
    sha256: str
    """Of the file that it describes."""
    people: _Count
    left_out: _Count
    """Further people whose labels were left out."""
    labels: _Count
    by_type: _Counts
    by_kind: _Counts
    """Kind of prompt -> labels."""
    flags: _Counts
    guidelines: list[str]
    """Their sha256; several if they changed."""
    agreement: dict[str, Agreement]
    screening: dict[str, _Counts]
    """Part of the screening test -> result -> people."""
    verdicts: _Counts
    """Reason to doubt a labeler -> people."""
    groups: _Counts
    """Self-described group of at least five -> people."""


def beside(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the description of a file of labels as JSON, or None and the reason if it is stale.

    Raises:
        DataError: There is a description, but it cannot be read or has other fields.
    """
    described = path.with_name(path.name + SUFFIX)
    if not described.is_file():
        return None, ""
    try:
        pool = Pool.model_validate_json(described.read_bytes())
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValidationError) as error:
        wrong = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            wrong = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise DataError(
            f"not a description of labelers: {wrong}",
            where=str(described),
            expected=f"what `lora-rlhf label PROJECT --export {path.name}` writes",
            remedy="export the labels again, or delete the description",
        ) from None
    if pool.sha256 != actual:
        return None, f"{described.name} describes another version of the file and is not used"
    return pool.model_dump(exclude={"version", "sha256"}), ""
