"""The database after a kill or a power loss: what was acknowledged is there, and no half of anything (D3, D5).

SQLite writes its files itself, so that `durable` cannot record them. What counts of it here is what we ask it for, an
fsync of its log at every commit (synchronous=FULL), and that our own look at the files before they are trusted takes
any log that a crash may leave. So the log is cut and zeroed beyond what was synced, and the copy of it as well; that
SQLite keeps its word is proven by its own tests.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limpet import durable
from limpet.durable import Op
from limpet.models import SandboxSpec, State
from limpet.paths import Paths
from limpet.store import SandboxRecord, Store, back_up
from tests.crash.counting import COUNT, Loss, noticed
from tests.crash.proving import Workload, prove
from tests.crash.simulator import Disk
from tests.unit.images_kit import paths_in

_FRAME = 24 + 4096  # bytes of one page in the log
_ROUNDS = 20 if os.environ.get("LIMPET_TEST_CRASH") == "all" else 3


def _record(number: int) -> SandboxRecord:
    return SandboxRecord(f"sb_{number}", f"box{number}", State.STOPPED, SandboxSpec(), datetime.now(UTC))


def _names(paths: Paths) -> set[str]:
    """What the next daemon finds."""
    store = Store.open(paths)
    try:
        return {record.name for record in store.sandboxes()}
    finally:
        store.close()


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[Paths]:
    (tmp_path / "home").mkdir()
    yield paths_in(tmp_path / "home")


def _logged(paths: Paths, count: int) -> tuple[Disk, list[tuple[list[Op], int]]]:
    """The disk before, and of each commit what it added to the log, in pieces."""
    store = Store.open(paths)
    disk, commits = Disk(paths.data), []
    log = paths.database.with_name(f"{paths.database.name}-wal")
    try:
        assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
        for number in range(count):
            before = log.stat().st_size if log.exists() else 0
            store.insert_sandbox(_record(number))
            added = log.read_bytes()[before:]
            pieces = range(0, len(added), _FRAME)
            ops = [Op("write", log, data=added[at : at + _FRAME], offset=before + at) for at in pieces]
            commits.append((ops, number + 1))
        return disk, commits
    finally:
        store.close()


@pytest.mark.parametrize("synced", [True, False], ids=["as-it-is", "unsynced"])
def test_a_database_after_a_power_loss_has_every_commit_and_no_half_of_one(paths: Paths, synced: bool) -> None:
    """D3, D5; and a negative control: a log that is not synced loses what was acknowledged."""
    disk, commits = _logged(paths, 6)
    log = paths.database.with_name(f"{paths.database.name}-wal")
    if synced:
        _prove(paths, disk, commits, log, synced=True)
        return
    with noticed("acknowledged"):
        _prove(paths, disk, commits, log, synced=False)


def _prove(paths: Paths, disk: Disk, commits: list[tuple[list[Op], int]], log: Path, *, synced: bool) -> None:
    for ops, count in commits:
        for op in ops:
            disk.apply(op)
            _demand(paths, disk, count - 1, count)
        if synced:
            disk.apply(Op("fsync", log))
        _demand(paths, disk, count, count)


def _demand(paths: Paths, disk: Disk, acked: int, begun: int) -> None:
    for state in disk.states(begun, 32, random.Random(begun)):
        home = paths.data.parent / "state"
        home.mkdir()
        try:
            state.materialize(home / "data")
            found = _names(Paths(home / "data", home / "cache", home / "run"))
        finally:
            shutil.rmtree(home)
        COUNT.simulated += 1
        legal = [{f"box{number}" for number in range(count)} for count in (acked, begun)]
        if found not in legal:
            COUNT.losses.append(complaint := f"{acked} commits were acknowledged, there are {sorted(found)}")
            raise Loss(complaint)


@pytest.mark.parametrize("seed", range(_ROUNDS))
def test_a_process_killed_between_commits_has_lost_none_that_it_told(paths: Paths, seed: int) -> None:
    """D5."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            store = Store.open(paths)
            for number in range(100_000):
                store.insert_sandbox(_record(number))
                os.write(writing, b"%d\n" % number)
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(random.Random(seed).uniform(0.1, 0.6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as told:
        acked = len(told.read().splitlines())
    COUNT.faults += 1
    COUNT.states += 1
    found = _names(paths)
    assert acked > 0 and len(found) in (acked, acked + 1)


def test_the_copy_of_the_database_is_the_old_one_or_the_new_one(paths: Paths) -> None:
    """D5: published as everything is."""

    def setup(directory: Path) -> None:
        (directory / "data").mkdir()
        store = Store.open(_in(directory))
        store.insert_sandbox(_record(0))
        store.close()
        back_up(_in(directory))

    def again(directory: Path) -> None:
        store = Store.open(_in(directory))
        store.insert_sandbox(_record(1))
        store.close()
        back_up(_in(directory), max_age=0)

    def check(directory: Path, acked: int, begun: int) -> None:
        durable.sweep(_in(directory).data)
        with sqlite3.connect(_in(directory).database_backup) as copy:
            (found,) = copy.execute("SELECT count(*) FROM sandboxes").fetchone()
        assert found - 1 in (acked, begun)

    prove(Workload(setup, (("copy", again),)), check)


def _in(directory: Path) -> Paths:
    return Paths(directory / "data", directory / "cache", directory / "run")
