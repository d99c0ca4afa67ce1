# SPDX-License-Identifier: Apache-2.0
"""Read rows from files and Hub datasets, each with its `file:line` for errors.

Text is UTF-8; a byte-order mark and CRLF are accepted. Unreadable data raise a `DataError` with
file, line and an excerpt.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lora_rlhf.errors import DataError, counted, reason
from lora_rlhf.recipe.schema import COLUMNS, DataSource

Row = tuple[str, dict[str, Any]]
"""(`file:line`, counted from 1, and columns)."""

_MANY = 20
_ENOUGH = "at least a few dozen rows"
_ARRAY = "a JSON array of objects; in a .jsonl broken rows can be skipped"
_QUOTE = "quote cells that hold a comma, a quote or a line break"
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
FORMATS = f"{', '.join(_ENDINGS[:-1])} or {_ENDINGS[-1]}, .gz allowed"
_CONTENTS = {b"\x1f\x8b": "gz", b"PAR1": "parquet", b"PK\x03\x04": "zip or .xlsx", b"BZh": "bz2",
             b"\x28\xb5\x2f\xfd": "zst", b"\xd0\xcf\x11\xe0": "xls", b"ARROW1": "arrow",
             b"\xff\xff\xff\xff": "arrow", b"%PDF": "pdf", b"version https://git-lfs": "lfs",
             b"<!DOCTYPE html": "html", b"<!doctype html": "html", b"<html": "html"}  # fmt: skip
"""First bytes -> the ending that a file with them has; none of them begins a text."""

_CONVERTED = {
    ".arrow": "write its rows as .parquet: `datasets.load_from_disk(FOLDER).to_parquet(FILE)`",
    ".xlsx": "save it in the spreadsheet as CSV (UTF-8)", ".xls": "save it as CSV (UTF-8)",
    ".lfs": "run `git lfs pull` in its folder: this is a pointer of Git LFS to the file",
    ".html": "download the file itself: this is a page, such as that of an error or a login",
    ".ods": "save it as CSV (UTF-8)", ".zip": "unpack it, and name the file inside",
    ".txt": "write each text as a row into a .jsonl, such as {'prompt': ..., 'completion': ...}",
}  # fmt: skip
"""Ending -> how such a file becomes one that is read."""

_KNOWN_COLUMNS = {*COLUMNS, "conversations", "item", "text"}
_MAX_UNREAD_COLUMNS = 20
_MAX_UNPACKED, _MAX_RATIO = 2**26, 200  # limits of a .gz: bytes, or a multiple of its size
_MAX_CELL = 2**31 - 1  # the csv module's own limit of 128 kB refuses long but valid texts


@dataclass
class Skips:
    """The broken rows of one source that are skipped, at most `most` of them."""

    most: int = 0
    seen: list[DataError] = field(default_factory=list)

    def take(self, error: DataError) -> None:
        """Skip a row, or raise its error if no more rows may be skipped."""
        if len(self.seen) >= self.most:
            remedy = error.remedy or "correct or remove it, or skip N broken rows by `skip_bad: N`"
            if self.most:
                remedy += f"; {self.most} before it were skipped (skip_bad: {self.most})"
            raise DataError(
                error.given, expected=error.expected, remedy=remedy, where=error.where
            ) from None
        self.seen.append(error)


def read(source: DataSource, skips: Skips) -> list[Row]:
    """Read all rows of a file or of a Hub dataset, and rename its columns.

    Raises:
        DataError: The source is missing, cannot be read, is empty, or lacks a mapped column.
    """
    rows = _hub(source) if source.hub else _file(locate(source.path or ""), skips)
    if not rows:
        where = str(source.hub or source.path)
        raise DataError("there are no rows", where=where, expected=_ENOUGH)
    if source.columns:
        rows = [(where, _rename(where, row, source.columns)) for where, row in rows]
    return rows


def described(source: DataSource, rows: list[Row]) -> dict[str, Any]:
    """Describe a source and all its rows for a report: plain JSON, without local folders.

    `sha256` hashes the canonical JSON of the rows, so that it is the same on every machine.
    """
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    report: dict[str, Any] = {
        "kind": "task" if source.task else "hub" if source.hub else "file",
        "name": source.task or source.hub or Path(source.path or "").name,
        "license": source.license or ("Apache-2.0" if source.task else None),
        "rows": len(rows),
        "sha256": digest.hexdigest(),
    }
    columns = dict.fromkeys(str(key) for _, row in rows for key in row)
    if unread := [key for key in columns if key not in _KNOWN_COLUMNS]:
        shown = unread[:_MAX_UNREAD_COLUMNS]
        report["columns_not_read"] = [excerpt(key) or "(without a name)" for key in shown]
    if source.hub:
        report |= {"config": source.name, "split": source.split, "revision": source.revision}
        report |= {"data_dir": source.data_dir} if source.data_dir else {}
    return report


def described_again(
    sources: list[DataSource], before: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Describe files as they are now; other sources, and files that are gone, as they were."""
    now = [*before]
    for number, (source, _) in enumerate(zip(sources, before, strict=False)):
        if source.path:
            with contextlib.suppress(DataError):
                now[number] = described(source, read(source, Skips(source.skip_bad)))
    return now


