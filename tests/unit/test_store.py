"""The state store: what it keeps, what it refuses, and what a crash leaves (VM-7, VM-9)."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limpet.errors import AlreadyExists, FailedPrecondition, NotFound
from limpet.models import Operation, PortMapping, SandboxSpec, Stage, State, WorkspaceInfo
from limpet.paths import Paths
from limpet.store import SandboxRecord, Store, back_up
from limpet.store import _schema as schema


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path / "data", tmp_path / "cache", tmp_path / "run")
    found.make()
    return found


@pytest.fixture
def store(paths: Paths) -> Iterator[Store]:
    opened = Store.open(paths)
    yield opened
    opened.close()


def record(name: str = "web", number: int = 1) -> SandboxRecord:
    return SandboxRecord(f"sb_{number}", name, State.CREATING, SandboxSpec(), datetime.now(UTC))


def test_sandbox_comes_back_as_it_was_stored(paths: Paths) -> None:
    """VM-9"""
    full = SandboxRecord(
        id="sb_1", name="web", state=State.RUNNING, created_at=datetime.now(UTC), started_at=datetime.now(UTC),
        spec=SandboxSpec(env={"A": "ü\n"}, labels={"x": ""}, ports=[PortMapping(host=0, guest=80)], ttl=1.5),
        boot_id="b", incarnation=3, error="died: \udcff",
        workspace=WorkspaceInfo(host_dir="/home/\udcff", guest_dir="/workspace", status="partial", kind="git"),
    )  # fmt: skip
    store = Store.open(paths)
    store.insert_sandbox(full)
    store.close()
    store = Store.open(paths)
    found = store.sandbox_by_name("web")
    store.close()
    assert found.workspace == full.workspace
    assert found.error == "died: \\udcff"
    assert found.spec == full.spec
    assert (found.state, found.incarnation, found.started_at) == (full.state, 3, full.started_at)


def test_name_that_is_taken_is_refused_with_a_hint(store: Store) -> None:
    """VM-7"""
    store.insert_sandbox(record("web", 1))
    with pytest.raises(AlreadyExists, match="'web' already") as caught:
        store.insert_sandbox(record("web", 2))
    assert "limpet rm web" in (caught.value.hint or "")
    assert [found.id for found in store.sandboxes()] == ["sb_1"]


def test_rename_to_a_taken_name_is_refused_and_changes_nothing(store: Store) -> None:
    """VM-7"""
    store.insert_sandbox(record("web", 1))
    store.insert_sandbox(record("db", 2))
    with pytest.raises(AlreadyExists):
        store.update_sandbox("sb_2", name="web", state=State.STOPPED)
    assert store.sandbox_by_id("sb_2").state == State.CREATING


def test_removed_name_is_free_again(store: Store) -> None:
    store.insert_sandbox(record("web", 1))
    store.delete_sandbox("sb_1")
    store.insert_sandbox(record("web", 2))
    assert store.sandbox_by_name("web").id == "sb_2"


def test_update_changes_only_what_is_given(store: Store) -> None:
    store.insert_sandbox(record())
    changed = store.update_sandbox("sb_1", state=State.RUNNING, boot_id="b1", incarnation=1)
    assert (changed.state, changed.boot_id, changed.name) == (State.RUNNING, "b1", "web")
    assert store.update_sandbox("sb_1", boot_id=None).boot_id is None
    assert store.sandbox_by_id("sb_1").state == State.RUNNING


def test_unknown_sandbox_is_told_with_the_nearest_name(store: Store) -> None:
    store.insert_sandbox(record("frontend"))
    with pytest.raises(NotFound) as caught:
        store.sandbox_by_name("fronted")
    assert caught.value.hint == "did you mean 'frontend'?"
    with pytest.raises(NotFound):
        store.update_sandbox("sb_9", state=State.STOPPED)


def test_transaction_that_fails_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.insert_sandbox(record())
        store.append_event("sandbox.created")
        raise ZeroDivisionError
    assert store.sandboxes() == []
    assert store.last_event() == 0
    store.insert_sandbox(record())  # and the store goes on


def test_no_table_can_hold_a_process_id(store: Store, paths: Paths) -> None:
    """VM-9: what is true now is not stored."""
    with sqlite3.connect(paths.database) as connection:
        schemas = " ".join(sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL"))
    connection.close()
    assert "pid" not in schemas.replace(" ", "").lower().replace("sandbox_id", "")


def test_operations_are_kept_by_state_and_pruned_by_age(store: Store) -> None:
    """VM-14"""
    for number in range(5):
        state = "running" if number == 0 else "done"
        stages = [Stage(name="boot", state="done", seconds=1.5)]
        store.save_operation(
            Operation.model_validate(
                {"id": f"op_{number}", "kind": "create", "state": state, "stages": stages, "result": {"n": number},
                 "started_at": datetime(2026, 1, 1 + number, tzinfo=UTC)}
            )
        )  # fmt: skip
    assert [found.id for found in store.operations("running")] == ["op_0"]
    store.prune_operations(keep=2)
    assert [found.id for found in store.operations()] == ["op_0", "op_3", "op_4"]  # a running one is never pruned
    found = store.operation("op_4")
    assert found is not None
    assert (found.result, found.stages) == ({"n": 4}, stages)
    store.delete_operation("op_4")
    assert store.operation("op_4") is None


def test_second_daemon_is_refused_and_told_the_pid_of_the_first(paths: Paths) -> None:
    code = "import sys; from limpet.paths import *; from limpet.store import Store; Store.open(discover())"
    command, environment = [sys.executable, "-c", code], {**os.environ, "LIMPET_HOME": str(paths.data.parent)}
    first = Store.open(paths)
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert f"another limpetd (pid {os.getpid()}) already serves {paths.data}" in second.stderr
    first.close()
    third = subprocess.run(command, env=environment, check=False, timeout=60)
    assert third.returncode == 0


def test_files_are_for_the_owner_only(store: Store, paths: Paths) -> None:
    store.insert_sandbox(record())
    back_up(paths, max_age=0)
    for path in (paths.database, paths.state_lock, paths.database_backup):
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_newer_schema_is_refused_with_a_hint_and_left_alone(paths: Paths) -> None:
    Store.open(paths).close()
    with sqlite3.connect(paths.database) as connection:
        connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.close()
    before = paths.database.read_bytes()
    with pytest.raises(FailedPrecondition, match="newer limpet") as caught:
        Store.open(paths)
    assert "upgrade limpet" in (caught.value.hint or "")
    assert paths.database.read_bytes() == before


def test_migration_of_an_older_schema_keeps_the_rows_and_makes_a_backup(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(paths)
    store.insert_sandbox(record())
    store.close()
    newer = (*schema.MIGRATIONS, ("ALTER TABLE sandboxes ADD COLUMN later TEXT",))
    monkeypatch.setattr(schema, "MIGRATIONS", newer)
    monkeypatch.setattr(schema, "VERSION", len(newer))
    store = Store.open(paths)
    assert store.sandbox_by_name("web").id == "sb_1"
    store.close()
    with sqlite3.connect(paths.database_backup) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == len(newer) - 1
    connection.close()


def test_migration_that_fails_is_wholly_undone(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.open(paths).close()
    broken = (*schema.MIGRATIONS, ("ALTER TABLE sandboxes ADD COLUMN later TEXT", "NOT SQL"))
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", broken)
        patch.setattr(schema, "VERSION", len(broken))
        with pytest.raises(sqlite3.OperationalError):
            Store.open(paths)
    mended = (*schema.MIGRATIONS, ("ALTER TABLE sandboxes ADD COLUMN later TEXT",))
    monkeypatch.setattr(schema, "MIGRATIONS", mended)
    monkeypatch.setattr(schema, "VERSION", len(mended))
    Store.open(paths).close()


def fill(paths: Paths, count: int = 200) -> None:
    store = Store.open(paths)
    for number in range(count):
        store.insert_sandbox(record(f"web-{number}", number))
    store.close()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"not a database at all" + content[21:], id="header"),
        pytest.param(lambda content: content[:4096] + os.urandom(len(content) - 4096), id="pages"),
        pytest.param(lambda content: content[: len(content) // 2], id="truncated"),
    ],
)
def test_damaged_database_is_refused_with_a_way_back_and_not_touched(paths: Paths, damage: object) -> None:
    """Bad input: a corrupt state file."""
    fill(paths)
    back_up(paths, max_age=0)
    assert callable(damage)
    paths.database.write_bytes(damage(paths.database.read_bytes()))
    before = paths.database.read_bytes()
    with pytest.raises(FailedPrecondition, match="is damaged") as caught:
        Store.open(paths)
    assert str(paths.database) in caught.value.message
    assert paths.database.read_bytes() == before
    _, _, commands = (caught.value.hint or "").partition(": ")
    subprocess.run(["sh", "-ec", commands], check=True, timeout=60)  # the hint works as it is written
    store = Store.open(paths)
    assert len(store.sandboxes()) == 200
    store.close()


def test_damage_after_a_crash_leaves_the_write_ahead_log_alone(paths: Paths, tmp_path: Path) -> None:
    """What was not yet in the database can still be rescued."""
    fill(paths)
    store = Store.open(paths)
    store.insert_sandbox(record("newest", 999))
    crashed = Paths(tmp_path / "b" / "data", tmp_path / "b" / "cache", tmp_path / "b" / "run")
    crashed.make()
    for suffix in ("", "-wal"):
        Path(f"{crashed.database}{suffix}").write_bytes(Path(f"{paths.database}{suffix}").read_bytes())
    store.close()
    content = crashed.database.read_bytes()
    crashed.database.write_bytes(content[:8192] + bytes(len(content) - 8192))
    wal = Path(f"{crashed.database}-wal")
    before = crashed.database.read_bytes(), wal.read_bytes()
    assert before[1]
    with pytest.raises(FailedPrecondition, match="is damaged"):
        Store.open(crashed)
    assert (crashed.database.read_bytes(), wal.read_bytes()) == before


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_lost_database_is_not_taken_for_a_new_one(paths: Paths, how: str) -> None:
    fill(paths, 1)
    back_up(paths, max_age=0)
    paths.database.unlink()
    if how == "empty":
        paths.database.touch()
    with pytest.raises(FailedPrecondition, match=f"it is {how}"):
        Store.open(paths)


def test_damaged_database_without_a_backup_names_the_file_to_move_away(paths: Paths) -> None:
    paths.database.write_bytes(b"rubbish" * 1000)
    with pytest.raises(FailedPrecondition) as caught:
        Store.open(paths)
    assert f"move {paths.database} away" in (caught.value.hint or "")


def test_backup_is_made_once_a_day_while_the_store_is_open(store: Store, paths: Paths) -> None:
    store.insert_sandbox(record())
    assert back_up(paths)
    assert not back_up(paths)
    yesterday = paths.database_backup.stat().st_mtime - 25 * 3600
    os.utime(paths.database_backup, (yesterday, yesterday))
    assert back_up(paths)
    assert sorted(child.name for child in paths.data.iterdir() if child.name.startswith(".tmp")) == []


_WRITER = """
import sys
from datetime import UTC, datetime
from limpet.models import SandboxSpec, State
from limpet.paths import discover
from limpet.store import SandboxRecord, Store
store = Store.open(discover())
for number in range(1_000_000):
    made = SandboxRecord(f"sb_{number}", f"web-{number}", State.CREATING, SandboxSpec(), datetime.now(UTC))
    with store.transaction():
        store.insert_sandbox(made)
        store.append_event("sandbox.created", sandbox_id=f"sb_{number}")
    print(number, flush=True)
"""


def test_kill_in_the_middle_of_writes_leaves_whole_transactions(paths: Paths) -> None:
    """VM-9: what was promised is there, row and event together; nothing is half there."""
    environment = {**os.environ, "LIMPET_HOME": str(paths.data.parent)}
    with subprocess.Popen([sys.executable, "-c", _WRITER], stdout=subprocess.PIPE, env=environment) as writer:
        assert writer.stdout is not None
        promised = [int(writer.stdout.readline()) for _ in range(300)]
        writer.send_signal(signal.SIGKILL)
        promised += [int(line) for line in writer.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
    store = Store.open(paths)
    rows = {found.id for found in store.sandboxes()}
    events = {found.sandbox_id for found in store.events_after(0, limit=1_000_000)}
    store.close()
    assert rows == events
    assert {f"sb_{number}" for number in promised} <= rows
