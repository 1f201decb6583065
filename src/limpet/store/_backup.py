"""Looking at a database before it is trusted, and the copy that is kept beside it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

from limpet import durable
from limpet.errors import FailedPrecondition
from limpet.paths import Paths
from limpet.store import _schema, _seals

DAY = 24 * 3600.0


def inspect(paths: Paths) -> None:
    """Raise FailedPrecondition when the database is missing though it was there, damaged, or unreadable.

    Reads only: whatever is wrong, no byte of it is changed, so that it can still be rescued.
    """
    database, backup = paths.database, paths.database_backup
    if not database.exists() or database.stat().st_size == 0:
        # SQLite would take this for a new database; with a backup beside it, it is a lost one.
        if backup.exists():
            raise _damaged(paths, "it is missing" if not database.exists() else "it is empty")
        return
    try:
        with contextlib.closing(_open_read_only(database)) as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found == "ok" and _schema.version(connection) >= _seals.SINCE:
                _seals.teach(connection)
                found = _seals.broken(connection) or found
    except sqlite3.DatabaseError as error:
        raise _damaged(paths, str(error)) from error
    if found != "ok":
        raise _damaged(paths, str(found).replace("\n", " "))


def back_up(paths: Paths, *, max_age: float = DAY) -> bool:
    """Copy the database to its backup unless that is younger than `max_age` seconds; whether a copy was made.

    Uses a connection of its own, so that it may run in a thread while the daemon works. Raises sqlite3.Error, OSError.
    """
    target = paths.database_backup
    with contextlib.suppress(FileNotFoundError):
        if time.time() - target.stat().st_mtime < max_age:
            return False
    staging = durable.staging(paths.data, "backup")
    try:
        copy = staging / target.name
        with contextlib.closing(_open_read_only(paths.database)) as connection:
            connection.execute("VACUUM INTO ?", (os.fspath(copy),))
        copy.chmod(0o600)
        durable.publish(copy, target)
    finally:
        durable.remove_tree(staging)
    return True


def _open_read_only(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)


def _damaged(paths: Paths, why: str) -> FailedPrecondition:
    if paths.database_backup.exists():
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(paths.database_backup.stat().st_mtime))
        remedy = f"to restore the copy of {made}: mv {paths.database} {paths.database}.damaged; "
        remedy += f"rm -f {paths.database}-wal {paths.database}-shm; cp {paths.database_backup} {paths.database}"
    else:
        remedy = f"move {paths.database} away to begin with an empty state; disks under {paths.sandboxes} stay"
    return FailedPrecondition(f"the state file {paths.database} is damaged: {why}", hint=remedy)
