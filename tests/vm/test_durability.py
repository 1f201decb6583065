"""What a guest writes is on the host soon, whole, and comes back: generations of a sandbox that runs, stops, is copied,
goes back in time, or dies with everything around it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Client
from limpet.client import Sandbox
from limpet.models import GenerationInfo
from limpet.paths import discover
from tests.conftest import run_cli
from tests.vm.kit import daemon_pid, qemu_of, shell, wait_until

pytestmark = pytest.mark.vm

BOUND = 3.0  # seconds that the host may be behind
SLACK = 7.0  # for a machine that runs a test suite

_WRITER = "while :; do date +%s.%N >> /workspace/lines; sleep 0.05; done"
_TREE = 'for n in range(1, 3001): open(f"f{n}", "w").write(f"{n} {n}\\n")'
_COMMITS = """
import os, sqlite3, subprocess, time
os.makedirs("/workspace/app", exist_ok=True)
os.chdir("/workspace/app")
db = sqlite3.connect("t.db", isolation_level=None)
db.execute("PRAGMA journal_mode=WAL")
db.execute("PRAGMA wal_autocheckpoint=50")
db.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, text TEXT)")
git = lambda *words: subprocess.run(["git", "-C", "repo", *words], check=True, stdout=subprocess.DEVNULL)
subprocess.run(["git", "init", "-q", "repo"], check=True)
git("config", "user.email", "a@b.c"), git("config", "user.name", "a")
count, end = 0, time.time() + SECONDS
while time.time() < end:
    for _ in range(20):
        count += 1
        db.execute("INSERT INTO t VALUES (?, ?)", (count, "x" * 500))
    open("repo/file", "a").write(f"{count}\\n" * 50)
    git("add", "file"), git("commit", "-qm", str(count))
    for name in range(20):
        open("new", "w").write("x" * 10000)
        os.rename("new", f"f{count}-{name}")
