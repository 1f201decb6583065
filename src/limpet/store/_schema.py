"""The tables, as forward-only migrations: `user_version` n means that the first n of them were applied.

Never edit one that was released; append. No column may ever hold a process id: what is true now is not stored (VM-9).
"""

from __future__ import annotations

import sqlite3

from limpet.errors import FailedPrecondition
from limpet.store import _seals

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE sandboxes (
             id TEXT PRIMARY KEY,
             name TEXT NOT NULL UNIQUE,
             state TEXT NOT NULL,
             spec TEXT NOT NULL,              -- models.SandboxSpec as JSON
             created_at TEXT NOT NULL,        -- ISO 8601, UTC, as all times here
             started_at TEXT,
             boot_id TEXT,
             incarnation INTEGER NOT NULL,
             workspace TEXT,                  -- models.WorkspaceInfo as JSON
             error TEXT
           ) STRICT""",
        # AUTOINCREMENT: a sequence number is never given twice, also after the newest rows were removed
        """CREATE TABLE events (
             seq INTEGER PRIMARY KEY AUTOINCREMENT,
             time TEXT NOT NULL,
             kind TEXT NOT NULL,
             sandbox TEXT,
             sandbox_id TEXT,
             op_id TEXT,
             data TEXT NOT NULL
           ) STRICT""",
        """CREATE TABLE operations (
             id TEXT PRIMARY KEY,
             kind TEXT NOT NULL,
             target TEXT,
             state TEXT NOT NULL,
             stages TEXT NOT NULL,
             result TEXT,
             error TEXT,
             started_at TEXT NOT NULL,
             ended_at TEXT
           ) STRICT""",
        "CREATE INDEX operations_by_state ON operations (state, started_at)",
    ),
    (
        "ALTER TABLE sandboxes ADD COLUMN disks TEXT",  # {"root": layer, "data": layer} as JSON
        "ALTER TABLE sandboxes ADD COLUMN parent TEXT",  # a checkpoint's id
        "ALTER TABLE sandboxes ADD COLUMN memory TEXT",  # a checkpoint's id, while suspended
        "CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    ),
    (
        "ALTER TABLE sandboxes ADD COLUMN payloads TEXT",  # [models.Payload, …] as JSON; NULL: none
        "ALTER TABLE sandboxes ADD COLUMN trash TEXT",  # {"name", "removed_at", "state"} as JSON, while trashed
        "ALTER TABLE sandboxes ADD COLUMN seal TEXT",  # _seals.py
        "ALTER TABLE settings ADD COLUMN seal TEXT",
        *(f"UPDATE {table} SET seal = {_seals.expression(table)}" for table in _seals.SEALED),
    ),
)
VERSION = len(MIGRATIONS)


def version(connection: sqlite3.Connection) -> int:
    """How many migrations this database has seen; 0 for an empty one."""
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return found


def refuse_newer(connection: sqlite3.Connection) -> None:
    """Raise FailedPrecondition when a newer limpet wrote this database."""
    if (found := version(connection)) > VERSION:
        raise FailedPrecondition(
            f"the state was written by a newer limpet (schema {found}, this one knows {VERSION})",
            hint="upgrade limpet, or set LIMPET_HOME to use another state directory",
        )


def migrate(connection: sqlite3.Connection) -> None:
    """Apply what is missing, each migration in one transaction together with its number."""
    for number, statements in enumerate(MIGRATIONS, start=1):
        if number <= version(connection):
            continue
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