def excerpt(value: Any, width: int = 80) -> str:
    """Return the start of a value on one line, with control characters escaped."""
    text = repr(value if not isinstance(value, str) else value[: width + 1])
    text = text[1:-1] if isinstance(value, str) else text
    return text if len(text) <= width else text[: width - 1] + "…"


def locate(path: str) -> Path:
    """Return the file that a recipe names; `data://x` lies in the folder named by LORA_RLHF_DATA.

    Raises:
        DataError: The variable is unset, the path leaves that folder, or there is no such file.
    """
    file = Path(path)
    if path.startswith("data://"):
        folder = os.environ.get("LORA_RLHF_DATA")
        if not folder:
            raise DataError(
                f"{path}: the variable LORA_RLHF_DATA is not set",
                expected="LORA_RLHF_DATA, naming the folder with your data",
                remedy="export LORA_RLHF_DATA=/your/data, or give a plain path in the recipe",
            )
        # The path is not resolved, because links inside the folder are allowed.
        inside = os.path.normpath(path.removeprefix("data://"))
        if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
            raise DataError(f"{path} leaves the folder of LORA_RLHF_DATA", expected="a path inside")
        file = Path(folder) / inside
    if not is_file(file):
        there = file.parent.iterdir() if file.parent.is_dir() else ()
        siblings = [] if file.exists() else [p.name for p in there if p.is_file()]
        close = difflib.get_close_matches(file.name, siblings, n=1)
        remedy = f"did you mean {close[0]}?" if close else "check the path"
        if file.is_dir():
            remedy = _of_folder(file)
        elif glob.has_magic(file.name):
            remedy = (
                "patterns are not read: name each file, as a source of its own (`- path: FILE`)"
            )
        elif "$" in path:
            remedy = "variables of the shell are not read in a recipe: write the path, or `~/`"
        kind = "this is a pipe or a device" if file.exists() else "there is no such file"
        raise DataError(
            "this is a folder" if file.is_dir() else kind,
            where=str(file),
            expected=f"a file: {FORMATS}",
            remedy=remedy,
        )
    return file


def _of_folder(folder: Path) -> str:
    """Say how the files of a folder are read."""
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return _CONVERTED[".arrow"]
    inside = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (*_ENDINGS, ".gz"))
    shown = f"; in it are {', '.join(inside[:5])}" if inside else ""
    return f"name each of its files, as a source of its own (`- path: FILE`){shown}"


def is_file(path: Path) -> bool:
    """Tell if there is such a file, on the disk or inside a zip archive such as a wheel."""
    return path.is_file() or _archive(path) is not None


def _archive(path: Path) -> tuple[Path, str] | None:
    """Split `archive.zip/folder/file` in the archive and its member."""
    archive = next((parent for parent in path.parents if parent.is_file()), None)
    if archive is None or not zipfile.is_zipfile(archive):
        return None
    member = path.relative_to(archive).as_posix()
    with zipfile.ZipFile(archive) as file:
        return (archive, member) if member in file.namelist() else None


def _bytes(path: Path) -> bytes:
    inside = None if path.is_file() else _archive(path)
    if inside is None:
        return path.read_bytes()
    with zipfile.ZipFile(inside[0]) as archive, archive.open(inside[1]) as file:
        return _limited(path, file, archive.getinfo(inside[1]).compress_size)


