"""A digest in every row that somebody's work hangs on: a bit that flips in it is named, not believed (D6).

SQLite checks how its pages hang together, not what stands in them. Events and operations tell of the past and have no
seal.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3

SEALED = {
    "sandboxes": (
        "id", "name", "state", "spec", "created_at", "started_at", "boot_id", "incarnation", "workspace", "error",
        "disks", "parent", "memory", "payloads", "trash",
    ),
    "settings": ("key", "value"),
}  # fmt: skip
SINCE = 3  # the migration that brought the column


def teach(connection: sqlite3.Connection) -> None:
    """Give a connection the function `seal(…)`."""
    connection.create_function("seal", -1, _seal, deterministic=True)


def expression(table: str) -> str:
    """What the column `seal` of this table must hold, in SQL."""
    return f"seal({', '.join(SEALED[table])})"


def broken(connection: sqlite3.Connection) -> str | None:
    """The first row whose seal is another than its content's, None when all is well."""
    for table, (key, *_) in SEALED.items():
        row = connection.execute(f"SELECT {key} FROM {table} WHERE seal IS NOT {expression(table)} LIMIT 1").fetchone()
        if row is not None:
            return f"the row {row[0]!r} of {table} is not as it was written"
    return None


def _seal(*values: str | int | float | None) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
