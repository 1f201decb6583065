"""Payloads with real guests: seeded, published as whole generations, locked by the VM, never overwriting the host."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Client, errors
from limpet.client import Sandbox
from limpet.models import PayloadStatus
from limpet.services.payloads.locking import locked
from limpet.services.payloads.marker import NAME
from tests.conftest import run_cli
from tests.vm.kit import daemon_pid, qemu_of, shell, wait_until

pytestmark = pytest.mark.vm

# What suffers most from being copied at the wrong moment: a database in WAL mode and a repository, always committing.
_WRITER = """
import sqlite3, subprocess, sys, os, time
os.chdir("/workspace/data")
run = lambda *words: subprocess.run(("git", "-c", "user.name=x", "-c", "user.email=x@y", *words), check=True, stdout=2)
run("init", "-q", "repo")
database = sqlite3.connect("t.db", isolation_level=None)
database.execute("PRAGMA journal_mode=WAL")
database.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER, filler BLOB)")
number = 0
while True:
    number += 1
    with database:
        database.execute("BEGIN")
        for _ in range(5):
            database.execute("INSERT INTO t VALUES (?, randomblob(2000))", (number,))
    open("repo/file", "w").write(str(number))
    run("-C", "repo", "add", "file")
    run("-C", "repo", "commit", "-qm", str(number))
    open("count", "w").write(str(number))
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("payload") / "data"
    (directory / "sub").mkdir(parents=True)
    for number in range(30):
        (directory / "sub" / str(number)).write_text(str(number))
    (directory / "greeting").write_text("hello\n")
    (directory / "greeting").chmod(0o640)
    (directory / "link").symlink_to("greeting")
    return directory


@pytest.fixture(scope="module")
def box(client: Client, host: Path) -> Iterator[Sandbox]:
    box = client.sandboxes.create("payloads", memory_mib=512, payloads=[(host, "/workspace/data")])
    yield box
    box.remove(force=True, purge=True)


def status(box: Sandbox) -> PayloadStatus:
    [found] = box.payloads.list()
    return found


def published(box: Sandbox, path: Path, content: str) -> None:
    """Wait until a file on the host has this content."""
    wait_until(lambda: path.is_file() and path.read_text() == content)


def test_a_program_finds_its_files_and_what_it_writes_appears_on_the_host(box: Sandbox, host: Path) -> None:
    """PAY-1, PAY-2: local storage, the user's own, with modes, times and links."""
    seen = shell(
        box, "cd /workspace/data && cat greeting && stat -c '%a %U %Y' greeting && readlink link && ls sub | wc -l"
    )
    assert seen == f"hello\n640 user {int((host / 'greeting').stat().st_mtime)}\ngreeting\n30\n"
    assert "btrfs" in shell(box, "grep ' /workspace/data ' /proc/mounts")
    shell(box, "cd /workspace/data && mkdir new && printf two > new/file && chmod 600 new/file && rm greeting", "user")
    published(box, host / "new" / "file", "two")
    assert not (host / "greeting").exists() and (host / "new" / "file").stat().st_mode & 0o777 == 0o600
    assert (host / "new" / "file").stat().st_uid == host.stat().st_uid
    assert status(box).state == "ok" and not status(box).degraded
    assert shell(box, f"ls -a /workspace/data | grep -c {NAME} || true") == "0\n"


def test_the_directory_belongs_to_one_running_vm_by_whatever_name(
    box: Sandbox, host: Path, client: Client, tmp_path: Path
) -> None:
    """PAY-3, PAY-10: itself, a parent, a child and a bind mount; nothing is left of the refused ones."""
    bound = tmp_path / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", str(host.parent), str(bound)], check=True)
    try:
        for other in (host, host / "sub", bound / "data", bound / "data" / "sub", host.parent):
            before = {path for path in host.parent.rglob("*") if ".limpet-data-" not in str(path)}
            with pytest.raises(errors.Busy, match="in use by sandbox payloads of") as refused:
                client.sandboxes.create("second", memory_mib=512, payloads=[(other, "/workspace/x")])
            assert "limpet payload rm payloads pl_" in (refused.value.hint or "")
            now = {path for path in host.parent.rglob("*") if ".limpet-data-" not in str(path)}
            assert now == before
    finally:
        subprocess.run(["umount", str(bound)], check=True)
    assert "second" not in [found.name for found in client.sandboxes.list()]