def whole_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DataError: The file cannot be read, or is not UTF-8.
    """
    try:
        return _decode(path, path.read_bytes())
    except OSError as error:
        raise DataError(f"the file cannot be read: {reason(error)}", where=str(path)) from None


def text_lines(path: Path) -> list[tuple[str, str]]:
    """Return the lines of a text file that are not empty, each with its `file:line`.

    Raises:
        DataError: The file cannot be read, or is not UTF-8.
    """
    lines = whole_text(path).split("\n")
    return [(f"{path}:{n}", line.rstrip("\r")) for n, line in enumerate(lines, 1) if line.strip()]


def _rename(where: str, row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    if missing := [theirs for theirs in columns.values() if theirs not in row]:
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
        raw = _bytes(path)
        suffixes = [suffix.lower() for suffix in path.suffixes]
        if suffixes and suffixes[-1] == ".gz" and not _is_text(raw):
            raw, suffixes = _unpacked(path, raw), suffixes[:-1]
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise DataError(
            f"the file cannot be read: {reason(error)}",
            where=str(path),
            expected=FORMATS,
            remedy="check its permissions, and that it is complete",
        ) from None
    kind = suffixes[-1] if suffixes else ""
    if not raw.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError("the file is empty", where=str(path), expected=_ENOUGH)
    content = next((name for first, name in _CONTENTS.items() if raw.startswith(first)), "")
    if kind == ".parquet" and content not in ("lfs", "html"):
        return _parquet(path, raw)
    if kind not in _ENDINGS or content:
        raise _no_text(path, kind, content)
    if kind in (".csv", ".tsv"):
        text = _decode(path, raw)
        return _table(path, text, "\t" if kind == ".tsv" else ",", skips)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    whole = _whole(raw)
    if whole is None and kind == ".json" and raw.lstrip().startswith(b"["):
        whole = _loads(path, _decode(path, raw), 1, _ARRAY)
    if isinstance(whole, list):
        return [_object(row, f"{path} row {n}", row) for n, row in enumerate(whole, start=1)]
    rows = [(f"{path}:1", whole)] if isinstance(whole, dict) else list(_jsonl(path, raw, skips))
    if len(rows) == 1:
        _check_rows_inside(*rows[0])
    return rows


def _no_text(path: Path, kind: str, content: str) -> DataError:
    """Create the error for a file of a format that is not read, by its ending or first bytes."""
    if content in ("lfs", "html"):
        remedy, what = _CONVERTED[f".{content}"].split(": this is ")
        return DataError(f"this is {what}", where=str(path), expected=FORMATS, remedy=remedy)
    what = f"its content is that of a .{content} file" if content else ""
    remedy = _CONVERTED.get(f".{content}" if content else kind, "convert the file")
    named = "rename it if its ending is wrong"
    return DataError(
        what or f"files ending in {kind!r} cannot be read",
        where=str(path),
        expected=FORMATS,
        remedy=f"{named}, or unpack it"
        if content in ("gz", "parquet")
        else f"{remedy}, or {named}",
    )


def _is_text(raw: bytes) -> bool:
    """Tell a file that is no archive, though its name ends in .gz."""
    return raw.lstrip()[:1] in (b"{", b"[")


def _whole(raw: bytes) -> Any:
    """Return the list or object that a file is as a whole; None for lines of JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(raw.decode(), object_pairs_hook=unique_keys)
    return None


def _check_rows_inside(where: str, row: dict[str, Any]) -> None:
    """Refuse a file of one object that holds all the rows, or all the values of each column."""
    lists = [key for key, value in row.items() if isinstance(value, list) and len(value) > 1]
    objects = [key for key in lists if all(isinstance(one, dict) for one in row[key])]
    inside = [key for key in objects if "role" not in row[key][0] and "from" not in row[key][0]]
    inside = [key for key in inside if len(row) == 1 or len(row[key]) > _MANY]
    tables = [key for key, value in row.items() if isinstance(value, dict) and "0" in value]
    texts = [key for key in lists if key not in objects and len(row[key]) > _MANY]
    if inside:
        given = f"the file is one object, with its rows inside {' and '.join(map(repr, inside))}"
        remedy = "write the list of rows alone into the file"
    elif len(tables) > 1 or len(texts) > 1:
        given = f"the file holds columns ({excerpt(', '.join(tables or texts))}), not rows"
        remedy = "write it by rows, such as with pandas' `to_json(FILE, orient='records')`"
    else:
        return
    raise DataError(given, where=where, expected="an object for each row", remedy=remedy)