print(count)
"""


@pytest.fixture(scope="module")
def box(client: Client) -> Iterator[Sandbox]:
    box = client.sandboxes.create("kept", memory_mib=512)
    yield box
    box.remove(force=True, purge=True)


@pytest.fixture
def by_hand(client: Client) -> Iterator[None]:
    """Nothing is synced by itself meanwhile."""
    client.config.set("sync.auto", "off")
    yield
    client.config.unset("sync.auto")


def newest(box: Sandbox) -> GenerationInfo:
    return box.vault.history()[-1]


def number_of(box: Sandbox) -> int:
    """The newest generation, 0 without one."""
    return box.sync_status(pending=False).generation or 0


def text(box: Sandbox, path: str, at: int | None = None) -> str:
    """A file as a generation has it."""
    return box.vault.read(path, at).decode()


def last_line(data: str) -> float:
    """When the writer wrote its last whole line."""
    return float(data.rpartition("\n")[0].rpartition("\n")[2])


def test_while_a_guest_writes_the_newest_generation_is_never_far_behind(box: Sandbox) -> None:
    """D4, PAY-2: each generation is a prefix of what was written, and the newest ends within the bound of now."""
    writer = box.exec(["sh", "-c", _WRITER], detach=True, cwd="/")
    wait_until(lambda: box.sync_status(pending=False).generation)
    wait_until(lambda: any(version for version in box.vault.history() if version.generation >= 2))
    begun, behind = number_of(box), list[float]()
    try:
        while len(behind) < 8:
            time.sleep(1.0)
            asked = time.time()
            behind.append(asked - last_line(text(box, "/workspace/lines")))
    finally:
        writer.signal("KILL")
    assert sorted(behind)[len(behind) // 2] < BOUND and max(behind) < BOUND + SLACK
    assert number_of(box) - begun >= 4
    box.sync()
    written = text(box, "/workspace/lines")
    for version in box.vault.versions("/workspace/lines"):
        assert written.startswith(text(box, "/workspace/lines", version.generation))
    assert written == shell(box, "cat /workspace/lines")


def test_nothing_is_synced_while_nothing_is_written(box: Sandbox) -> None:
    """D4: an idle sandbox makes no generations; asking for one changes nothing, and it is known to be in step."""
    box.sync()
    before = number_of(box)
    time.sleep(3.0)
    status = box.sync_status()
    assert (status.generation, status.lag, status.age, status.degraded) == (before, 0.0, 0.0, False)
    assert (status.pending_files, status.pending_bytes) == (0, 0)
    assert not box.sync().new and number_of(box) == before


def test_what_a_sync_costs_depends_on_the_change_not_on_the_tree(box: Sandbox) -> None:
    """D4: one line among thousands of files adds some kilobytes to the vault."""
    shell(box, f"mkdir -p /workspace/tree && cd /workspace/tree && python3 -c '{_TREE}'")
    box.sync()
    assert newest(box).files >= 3000
    shell(box, "echo changed >> /workspace/tree/f1500")
    done = box.sync()
    assert newest(box).generation == done.generation
    assert newest(box).new_bytes < 64 << 10
    assert [change.path for change in box.vault.diff(newest(box).generation - 1)] == ["/workspace/tree/f1500"]
    assert text(box, "/workspace/tree/f1500") == "1500 1500\nchanged\n"


def test_status_tells_what_waits_and_a_stop_brings_it_to_the_host(box: Sandbox, by_hand: None) -> None:
    """PAY-7, PAY-8, D8: what is pending; the final sync has what was written last, and the vault needs no VM."""
    box.sync()
    shell(box, "head -c 100000 /dev/urandom > /workspace/late; echo x > /workspace/x")
    status = box.sync_status()
    assert status.pending_files == 2 and 100_000 <= (status.pending_bytes or 0) < 200_000
    wait_until(lambda: box.sync_status(pending=False).lag > 0)
    shell(box, "echo last > /workspace/last")
    stopped = box.stop()
    assert (stopped.generation, stopped.sync) == (newest(box).generation, None)
    assert text(box, "/workspace/last") == "last\n"
    status = box.sync_status()
    assert (status.state, status.pending_files, status.generation) == ("stopped", None, stopped.generation)
    box.start()
    assert not box.sync().new  # what the guest has is what the vault has


def test_a_failing_vault_is_told_and_made_up_for(box: Sandbox, client: Client, home: Path) -> None:
    """PAY-8: syncs that fail are counted, degraded is told once; a success ends both, and nothing is lost."""
    box.sync()
    gens = discover(home).vault(box.refresh().id) / "gens"
    gens.rename(gens.with_name("away"))
    try:
        shell(box, "echo unlucky > /workspace/unlucky")
        wait_until(lambda: box.sync_status(pending=False).degraded)
        status = box.sync_status(pending=False)
        assert status.failures >= 1 and status.why and status.log and status.lag > 0
        [row] = [row for row in client.doctor().rows if row.check == "vaults"]
        assert row.status == "WARN" and "kept" in row.detail
    finally:
        gens.with_name("away").rename(gens)
    wait_until(lambda: not box.sync_status(pending=False).degraded)
    assert text(box, "/workspace/unlucky") == "unlucky\n"
    kinds = [event.kind for event in client.events(follow=False) if event.kind.startswith("sync.")]
    assert kinds[-3:] == ["sync.failed", "sync.degraded", "sync.recovered"]


def test_a_lost_vault_is_filled_anew(box: Sandbox, client: Client, home: Path) -> None:
    """PAY-2: without the parent of its snapshots everything is sent."""
    box.sync()
    files = newest(box).files
    run_cli(home, "daemon", "stop")
    shutil.rmtree(discover(home).vault(box.info.id))
    wait_until(lambda: number_of(box) and newest(box).files == files)
    assert text(box, "/workspace/unlucky") == "unlucky\n"
    assert client.vaults.check("kept")[0].ok


def test_a_restored_file_takes_the_place_of_the_present_one_which_is_kept(box: Sandbox) -> None:
    """D7: restore into the running guest; what it replaced is a generation that stays."""
    shell(box, "mkdir -p /workspace/r && cd /workspace/r && echo old > a && chmod 741 a && echo keep > b")
    old = box.sync().generation
    shell(box, "cd /workspace/r && echo new > a && rm b && echo more > c")
    restored = box.vault.restore("/workspace/r", at=old)
    assert (restored.generation, restored.files) == (old, 2)
    assert shell(box, "cd /workspace/r && ls && cat a && stat -c %a a") == "a\nb\nold\n741\n"
    assert restored.saved is not None and text(box, "/workspace/r/a", restored.saved) == "new\n"
    pinned = {info.generation: info.pinned for info in box.vault.history()}
    assert pinned[restored.saved]


def test_after_going_back_in_time_the_next_sync_is_a_difference_again(box: Sandbox) -> None:
    """D3: a checkpoint's disks have an older snapshot; the present and what was before are both in the vault."""
    shell(box, "echo early > /workspace/when")
    early = box.sync().generation
    checkpoint = box.checkpoint()
    shell(box, "echo late > /workspace/when")
    late = box.sync().generation
    box.restore(checkpoint.id, force=True)
    wait_until(lambda: number_of(box) > (late or 0))
    assert [text(box, "/workspace/when", at) for at in (early, late, None)] == ["early\n", "late\n", "early\n"]
    assert newest(box).new_bytes < 64 << 10


