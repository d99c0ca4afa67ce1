# SPDX-License-Identifier: Apache-2.0
"""The usage store: one row for each request of chat, server and verbs, and thumbs, in SQLite.

A request's row has numbers only: neither prompt nor answer. A keyed hash of the prompt finds the
requests with the same prompt, so that two adapters can be compared on it; the key is in the file.
Only a thumb stores text: the conversation and the answer that somebody judged.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lora_rlhf import extras
from lora_rlhf.errors import UsageError
from lora_rlhf.runtime.sqlite_file import SqliteFile

if TYPE_CHECKING:
    from sqlalchemy import Connection

sa: Any = extras.load("sqlalchemy", "the usage store", "serve")

NAME = "lora-rlhf-usage.sqlite"
"""The default file, in the current directory."""

LONGEST_COMMENT = 5_000

_TEXT, _FLOAT, _INT, _BOOL = sa.Text, sa.Float, sa.Integer, sa.Boolean
_USES = {
    "id": _TEXT, "created": _FLOAT, "kind": _TEXT, "model": _TEXT, "version": _TEXT,
    "status": _INT, "prompt_tokens": _INT, "completion_tokens": _INT, "queue_s": _FLOAT,
    "first_token_s": _FLOAT, "seconds": _FLOAT, "blocked": _BOOL, "valid": _BOOL,
    "completed": _BOOL, "prompt": _TEXT,
}  # fmt: skip
_THUMBS = {
    "id": _TEXT, "choice": _INT, "created": _FLOAT, "good": _BOOL, "comment": _TEXT,
    "model": _TEXT, "version": _TEXT, "messages": _TEXT, "answer": _TEXT,
}  # fmt: skip
_MAY_BE_NULL = ("first_token_s", "valid", "completed")

_META = sa.MetaData()


def _table(name: str, columns: Mapping[str, Any], key: str = "row") -> Any:
    made = (sa.Column(c, kind, nullable=c in _MAY_BE_NULL) for c, kind in columns.items())
    return sa.Table(name, _META, sa.Column(key, sa.Integer, primary_key=True), *made)


_uses, _thumbs = _table("uses", _USES), _table("thumbs", _THUMBS)
_settings = _table("settings", {"name": _TEXT, "value": _TEXT})
sa.Index("use_of", _uses.c.id)
sa.Index("thumb_of", _thumbs.c.id)


def new_id() -> str:
    """Return an id for a completion."""
    return f"chatcmpl-{secrets.token_hex(12)}"


@dataclass(frozen=True)
class Use:
    """One request: numbers, and no text.

    Args:
        kind: chat, serve or do.
        version: The adapter's sha256; empty for the base.
        status: As of HTTP: 200; 499 for one that was cancelled.
        prompt: The turns; only a keyed hash of them is stored.
        valid: The structured answer passed its check; None if none was wanted.
        completed: The answer passed all checks of its verb; None if there were none.
    """

    id: str
    kind: str
    model: str
    version: str = ""
    status: int = 200
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float = 0.0
    first_token_s: float | None = None
    seconds: float = 0.0
    blocked: bool = False
    valid: bool | None = None
    completed: bool | None = None
    prompt: Sequence[Mapping[str, str]] = ()
    created: float = field(default_factory=time.time)


class UsageStore(SqliteFile):
    """The file with all uses and thumbs; `with UsageStore(path) as store` makes it if needed."""

    APPLICATION, TABLES, HOLDS = 0x4C6F5255, _META, "uses"
    EXPECTED = f"a file of chat, do or serve, such as {NAME}"
    MAKE = "use a model with chat, do or `lora-rlhf serve`, or give the file of their --usage"
    _key = b""

    def open(self, create: bool = False, readonly: bool = False) -> Self:
        """Open the file; a new one can be read by its owner only, since thumbs have texts."""
        if create:
            with contextlib.suppress(OSError):  # SQLite will say it
                self.path.touch(mode=0o600)
        return super().open(create, readonly)

    def __enter__(self) -> Self:
        return self if self._engine is not None else self.open(create=True)

    def _made(self, connection: Connection) -> None:
        connection.execute(sa.insert(_settings), {"name": "key", "value": secrets.token_hex(32)})

    def _opened(self, connection: Connection) -> None:
        query = sa.select(_settings.c.value).where(_settings.c.name == "key")
        self._key = bytes.fromhex(connection.execute(query).scalar_one())

    def record(self, use: Use) -> None:
        """Save one request."""
        turns = _json([dict(turn) for turn in use.prompt]).encode()
        hashed = hmac.new(self._key, turns, hashlib.sha256).hexdigest() if use.prompt else ""
        with self._transaction(synced=False) as connection:
            connection.execute(sa.insert(_uses), {**asdict(use), "prompt": hashed})

    def knows(self, completion: str) -> bool:
        """Return True if a completion has this id."""
        with self._transaction(reads=True) as connection:
            query = sa.select(_uses.c.row).where(_uses.c.id == completion).limit(1)
            return connection.execute(query).first() is not None

    def thumb(
        self,
        completion_id: str,
        good: bool,
        comment: str = "",
        messages: Sequence[Mapping[str, str]] = (),
        answer: str = "",
        *,
        model: str = "",
        version: str = "",
        choice: int = 0,
    ) -> None:
        """Save a thumb with the text that it is about; the last one on an answer counts.

        Raises:
            UsageError: The comment is too long.
        """
        if len(comment) > LONGEST_COMMENT:
            raise UsageError(
                f"the comment has {len(comment)} characters", expected=f"at most {LONGEST_COMMENT}"
            )
        row = {
            "id": completion_id, "choice": choice, "created": time.time(), "good": good,
            "comment": comment, "model": model, "version": version, "answer": answer,
            "messages": _json([dict(turn) for turn in messages]),
        }  # fmt: skip
        with self._transaction() as connection:
            connection.execute(sa.insert(_thumbs), row)

    def uses(self) -> list[dict[str, Any]]:
        """Return all requests in their order, each with `thumbs`: choice -> whether it is up."""
        thumbs: dict[str, dict[int, bool]] = defaultdict(dict)
        for row in self.thumbs():
            thumbs[row["id"]][row["choice"]] = row["good"]
        return [{**row, "thumbs": thumbs.get(row["id"], {})} for row in self._rows(_uses)]

    def thumbs(self) -> list[dict[str, Any]]:
        """Return the last thumb on each answer, with its text."""
        last = {(row["id"], row["choice"]): row for row in self._rows(_thumbs)}
        return [{**row, "messages": json.loads(row["messages"])} for row in last.values()]

    def tasks(self) -> list[dict[str, Any]]:
        """Return thumbs down whose conversation and answer are stored, for labelers."""
        return [row for row in self.thumbs() if not row["good"] and row["messages"]]

    def _rows(self, table: Any) -> list[dict[str, Any]]:
        with self._transaction(reads=True) as connection:
            rows = connection.execute(sa.select(table).order_by(table.c.row)).mappings()
            return [dict(row) for row in rows]


def opened(path: Path | None) -> UsageStore | None:
    """Open a store, which is made if there is none; None stays None, for `--no-usage`."""
    return None if path is None else UsageStore(path).open(create=True)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