def _unpacked(path: Path, raw: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        return _limited(path, file, len(raw))


def _limited(path: Path, file: IO[bytes] | gzip.GzipFile, packed: int) -> bytes:
    """Read what a compressed file unpacks to, up to a limit."""
    most = max(_MAX_UNPACKED, _MAX_RATIO * packed)
    unpacked = file.read(most + 1)
    if len(unpacked) > most:
        raise DataError(
            f"it unpacks to over {most / 1e6:.0f} MB, from {packed / 1e6:.1f} MB",
            where=str(path),
            expected=f"text, which rarely shrinks to less than a {_MAX_RATIO}th",
            remedy="unpack it yourself if you trust its source",
        )
    return unpacked


def _decode(path: Path, raw: bytes, line: int = 1, remedy: Callable[[], str] | None = None) -> str:
    """Decode UTF-8 that begins on this line of the file; `remedy` tells how a whole file does."""
    try:
        if len(raw) > 1 and (raw[0] == 0) != (raw[1] == 0):
            raise UnicodeDecodeError("utf-8", raw, raw.index(b"\0"), 1, "UTF-16")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = raw.rfind(b"\n", 0, error.start) + 1
        shown = raw[start : start + 400].split(b"\n")[0].decode("utf-8", "backslashreplace")
        number = line + raw.count(b"\n", 0, error.start)
        raise DataError(
            f"byte 0x{raw[error.start]:02x} at column {error.start - start + 1} is not UTF-8: "
            f"{excerpt(shown)}",
            where=f"{path}:{number}",
            expected="UTF-8",
            remedy=remedy() if remedy else _to_utf8(path, raw),
        ) from None


def _to_utf8(path: Path, raw: bytes) -> str:
    """Say how a text becomes UTF-8."""

    def is_utf8(line: bytes) -> bool:
        with contextlib.suppress(UnicodeDecodeError):
            return not line.isascii() and bool(line.decode())
        return False

    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:4]:
        encoding, more = "utf-16", ""
    elif any(map(is_utf8, raw.removeprefix(codecs.BOM_UTF8).split(b"\n"))):
        return "correct this line: others are UTF-8, so the file holds two encodings"
    else:
        encoding = "cp1252"
        more = " (of a Windows in Western Europe; others have cp1250, cp1251, gbk or shift_jis)"
    return (
        f"convert the file from its own encoding, such as with `iconv -f {encoding} -t utf-8 "
        f'{path.name} > utf8-{path.name}`{more}, or save it as "CSV UTF-8" in the spreadsheet'
    )


def _jsonl(path: Path, raw: bytes, skips: Skips) -> Iterator[Row]:
    remedy = functools.cache(lambda: _to_utf8(path, raw))  # reads the whole file
    # Only \n ends a line: str.splitlines would cut a JSON string at U+2028.
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                text = _decode(path, line, number, remedy)
                row = _loads(path, text, number, "one JSON object a line", _of_line(text))
                yield _object(row, f"{path}:{number}", text)
            except DataError as error:
                skips.take(error)


def _of_line(text: str) -> str:
    """Say how a line becomes one object of JSON, if it shows how the whole file was written."""
    line = text.strip()
    if line in ("{", "["):
        return "write each object on one line, such as with `jq -c . FILE > NEW.jsonl`"
    if line.startswith("{") and line.endswith("},"):
        return "take the comma off the ends of the lines"
    if re.match(r"\{\s*'", line):
        return "write the rows with `json.dumps`; this is Python's notation"
    return ""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, as `object_pairs_hook`; a key given twice is a ValueError."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {excerpt(twice)!r} is given twice")
    return made


