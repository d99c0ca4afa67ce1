# SPDX-License-Identifier: Apache-2.0
"""Rows from files and Hub datasets, each with the place that an error about it names.

JSONL (`.jsonl`, `.ndjson`), JSON, CSV, TSV and parquet, `.gz` allowed. Text is UTF-8; a byte-order
mark and CRLF are accepted. What cannot be read is one `DataError` with file, line and an excerpt.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_rlhf.errors import DataError
from lora_rlhf.recipe.schema import COLUMNS, DataSource

Row = tuple[str, dict[str, Any]]
"""Where the row stands (`file:line`, 1-based), and its columns."""

FORMATS = ".jsonl, .ndjson, .json, .csv, .tsv or .parquet, .gz allowed"
_READ = {*COLUMNS, "conversations", "item", "text"}
_COLUMNS_TOLD = 20
_UNPACKED, _RATIO = 2**26, 200  # what a .gz may become, in bytes and times its size
_MAX_CELL = 2**31 - 1  # the csv module's own limit of 128 kB refuses long but sound texts


@dataclass
class Skips:
    """The rows of one source that are left out because they are broken, at most `most` of them."""

    most: int = 0
    seen: list[DataError] = field(default_factory=list)

    def take(self, error: DataError) -> None:
        """Leave one out.

        Raises:
            DataError: The error, where no more may be left out.
        """
        if len(self.seen) >= self.most:
            remedy = error.remedy or "mend or remove it, or leave so many out with `skip_bad:`"
            if self.most:
                remedy += f"; {self.most} before it were left out (skip_bad: {self.most})"
            raise DataError(
                error.given, expected=error.expected, remedy=remedy, where=error.where
            ) from None
        self.seen.append(error)


def read(source: DataSource, skips: Skips | None = None) -> list[Row]:
    """All rows of a file or of a Hub dataset, with `source.columns` applied.

    Args:
        skips: Takes the lines that cannot be read; default: none may be left out.

    Raises:
        DataError: The source is missing, cannot be read, is empty, or lacks a mapped column.
    """
    rows = _hub(source) if source.hub else _file(locate(source.path or ""), skips or Skips())
    if not rows:
        raise DataError("no rows", where=title(source), expected="at least a few dozen rows")
    if source.columns:
        rows = [(where, _rename(where, row, source.columns)) for where, row in rows]
    return rows


def title(source: DataSource) -> str:
    """How a report names a source: never with a folder of this machine."""
    return source.task or source.hub or Path(source.path or "").name


def described(source: DataSource, rows: list[Row]) -> dict[str, Any]:
    """What a report says of a source and of all that was read from it; plain JSON."""
    kind = "task" if source.task else "hub" if source.hub else "file"
    licence = source.license or ("Apache-2.0" if source.task else None)
    said: dict[str, Any] = {
        "kind": kind,
        "name": title(source),
        "license": licence,
        "rows": len(rows),
        "sha256": fingerprint(rows),
    }
    columns = {str(key): None for _, row in rows for key in row}
    if unread := [key for key in columns if key not in _READ]:
        said["columns_not_read"] = [excerpt(key) for key in unread[:_COLUMNS_TOLD]]
    where = {"config": source.name, "split": source.split, "revision": source.revision}
    return {**said, **where} if source.hub else said


def fingerprint(rows: list[Row]) -> str:
    """Sha256 over the canonical JSON of the rows' columns; the same on every machine."""
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def excerpt(value: Any, width: int = 80) -> str:
    """The start of a value on one line, safe for a terminal (control characters escaped)."""
    text = repr(value if not isinstance(value, str) else value[: width + 1])
    text = text[1:-1] if isinstance(value, str) else text
    return text if len(text) <= width else text[: width - 1] + "…"


def locate(path: str) -> Path:
    """The file that a recipe names; `data://x` lies in the folder named by LORA_RLHF_DATA.

    Raises:
        DataError: The variable is unset, the path leaves that folder, or there is no such file.
    """
    found = Path(path)
    if path.startswith("data://"):
        folder = os.environ.get("LORA_RLHF_DATA")
        if not folder:
            raise DataError(
                f"{path}: the variable LORA_RLHF_DATA is not set",
                expected="LORA_RLHF_DATA, naming the folder with your data",
                remedy="export LORA_RLHF_DATA=/your/data, or give a plain path in the recipe",
            )
        # By the letters, not by resolving: links that the owner of the folder made are theirs.
        inside = os.path.normpath(path.removeprefix("data://"))
        if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
            raise DataError(f"{path} leaves the folder of LORA_RLHF_DATA", expected="a path inside")
        found = Path(folder) / inside
    if not found.is_file():
        siblings = [p.name for p in found.parent.iterdir()] if found.parent.is_dir() else []
        close = difflib.get_close_matches(found.name, siblings, n=1)
        what = "is a folder" if found.is_dir() else "there is no such file"
        remedy = f"did you mean {close[0]}?" if close else "check data: in the recipe"
        raise DataError(what, where=str(found), expected=f"a file: {FORMATS}", remedy=remedy)
    return found