def test_a_mass_deletion_waits_for_a_word(box: Sandbox, host: Path) -> None:
    """PAY-5."""
    shell(box, "rm -r /workspace/data/sub && echo after > /workspace/data/after")
    wait_until(lambda: status(box).state == "held")
    assert "30 of the 30 files in sub were deleted" in (status(box).reason or "")
    assert len(list((host / "sub").iterdir())) == 30 and not (host / "after").exists()
    box.payloads.confirm(status(box).payload.id)
    assert not (host / "sub").exists() and (host / "after").read_text() == "after\n"
    assert status(box).state == "ok"


def test_an_edit_on_the_host_stops_the_sync_and_both_versions_are_kept(box: Sandbox, host: Path) -> None:
    """PAY-6: nothing is overwritten; then either side can be chosen."""
    (host / "after").write_text("mine")
    wait_until(lambda: status(box).state == "drifted")
    shell(box, "echo theirs > /workspace/data/after")
    box.sync()
    time.sleep(1.5)
    assert (host / "after").read_text() == "mine" and status(box).state == "drifted"
    assert "after in" in (status(box).reason or "")
    box.payloads.confirm(status(box).payload.id, keep="guest")
    assert (host / "after").read_text() == "theirs\n"
    [saved] = host.parent.glob("data.saved-*")
    assert (saved / "after").read_text() == "mine" and not (saved / NAME).exists()
    (host / "after").write_text("mine again")
    wait_until(lambda: status(box).state == "drifted")
    box.payloads.confirm(status(box).payload.id, keep="host")
    assert shell(box, "cat /workspace/data/after") == "mine again"
    assert status(box).state == "ok" and (host / "after").read_text() == "mine again"
    shell(box, "echo on > /workspace/data/after")
    published(box, host / "after", "on\n")