def _loads(path: Path, text: str, first: int, expected: str, remedy: str = "") -> Any:
    """Parse JSON that begins on this line of the file."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        line, column, problem = 1, "", str(error)
        if isinstance(error, json.JSONDecodeError):
            line, column, problem = error.lineno, f" at column {error.colno}", error.msg
        shown = excerpt(text.split("\n")[line - 1].strip())
        raise DataError(
            f"not valid JSON{column} ({problem}): {shown}",
            where=f"{path}:{first + line - 1}",
            expected=expected,
            remedy=remedy,
        ) from None


def _object(row: Any, where: str, shown: Any) -> Row:
    if not isinstance(row, dict):
        given = f"a JSON {type(row).__name__}: {excerpt(shown)}"
        wanted = (
            'a JSON object, such as {"messages": [...]}'
            if isinstance(row, list)
            else "a JSON object"
        )
        raise DataError(given, where=where, expected=wanted)
    return where, row


def _table(path: Path, text: str, usual: str, skips: Skips) -> list[Row]:
    """Read a CSV; an Excel may begin it with `sep=;`, and writes semicolons in some countries."""
    first, _, rest = text.partition("\n")
    if match := re.fullmatch(r"sep=(.)\r?", first):
        return list(_csv(path, rest, match[1], skips, 2))
    columns = {}
    for delimiter in dict.fromkeys((usual, ",", ";", "\t", "|")):
        with contextlib.suppress(csv.Error):
            columns[delimiter] = len(next(csv.reader(io.StringIO(text), delimiter=delimiter)))
    likely = usual if columns.get(usual, 2) > 1 else max(columns, key=columns.__getitem__)
    return list(_csv(path, text, likely, skips))


def _csv(path: Path, text: str, delimiter: str, skips: Skips, first: int = 1) -> Iterator[Row]:
    """Yield the rows of a CSV whose header is on this line of the file."""
    limit = csv.field_size_limit(_MAX_CELL)
    spaced = _spaced(text, delimiter)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=spaced
    )
    try:
        header = [name.strip() for name in next(reader)]
        if twice := [name for name in header if header.count(name) > 1]:
            raise DataError(
                f"two columns are called {excerpt(twice[0])!r}",
                where=f"{path}:{first}",
                expected="a different name for every column",
                remedy="rename or remove one of them",
            )
        line = reader.line_num + first
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + first
            if not any(map(str.strip, cells)):
                continue  # a spreadsheet may write many empty rows at the end
            if cells and len(cells) == len(header):
                yield where, dict(zip(header, cells, strict=True))
            elif cells:
                skips.take(
                    DataError(
                        f"{counted(len(cells), 'cell')} under {counted(len(header), 'column')}: "
                        f"{excerpt(cells)}",
                        where=where,
                        expected="as many cells as the header has, which is line "
                        f"{first}: {excerpt(delimiter.join(header))}",
                        remedy=_QUOTE,
                    )
                )
    except csv.Error as error:
        raise DataError(
            f"not valid CSV: {error}",
            where=f"{path}:{max(1, reader.line_num) + first - 1}",
            expected="CSV with a header",
            remedy=_QUOTE,
        ) from None
    finally:
        csv.field_size_limit(limit)


def _spaced(text: str, delimiter: str) -> bool:
    """Tell if quoted cells follow a space, which would make the quotes a part of the text."""
    with contextlib.suppress(csv.Error):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        return any(c.startswith(' "') for cells in itertools.islice(reader, _MANY) for c in cells)
    return False


def _parquet(path: Path, raw: bytes) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"not valid parquet: {excerpt(str(error))}",
            where=str(path),
            remedy="write the file again, or give the rows as .jsonl",
        ) from None
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)]


def _hub(source: DataSource) -> list[Row]:
    name = source.hub or ""
    # `load_dataset` would prefer a local folder of that name.
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or Path(name).exists():
        raise DataError(
            f"{name!r:.100} is no Hub dataset", expected="org/name", remedy="use path: for a file"
        )
    import datasets

    try:
        rows = datasets.load_dataset(
            source.hub,
            source.name,
            data_dir=source.data_dir,
            split=source.split,
            revision=source.revision,
        )
    except Exception as error:  # the library, the network and the file system raise many kinds
        raise DataError(
            f"the Hub dataset cannot be loaded: {type(error).__name__}: {excerpt(str(error), 300)}",
            where=str(source.hub),
            expected="a dataset that can be reached, with this name: (configuration), split: and "
            "revision:",
            remedy="go online or log in once to fill the cache, or download the file and give its "
            "`path:` instead of `hub:`",
        ) from None
    place = f"{source.hub}[{source.split}] row"
    return [(f"{place} {number}", dict(row)) for number, row in enumerate(rows, start=1)]
