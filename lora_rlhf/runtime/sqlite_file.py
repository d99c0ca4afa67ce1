# SPDX-License-Identifier: Apache-2.0
"""An SQLite file of ours, opened through SQLAlchemy: its version, transactions, errors.

SQLAlchemy is in extras, which the module of each store names.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lora_rlhf.errors import (
    BusyError,
    DamageError,
    DiskError,
    LoraRlhfError,
    SetupError,
    UsageError,
    first_line,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, MetaData


class SqliteFile:
    """A file with tables of ours; safe among threads.

    Other processes may use the file at the same time: each change is one transaction.
    """

    APPLICATION: ClassVar[int]
    """SQLite's application_id."""
    VERSION: ClassVar[int] = 1
    """Version of the tables: SQLite's user_version."""
    MIGRATIONS: ClassVar[dict[int, tuple[str, ...]]] = {}
    """Version -> statements that lead from it to the next one."""
    TABLES: ClassVar[MetaData]
    BUSY_SECONDS: ClassVar[float] = 5.0
    HOLDS: ClassVar[str]
    """Content of the file, such as `labels`, for errors."""
    EXPECTED: ClassVar[str]
    """The file that was expected, for errors."""
    MAKE: ClassVar[str]
    """The command that makes one, or opens one for writing, for errors."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._readonly, self._synced, self._reading_only = False, True, False

    def open(self, create: bool = False, readonly: bool = False) -> Self:
        """Open the file, and check it.

        Args:
            readonly: Only read, also from a folder that cannot be written.

        Raises:
            UsageError: There is no such file, and `create` is False.
            SetupError: The file is of another version or program, or is not as it was written.
            BusyError: Another process keeps it locked.
            DiskError: It cannot be written.
        """
        if not create and not self.path.is_file():
            raise UsageError(
                f"there is no store of {self.HOLDS} here",
                where=str(self.path),
                expected=self.EXPECTED,
                remedy=self.MAKE,
            )
        self._readonly = readonly
        self._engine = self._connected(create, readonly)
        try:
            with self._transaction() as connection:
                check = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
                if check != "ok":
                    raise self._known("SQLITE_CORRUPT", str(check).splitlines()[-1])
                self._check_version(connection, readonly)
                self._opened(connection)
        except BaseException:
            self.close()
            raise
        return self

    def _opened(self, connection: Connection) -> None:
        """Check or change what the tables hold."""

    def _made(self, connection: Connection) -> None:
        """Add what a new file holds beside its tables."""

    def close(self) -> None:
        """Close the file; the store may be opened again."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connected(self, create: bool, readonly: bool) -> Engine:
        import sqlalchemy as sa

        mode = "ro" if readonly else "rwc" if create else "rw"
        query = {"mode": mode, "uri": "true"}
        if readonly and not Path(f"{self.path}-wal").exists():
            query["immutable"] = "1"  # else SQLite would make files beside it
        url = sa.URL.create("sqlite", database=self.path.absolute().as_uri(), query=query)
        engine: Engine = sa.create_engine(
            url,
            poolclass=sa.StaticPool,
            connect_args={"timeout": self.BUSY_SECONDS, "check_same_thread": False},
        )

        def connected(raw: Any, _: Any) -> None:
            raw.isolation_level = None  # transactions begin where we say so
            if readonly:
                return
            [application] = raw.execute("PRAGMA application_id").fetchone()
            [tables] = raw.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application == self.APPLICATION or not tables:  # others' files stay as they are
                raw.execute("PRAGMA journal_mode=WAL")

        def begun(connection: Connection) -> None:
            if not readonly:
                kind = "FULL" if self._synced else "NORMAL"
                connection.exec_driver_sql(f"PRAGMA synchronous={kind}")
            connection.exec_driver_sql("BEGIN" if self._reading_only else "BEGIN IMMEDIATE")

        sa.event.listen(engine, "connect", connected)
        sa.event.listen(engine, "begin", begun)
        return engine

    @contextlib.contextmanager
    def _transaction(self, *, synced: bool = True, reads: bool = False) -> Iterator[Connection]:
        """Begin a transaction.

        Args:
            synced: Wait for the disk at its end. What a power cut may undo need not wait; a later
                synced one takes the earlier ones along.
            reads: Nothing is written.
        """
        with self._lock, self._translated():
            if self._engine is None:
                raise RuntimeError("the store is not open")
            self._synced, self._reading_only = synced, reads or self._readonly
            with self._engine.begin() as connection:
                yield connection

    def _check_version(self, connection: Connection, readonly: bool) -> None:
        """Make the tables of a new file, or bring those of an older version up to date."""
        number = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        application = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
        empty = not connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
        if empty and not readonly:
            self.TABLES.create_all(connection)
            self._made(connection)
        elif application != self.APPLICATION:
            raise SetupError(
                "this SQLite file was not made by lora-rlhf, or holds something else",
                where=str(self.path),
                expected=self.EXPECTED,
            )
        elif number > self.VERSION or (
            number < self.VERSION and (readonly or number not in self.MIGRATIONS)
        ):
            newer = number > self.VERSION
            raise SetupError(
                f"the store has version {number}",
                where=str(self.path),
                expected=f"version {self.VERSION}",
                remedy="update lora-rlhf" if newer else f"open it once for writing: {self.MAKE}",
            )
        else:
            for before in range(number, self.VERSION):
                for statement in self.MIGRATIONS[before]:
                    connection.exec_driver_sql(statement)
        if not readonly:
            connection.exec_driver_sql(f"PRAGMA application_id={self.APPLICATION}")
            connection.exec_driver_sql(f"PRAGMA user_version={self.VERSION}")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        import sqlalchemy as sa

        try:
            yield
        except (sqlite3.Error, sa.exc.DBAPIError) as error:
            raw = getattr(error, "orig", None) or error
            name = getattr(raw, "sqlite_errorname", "")
            raise self._known(name, first_line(raw)) from error

    def _known(self, name: str, text: str) -> LoraRlhfError:
        """Return our error for one of SQLite's codes, such as SQLITE_BUSY."""
        code = name.removeprefix("SQLITE_").split("_")[0]
        if code in ("BUSY", "LOCKED"):
            return BusyError(
                f"another process has kept the store locked for {self.BUSY_SECONDS:g} seconds",
                where=str(self.path),
                remedy="close the program that has the file open, and try again",
            )
        if code in ("READONLY", "CANTOPEN", "FULL", "IOERR", "PERM"):
            return DiskError(
                f"the store cannot be written: {text}",
                where=str(self.path),
                expected="a file and a folder that this user may write, and free space",
                remedy="change their permissions, or make room; "
                f"{self.HOLDS} that were saved are intact",
            )
        if code == "NOTADB":
            return UsageError(
                "this is not a SQLite file, or its first bytes are damaged",
                where=str(self.path),
                expected="the file that lora-rlhf wrote",
                remedy="check its name; if it is the right one, restore it from a backup",
            )
        return DamageError(
            f"the store is damaged: {text} ({name or 'SQLite'})",
            where=str(self.path),
            expected="the SQLite file as lora-rlhf wrote it",
            remedy="restore it from a backup",
        )