def test_a_fork_begins_with_the_generations_of_its_source(box: Sandbox) -> None:
    """FRZ-8: the fork's vault has them without a copy of their bytes, and goes on by itself."""
    shell(box, "echo both > /workspace/both")
    common = box.sync().generation
    (twin,) = box.fork(name="kept-twin")
    try:
        assert text(twin, "/workspace/both", common) == "both\n"
        shell(twin, "echo mine > /workspace/both")
        done = twin.sync()
        assert done.new and newest(twin).new_bytes < 64 << 10
        assert text(twin, "/workspace/both") == "mine\n"
        assert text(box, "/workspace/both") == "both\n"
    finally:
        twin.remove(force=True, purge=True)
    assert text(box, "/workspace/both") == "both\n"


def test_a_paused_sandbox_is_not_behind(box: Sandbox) -> None:
    """VM-18: no failures while it stands still; after it went on it is synced."""
    shell(box, "(sleep 1; echo after > /workspace/after) >/dev/null 2>&1 &")
    box.pause()
    time.sleep(2.0)
    status = box.sync_status()
    assert (status.state, status.failures, status.degraded) == ("paused", 0, False)
    box.resume()
    shell(box, "while ! test -s /workspace/after; do sleep 0.1; done")
    box.sync()
    assert text(box, "/workspace/after") == "after\n"


def test_what_is_written_without_a_pause_is_whole_in_every_generation(box: Sandbox, tmp_path: Path) -> None:
    """PAY-2: SQLite in WAL mode and Git, both under constant commits: every generation passes their own checks. Files
    that are written and renamed into place are whole though they are never fsynced."""
    begun = number_of(box)
    script = _COMMITS.replace("SECONDS", "12")
    total = int(box.exec(["python3", "-c", script], cwd="/", timeout=100).check().text)
    box.sync()
    taken = [info.generation for info in box.vault.history() if info.generation > begun]
    assert len(taken) >= 4
    counts = []
    for number in taken:
        counts.append(_rows_and_commits(box, number, tmp_path / str(number)))
    assert counts == sorted(counts) and counts[-1] == total


def _rows_and_commits(box: Sandbox, number: int, to: Path) -> int:
    """How many rows a generation's database has; it, the repository and files that nobody fsynced are whole."""
    if not any(entry.path == "/workspace/app" for entry in box.vault.list("/workspace", number).entries):
        return 0
    box.vault.restore("/workspace/app", at=number, to=to)
    assert {path.stat().st_size for path in to.glob("f*-*")} <= {10_000}
    rows = 0
    if (to / "t.db").exists():
        with contextlib.closing(sqlite3.connect(to / "t.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            if database.execute("SELECT 1 FROM sqlite_master WHERE name = 't'").fetchone():
                rows = database.execute("SELECT count(*) FROM t").fetchone()[0]
    if (to / "repo" / ".git" / "HEAD").exists():
        safe = ["-c", f"safe.directory={to / 'repo'}", "-C", str(to / "repo")]
        checked = subprocess.run(["git", *safe, "fsck", "--full"], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        log = subprocess.run(["git", *safe, "log", "-1", "--format=%s"], capture_output=True, text=True, check=False)
        assert not log.stdout or int(log.stdout) <= rows  # rows are inserted before they are committed
    return rows


def test_lines_come_back_after_everything_but_the_vault_was_lost(own_home: Path, tmp_path: Path) -> None:
    """D3, D4: QEMU and daemon are killed at once, the disks deleted; the lines are there up to the bound."""
    with Client(home=own_home) as client:
        box = client.sandboxes.create("doomed", memory_mib=512)
        box.exec(["sh", "-c", _WRITER], detach=True, cwd="/")
        wait_until(lambda: number_of(box) >= 4, 60)
        pids = [daemon_pid(own_home), qemu_of(own_home, box.info.id)]
        killed = time.time()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        paths = discover(own_home)
        shutil.rmtree(paths.layers)
        shutil.rmtree(paths.sandbox(box.info.id).root)
        done = run_cli(own_home, "restore", "doomed", "--to", str(tmp_path / "back"))
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "back" / "workspace" / "lines").read_text()
        assert killed - last_line(lines) < BOUND + SLACK
        times = [float(line) for line in lines.splitlines()]
        assert times == sorted(times) and len(times) > 20