def test_databases_and_repositories_are_whole_in_every_copy_made_at_any_moment(box: Sandbox, host: Path) -> None:
    """PAY-2: `cd HOSTDIR && cp -r .` under constant commits; integrity_check and fsck pass each time."""
    writer = box.exec(["python3", "-c", _WRITER], detach=True, user="user", cwd="/")
    wait_until(lambda: (host / "count").is_file(), 60)
    counts = set()
    for number in range(12):
        time.sleep(0.3 + 0.17 * number % 0.5)
        copy = host.parent / f"copy-{number}"
        subprocess.run(["sh", "-c", f"cd {host} && cp -r . {copy}"], check=True)
        database = sqlite3.connect(copy / "t.db")
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = [rows for _, rows in database.execute("SELECT n, count(*) FROM t GROUP BY n")]
        assert set(rows) == {5}  # no transaction in halves
        database.close()
        checked = subprocess.run(
            ["git", "-C", str(copy / "repo"), "fsck", "--strict"], capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stderr
        counts.add(int((copy / "count").read_text() or 0))
        shutil.rmtree(copy)
    writer.signal("KILL")
    assert len(counts) > 2  # it moved on meanwhile
    assert status(box).failures == 0


def test_a_killed_daemon_leaves_the_lock_with_the_vm_and_publishing_goes_on(
    box: Sandbox, host: Path, home: Path
) -> None:
    """PAY-3, L3."""
    os.kill(daemon_pid(home), signal.SIGKILL)
    assert locked(host)
    wait_until(lambda: run_cli(home, "exec", "payloads", "--", "true").returncode == 0)
    assert locked(host)
    shell(box, "echo again > /workspace/data/after")
    published(box, host / "after", "again\n")
    assert locked(host)


def test_a_fork_has_the_data_as_a_directory_of_its_own(box: Sandbox, host: Path) -> None:
    """PAY-3: two VMs never share a host directory; what is in the copy is still there after a boot."""
    [fork] = box.fork(name="copied")
    try:
        shell(fork, "echo copied > /workspace/data/after")
        assert fork.payloads.list() == []
        fork.stop()
        fork.start()
        assert shell(fork, "cat /workspace/data/after") == "copied\n"
        assert (host / "after").read_text() == "again\n" and status(box).state == "ok"
    finally:
        fork.remove(force=True, purge=True)


def test_a_stop_publishes_what_was_written_last_and_lets_go(box: Sandbox, host: Path) -> None:
    """PAY-7, PAY-10."""
    shell(box, "echo last > /workspace/data/after")
    result = box.stop()
    assert (result.sync, result.durability) == (None, "clean") and result.generation
    assert (host / "after").read_text() == "last\n"
    assert not (host / NAME).exists()
    assert status(box).state == "stopped" and status(box).generation == result.generation


def test_what_was_edited_while_it_was_stopped_is_in_the_guest_after_the_start(box: Sandbox, host: Path) -> None:
    """PAY-1, PAY-6: the guest's copy was what was published last, so nothing is lost by seeding it anew."""
    (host / "between").write_text("starts")
    box.start()
    assert shell(box, "cat /workspace/data/between /workspace/data/after") == "startslast\n"
    assert status(box).state == "ok"


def test_a_vm_that_is_killed_releases_the_directory_for_another(
    box: Sandbox, host: Path, home: Path, client: Client
) -> None:
    """PAY-3: the lock cannot go stale. What the first one had is not published over the other one's."""
    os.kill(qemu_of(home, box.refresh().id), signal.SIGKILL)
    wait_until(lambda: box.refresh().state in ("error", "stopped"))
    assert not locked(host)
    other = client.sandboxes.create("other", memory_mib=512, payloads=[(host, "/workspace/there")])
    try:
        shell(other, "echo other > /workspace/there/after")
        published(other, host / "after", "other\n")
        with pytest.raises(errors.Busy, match="in use by sandbox other"):
            box.start()
        assert box.refresh().state == "stopped" and locked(host)
    finally:
        other.remove(force=True, purge=True)
    assert not (host / NAME).exists()
    assert (host / "after").read_text() == "other\n"


def test_removing_a_payload_leaves_the_directory_and_takes_the_guests_copy(client: Client, tmp_path: Path) -> None:
    """PAY-7, PAY-10: added to a running sandbox; a failure leaves nothing on either side."""
    directory = tmp_path / "late"
    directory.mkdir()
    (directory / "file").write_text("late")
    box = client.sandboxes.create("adding", memory_mib=512)
    try:
        shell(box, "mkdir -p /workspace/full && touch /workspace/full/thing")
        with pytest.raises(errors.FailedPrecondition):
            box.payloads.add(directory, "/workspace/full")
        assert [path.name for path in directory.iterdir()] == ["file"] and box.payloads.list() == []
        added = box.payloads.add(directory, "/workspace/late")
        assert shell(box, "cat /workspace/late/file") == "late"
        shell(box, "printf more > /workspace/late/file")
        holder = box.exec(["sh", "-c", "cd /workspace/late && sleep 300"], detach=True, cwd="/")
        with pytest.raises(errors.FailedPrecondition, match="sleep"):
            box.payloads.remove(added.payload.id)
        assert locked(directory)
        holder.signal("KILL")
        box.payloads.remove(added.payload.id)
        assert (directory / "file").read_text() == "more" and not (directory / NAME).exists()
        assert shell(box, "ls /workspace") == "full\n"
    finally:
        box.remove(force=True, purge=True)


def test_a_launch_that_fails_leaves_nothing_on_the_host(client: Client, tmp_path: Path, home: Path) -> None:
    """PAY-9, PAY-10: whatever fails after the preflight."""
    directory = tmp_path / "kept"
    directory.mkdir()
    (directory / "file").write_text("as it was")
    with pytest.raises(errors.LimpetError):
        client.sandboxes.create("failing", memory_mib=512, payloads=[(directory, "/workspace/a\0b")])
    refused = run_cli(home, "create", "failing", "--payload", f"{tmp_path}/missing:/workspace/x")
    assert refused.returncode == 1 and "does not exist" in refused.stderr and "hint: mkdir -p" in refused.stderr
    with pytest.raises(errors.LimpetError):  # a file is in the way in the guest
        client.sandboxes.create("failing", memory_mib=512, payloads=[(directory, "/home/user/.bashrc/x")])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "kept"]
    assert "failing" not in [found.name for found in client.sandboxes.list()]