def _rename(where: str, row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise DataError(
            f"there is no column {missing[0]!r}, which `columns:` names",
            where=where,
            expected=f"one of {', '.join(map(str, row))}",
            remedy="write `columns: {our name: the file's name}`",
        )
    kept = {key: value for key, value in row.items() if key not in columns.values()}
    return {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _file(path: Path, skips: Skips) -> list[Row]:
    try:
        raw = path.read_bytes()
        suffixes = [suffix.lower() for suffix in path.suffixes]
        if suffixes and suffixes[-1] == ".gz":
            raw, suffixes = _unpacked(path, raw), suffixes[:-1]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), expected=FORMATS) from None
    kind = suffixes[-1] if suffixes else ""
    if not raw.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError("the file is empty", where=str(path), expected="at least a few dozen rows")
    if kind == ".parquet":
        return _parquet(path, raw)
    if kind in (".csv", ".tsv"):
        return list(_csv(path, _decode(path, raw), "\t" if kind == ".tsv" else ",", skips))
    if kind in (".jsonl", ".ndjson", ".json"):
        raw = raw.removeprefix(codecs.BOM_UTF8)
        array = kind == ".json" and raw.lstrip().startswith(b"[")
        return _json(path, _decode(path, raw)) if array else list(_jsonl(path, raw, skips))
    raise DataError(f"the ending {kind!r} is not known", where=str(path), expected=FORMATS)


def _unpacked(path: Path, raw: bytes) -> bytes:
    most = max(_UNPACKED, _RATIO * len(raw))
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise DataError(
            f"it unpacks to over {most / 1e6:.0f} MB, from {len(raw) / 1e6:.1f} MB",
            where=str(path),
            expected=f"text, which packs to more than a {_RATIO}th",
            remedy="unpack it yourself, if you know where it comes from",
        )
    return found


def _decode(path: Path, raw: bytes, first: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = raw.rfind(b"\n", 0, error.start) + 1
        line = raw[start : start + 400].split(b"\n")[0].decode("utf-8", "backslashreplace")
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:4]
        raise DataError(
            f"byte 0x{raw[error.start]:02x} at column {error.start - start + 1} is not UTF-8: "
            f"{excerpt(line)}",
            where=_at(path, raw.count(b"\n", 0, error.start) + first),
            expected="UTF-8",
            remedy=f"convert the file, such as with `iconv -f {'utf-16' if wide else 'latin1'} "
            "-t utf-8`",
        ) from None


def _at(path: Path, line: int) -> str:
    return f"{path}:{line}"


def _jsonl(path: Path, raw: bytes, skips: Skips) -> Iterator[Row]:
    # Only \n ends a line: str.splitlines would cut a JSON string at U+2028.
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                yield _at(path, number), _object(path, line, number)
            except DataError as error:
                skips.take(error)


def _object(path: Path, raw: bytes, number: int) -> dict[str, Any]:
    line = _decode(path, raw, number)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        what = getattr(error, "msg", str(error))
        raise DataError(
            f"not valid JSON{column} ({what}): {excerpt(line)}",
            where=_at(path, number),
            expected="one JSON object a line",
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f"a JSON {type(row).__name__}: {excerpt(line)}",
            where=_at(path, number),
            expected="one JSON object a line",
        )
    return row


def _json(path: Path, text: str) -> list[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        what = getattr(error, "msg", str(error))
        shown = excerpt(text.split("\n")[line - 1].strip())
        raise DataError(
            f"not valid JSON ({what}): {shown}",
            where=_at(path, line),
            expected="a JSON array of objects",
        ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"row {number} is a JSON {type(row).__name__}: {excerpt(row)}",
                where=str(path),
                expected="a JSON array of objects",
            )
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)]


def _csv(path: Path, text: str, delimiter: str, skips: Skips) -> Iterator[Row]:
    limit = csv.field_size_limit(_MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader)
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise DataError(
                f"two columns are called {excerpt(twice[0])!r}",
                where=_at(path, 1),
                expected="a name of its own for every column",
                remedy="rename or remove one: only one of them could be read",
            )
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                skips.take(
                    DataError(
                        f"{len(cells)} cells under {len(header)} columns: {excerpt(cells)}",
                        where=_at(path, line),
                        expected="as many cells as the header has",
                        remedy="quote cells that hold a comma, a quote or a line break",
                    )
                )
            elif cells:
                yield _at(path, line), dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        where = _at(path, max(1, reader.line_num))
        raise DataError(f"not valid CSV: {error}", where=where, expected="quoted CSV") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, raw: bytes) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"not valid parquet: {excerpt(str(error))}", where=str(path)) from None
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)]


def _hub(source: DataSource) -> list[Row]:
    name = source.hub or ""
    # A folder of that name would be read in the place of the Hub's, whatever is in it.
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or Path(name).exists():
        raise DataError(f"hub: {name!r:.100}", expected="org/name", remedy="use path: for a file")
    import datasets

    try:
        found = datasets.load_dataset(
            source.hub, source.name, split=source.split, revision=source.revision
        )
    except Exception as error:  # whatever the library, the network or the file system raises
        raise DataError(
            f"the Hub dataset cannot be loaded: {type(error).__name__}: {excerpt(str(error), 300)}",
            where=str(source.hub),
            expected="a dataset, name: (its configuration), split: and revision: that exist and "
            "can be reached",
            remedy="go online or log in once to fill the cache, or download the file and give its "
            "`path:` instead of `hub:`",
        ) from None
    return [
        (f"{source.hub}[{source.split}] row {number}", dict(row))
        for number, row in enumerate(found, start=1)
    ]
