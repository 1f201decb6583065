"""The one connection to the state database, and the questions that are asked of it.

Calls are synchronous and run in the event loop's thread: every statement touches a few rows by key, a commit costs one
fsync of the write-ahead log (about a millisecond). What would take longer (`back_up`) has its own connection and runs
in a thread. A transaction is either wholly on the disk when the call returns, or not at all after a crash.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Unpack

from limpet.errors import AlreadyExists, FailedPrecondition, InsufficientSpace, NotFound, nearest
from limpet.models import Event, Operation
from limpet.paths import Paths
from limpet.store import _backup, _lock, _records, _schema, _seals
from limpet.store._records import SandboxChanges, SandboxRecord

EVENTS_KEPT = 100_000
_PRUNE_EVERY = 1_000  # events; so that not every append deletes

_PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "trusted_schema": 0}  # synchronous 2 = FULL

_SANDBOX = ", ".join(_records.SANDBOX_COLUMNS)
_EVENT = ", ".join(_records.EVENT_COLUMNS)
_OPERATION = ", ".join(_records.OPERATION_COLUMNS)


class Store:
    """Sandboxes, events and operations. Opened by one daemon at a time; use it from one thread."""

    def __init__(self, connection: sqlite3.Connection, lock: int, events_kept: int) -> None:
        self._db = connection
        self._lock = lock
        self._events_kept = events_kept
        self._depth = 0  # 1 inside a transaction

    @classmethod
    def open(cls, paths: Paths, *, events_kept: int = EVENTS_KEPT) -> Store:
        """Take the state directory and its database. Raises FailedPrecondition when another daemon has it, when the
        database is damaged, or when it was written by a newer limpet; nothing is changed then."""
        lock = _lock.acquire(paths.state_lock)
        try:
            _backup.inspect(paths)
            connection = _connect(paths)
        except BaseException:
            os.close(lock)
            raise
        return cls(connection, lock, events_kept)

    def close(self) -> None:
        """Let go of database and directory; what was committed is on the disk already."""
        self._db.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the writes of a block one: all or none, one fsync. May be nested; the outermost one commits.
        Nothing may be awaited inside."""
        if self._depth:
            yield  # a part of the transaction around it
            return
        self._depth = 1
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise InsufficientSpace("no space left to record the change", hint="free some space") from error
            raise
        finally:
            self._depth = 0
            if self._db.in_transaction:  # not committed
                self._db.execute("ROLLBACK")

    # Sandboxes

    def sandboxes(self) -> list[SandboxRecord]:
        """All of them, oldest first."""
        rows = self._db.execute(f"SELECT {_SANDBOX} FROM sandboxes ORDER BY created_at, id")
        return [_records.sandbox(row) for row in rows]

    def sandbox_by_id(self, sandbox_id: str) -> SandboxRecord:
        """Raises NotFound."""
        row = self._one(f"SELECT {_SANDBOX} FROM sandboxes WHERE id = ?", sandbox_id)
        if row is None:
            raise NotFound(f"no sandbox with the id {sandbox_id}", hint="see `limpet ls`")
        return _records.sandbox(row)

    def sandbox_by_name(self, name: str) -> SandboxRecord:
        """Raises NotFound with the nearest name that exists."""
        row = self._one(f"SELECT {_SANDBOX} FROM sandboxes WHERE name = ?", name)
        if row is None:
            known = [str(found) for (found,) in self._db.execute("SELECT name FROM sandboxes WHERE name NOT LIKE '+%'")]
            raise NotFound(f"no sandbox named {name!r}", hint=nearest(name, known) or "see `limpet ls`")
        return _records.sandbox(row)

    def insert_sandbox(self, record: SandboxRecord) -> None:
        """Reserve name and row in one step. Raises AlreadyExists."""
        marks = ", ".join("?" * len(_records.SANDBOX_COLUMNS))
        with _name_taken(record.name), self.transaction():
            self._db.execute(f"INSERT INTO sandboxes ({_SANDBOX}) VALUES ({marks})", _records.sandbox_row(record))
            self._seal("sandboxes", record.id)

    def update_sandbox(self, sandbox_id: str, **changes: Unpack[SandboxChanges]) -> SandboxRecord:
        """Change some columns; the record as it is then. Raises NotFound, AlreadyExists (name)."""
        unknown = changes.keys() - SandboxChanges.__annotations__.keys()
        if unknown:
            raise TypeError(f"sandboxes have no {', '.join(sorted(unknown))} to change")
        with _name_taken(str(changes.get("name"))), self.transaction():
            if changes:
                settings = ", ".join(f"{column} = ?" for column in changes)
                values = [_records.to_column(value) for value in changes.values()]
                self._db.execute(f"UPDATE sandboxes SET {settings} WHERE id = ?", (*values, sandbox_id))
                self._seal("sandboxes", sandbox_id)
            return self.sandbox_by_id(sandbox_id)

    def delete_sandbox(self, sandbox_id: str) -> None:
        """Forget it; not an error when it is gone already."""
        with self.transaction():
            self._db.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,))

    # Settings

    def settings(self) -> dict[str, str]:
        """The settings that were changed from their defaults."""
        return {str(key): str(value) for key, value in self._db.execute("SELECT key, value FROM settings")}

    def save_setting(self, key: str, value: str | None) -> None:
        """Change a setting; None: back to its default."""
        with self.transaction():
            self._db.execute("DELETE FROM settings WHERE key = ?", (key,))
            if value is not None:
                self._db.execute("INSERT INTO settings (key, value) VALUES (?, ?)", (key, value))
                self._seal("settings", key)

    # Events

    def append_event(
        self,
        kind: str,
        *,
        sandbox: str | None = None,
        sandbox_id: str | None = None,
        op_id: str | None = None,
        data: dict[str, Any] | None = None,
    ) -> Event:
        """Write one event; it gets the next number. Events beyond the retention are dropped from time to time."""
        row = (datetime.now(UTC).isoformat(), kind, sandbox, sandbox_id, op_id, _records.to_column(data or {}))
        with self.transaction():
            cursor = self._db.execute(
                "INSERT INTO events (time, kind, sandbox, sandbox_id, op_id, data) VALUES (?, ?, ?, ?, ?, ?)", row
            )
            seq = cursor.lastrowid
            assert seq is not None
            if seq % min(_PRUNE_EVERY, self._events_kept) == 0:
                self._db.execute("DELETE FROM events WHERE seq <= ?", (seq - self._events_kept,))
        return _records.event((seq, *row))

    def events_after(self, seq: int, *, limit: int = 500) -> list[Event]:
        """The next `limit` events with a higher number, in order."""
        rows = self._db.execute(f"SELECT {_EVENT} FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit))
        return [_records.event(row) for row in rows]

    def first_event(self) -> int:
        """The number of the oldest event that is kept; that of the next one when none is."""
        row = self._one("SELECT MIN(seq) FROM events")
        return self.last_event() + 1 if row is None or row[0] is None else int(row[0])

    def last_event(self) -> int:
        """The highest number ever given; 0 before the first."""
        row = self._one("SELECT seq FROM sqlite_sequence WHERE name = 'events'")
        return 0 if row is None else int(row[0])

    # Operations

    def save_operation(self, operation: Operation) -> None:
        """Insert it, or replace what is known of it."""
        marks = ", ".join("?" * len(_records.OPERATION_COLUMNS))
        with self.transaction():
            self._db.execute(
                f"INSERT OR REPLACE INTO operations ({_OPERATION}) VALUES ({marks})", _records.operation_row(operation)
            )

    def operations(self, state: str | None = None) -> list[Operation]:
        """All of them (or those in one state), oldest first."""
        rows = self._db.execute(
            f"SELECT {_OPERATION} FROM operations WHERE ?1 IS NULL OR state = ?1 ORDER BY started_at, id", (state,)
        )
        return [_records.operation(row) for row in rows]

    def operation(self, operation_id: str) -> Operation | None:
        row = self._one(f"SELECT {_OPERATION} FROM operations WHERE id = ?", operation_id)
        return None if row is None else _records.operation(row)

    def delete_operation(self, operation_id: str) -> None:
        with self.transaction():
            self._db.execute("DELETE FROM operations WHERE id = ?", (operation_id,))

    def prune_operations(self, keep: int) -> None:
        """Drop the oldest operations that ended, beyond the newest `keep`."""
        with self.transaction():
            self._db.execute(
                "DELETE FROM operations WHERE state != 'running' AND id NOT IN "
                "(SELECT id FROM operations ORDER BY started_at DESC, id DESC LIMIT ?)",
                (keep,),
            )

    def _seal(self, table: str, key: str) -> None:
        """Seal a row that was just written, in the same transaction."""
        column = _seals.SEALED[table][0]
        self._db.execute(f"UPDATE {table} SET seal = {_seals.expression(table)} WHERE {column} = ?", (key,))

    def _one(self, query: str, *values: object) -> _records.Row | None:
        row: _records.Row | None = self._db.execute(query, values).fetchone()
        return row


def _connect(paths: Paths) -> sqlite3.Connection:
    """A connection in autocommit mode (transactions are explicit) with the pragmas in force and the schema current."""
    os.close(os.open(paths.database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite would make it 0644
    connection = sqlite3.connect(paths.database, isolation_level=None)
    _seals.teach(connection)
    try:
        _schema.refuse_newer(connection)
        for pragma, value in _PRAGMAS.items():
            connection.execute(f"PRAGMA {pragma} = {value}")
            found = connection.execute(f"PRAGMA {pragma}").fetchone()[0]
            if found != value:
                raise FailedPrecondition(
                    f"SQLite gives {pragma} = {found} for {paths.database} instead of {value}",
                    hint="put the state on a local file system (LIMPET_HOME)",
                )
        if 0 < _schema.version(connection) < _schema.VERSION:
            _backup.back_up(paths, max_age=0)
        _schema.migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _name_taken(name: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_UNIQUE:
            raise
        hint = f"choose another name, or remove that one with `limpet rm {name}`"
        raise AlreadyExists(f"there is a sandbox named {name!r} already", hint=hint) from None
