"""sync, status, history, show, diff, restore, vault, payload, trash and undelete as a user meets them, against a
stand-in daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from limpet.models import State
from tests.contract.local_vaults import KEPT

from .client_kit import StandIn, Terminal, stand_in


@pytest.fixture(scope="module")
def daemon() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture(autouse=True)
def only_web(daemon: StandIn) -> None:
    daemon.boxes.known = {"web": daemon.boxes.known["web"]}
    daemon.trash.known.clear()
    daemon.payloads.known.clear()


def told(daemon: StandIn, *words: str) -> list[str]:
    """The lines on stdout of a command that succeeds."""
    done = daemon.cli(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(errors="surrogateescape").splitlines()


def test_sync_prints_the_generation_and_says_when_nothing_changed(daemon: StandIn) -> None:
    """D4"""
    daemon.add("fresh")
    assert (daemon.cli("sync", "fresh").stdout, daemon.cli("sync", "fresh").stderr) == (
        b"4\n",
        b"it was on the host already\n",
    )
    assert json.loads(daemon.cli("sync", "--json", "fresh").stdout)["new"] is False


def test_status_is_a_table_of_all_and_a_list_of_one(daemon: StandIn) -> None:
    """D4"""
    daemon.add("late", State.PAUSED)
    header, late, web = told(daemon, "status")
    assert header.split() == ["NAME", "STATE", "GENERATION", "DURABLE", "LAG", "SYNC", "PAYLOADS"]
    assert late.split()[:6] == ["late", "paused", "-", "never", "7.2", "s"]
    assert "degraded: the host's disk is full\\x1b[31m" in late
    assert web.split()[:3] == ["web", "running", "4"]
    one = told(daemon, "status", "web")
    assert one[0] == "sandbox:   web (running)"
    assert one[1].startswith("durable:   generation 4 of 2024-01-01 ")
    assert "pending:   3 files, 2.0 KiB" in one
    bad = told(daemon, "status", "late")
    assert {"durable:   nothing yet", "lag:       7.2 s", "failures:  2 in a row"} <= {*bad}
    assert bad[-1] == "log:       try 2 failed: no space left on device"
    assert json.loads(daemon.cli("status", "--json", "web").stdout)["generation"] == 4
    assert [one["degraded"] for one in json.loads(daemon.cli("status", "--json").stdout)] == [True, False]


def test_history_of_a_sandbox_and_of_a_path(daemon: StandIn) -> None:
    """D3"""
    header, *rows = told(daemon, "history", "web")
    assert header.split() == ["GENERATION", "TIME", "FILES", "SIZE", "ADDED", "KEPT", "FOR"]
    assert [int(row.split()[0]) for row in rows] == [*KEPT]
    assert rows[0].endswith("restored")
    assert told(daemon, "history", "-q", "-n", "2", "web") == ["3", "4"]
    header, first, second = told(daemon, "history", "gone", "/home/user/t.db")
    assert (first.split()[3], second.split()[3], second.split()[-3]) == ("added", "changed", "0644")
    found = json.loads(daemon.cli("history", "--json", "web").stdout)
    assert {"generation", "time", "files", "bytes"} <= found[0].keys()
    found = json.loads(daemon.cli("history", "--json", "web", "/home/user/t.db").stdout)
    assert [(one["generation"], one["files"], one["bytes"]) for one in found] == [(1, 1, 4), (3, 1, 6)]


def test_show_writes_a_file_as_it_is_and_lists_a_directory(daemon: StandIn) -> None:
    """D3"""
    assert daemon.cli("show", "web", "/home/user/t.db").stdout == b"three\n"
    assert daemon.cli("show", "web", "/home/user/t.db@1").stdout == b"one\n"
    assert daemon.cli("show", "web", "/home/user/t.db@2024-01-01T00:02Z").stdout == b"one\n"
    assert daemon.cli("show", "gone", "/workspace/a@b").stdout == b"\x00\xff"
    assert daemon.cli("show", "web", "/workspace/endless").stdout == b"x" * 300_000
    header, *rows = told(daemon, "show", "web", "/home/user@3")
    assert header.split() == ["MODE", "OWNER", "SIZE", "MODIFIED", "PATH"]
    assert rows[0].split()[:4] == ["-rw-r--r--", "1000:1000", "6", "B"]
    assert rows[1].endswith("/home/user/odd\udcff\\x1b[31m")
    assert len(told(daemon, "show", "web")) == 4
    assert json.loads(daemon.cli("show", "--json", "web", "@1").stdout)["generation"] == 1


def test_show_of_a_damaged_file_fails(daemon: StandIn) -> None:
    """D6"""
    daemon.add("broken")
    done = daemon.cli("show", "broken", "/workspace/endless")
    assert done.returncode == 1
    assert b"error: " in done.stderr


def test_diff_of_two_generations_is_one_line_a_path(daemon: StandIn) -> None:
    """D3"""
    assert told(daemon, "diff", "web", "1", "3") == [
        "A /home/user/odd\udcff\\x1b[31m  0 B", "M /home/user/t.db  4 B → 6 B",
    ]  # fmt: skip
    assert [line[0] for line in told(daemon, "diff", "web", "3")] == ["D", "A", "A"]
    changes = json.loads(daemon.cli("diff", "--json", "web", "1", "3").stdout)
    assert changes[1] == {"change": "changed", "path": "/home/user/t.db", "before": 4, "after": 6}
    assert daemon.cli("diff", "web").stdout.startswith(b"diff --git")  # with one name it is the patch, as ever


@pytest.mark.parametrize(
    ("words", "path", "at"),
    [
        (("--to", "new"), None, None),
        (("@3", "--to", "new"), None, "3"),
        (("/home/user/t.db@1", "--to", "new"), "/home/user/t.db", "1"),
        (("/workspace/a@b", "--to", "new"), "/workspace/a@b", None),
    ],
)
def test_restore_from_the_vault_to_the_host(
    daemon: StandIn, words: tuple[str, ...], path: str | None, at: str | None
) -> None:
    """D3, D7"""
    done = daemon.cli("restore", "gone", *words)
    assert (done.returncode, done.stdout) == (0, f"{daemon.home}/new\n".encode())
    asked = daemon.vaults.asked[-1]
    assert (asked.path, asked.at, asked.to) == (path, at, f"{daemon.home}/new")
    assert b"2 files, 2.0 KiB, generation" in done.stderr
    assert b"warning: left out: 1 device" in done.stderr


def test_restore_into_the_guest_says_how_to_take_it_back(daemon: StandIn) -> None:
    """D7"""
    done = daemon.cli("restore", "web", "/home/user/t.db@1")
    assert (done.returncode, done.stdout) == (0, b"/home/user/t.db\n")
    assert b"what it was before: limpet restore web /home/user/t.db@5" in done.stderr
    assert daemon.cli("restore", "web@3", "/home/user").returncode == 0
    assert (daemon.vaults.asked[-1].path, daemon.vaults.asked[-1].at) == ("/home/user", "3")


def test_restore_of_a_checkpoint_is_what_it_was(daemon: StandIn) -> None:
    """FRZ-7"""
    daemon.cli("checkpoint", "create", "web", "--label", "12")
    done = daemon.cli("restore", "-f", "web@12")
    assert (done.returncode, done.stdout) == (0, b"web\n")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("restore", "web@3", "@4", "--to", "d"), 1, "@3 and @4 are two generations"),
        (("restore", "web@before", "--to", "d"), 1, "'before' is neither a generation nor a time"),
        (("restore", "web", "relative", "--to", "d"), 2, "for example /home/user/relative"),
        (("restore", "web", "/x", "--as", "new"), 1, "--as, --force and --disk-only are for checkpoints"),
        (("restore", "web"), 1, "limpet restore web --to DIR"),
        (("restore", "web@3"), 1, "limpet restore web @3 --to DIR"),
        (("restore", "web", "/x@2"), 1, "the nearest kept ones: 3 and 4"),
        (("show", "web", "x"), 2, "not an absolute path"),
        (("show", "web", "@soon"), 2, "neither a generation nor a time"),
        (("history", "web", "x"), 1, "not an absolute path"),
        (("diff", "web", "first"), 2, "neither a generation nor a time"),
        (("diff", "web", "1", "3", "--stat"), 1, "are for the patch"),
        (("history", "nobody"), 1, "no sandbox named 'nobody'"),
        (("run", "--payload", "/a", "true"), 2, "write HOSTDIR:GUESTDIR"),
        (("payload", "add", "web", "x:y"), 2, "write HOSTDIR:GUESTDIR"),
        (("payload", "rm", "web", "/nowhere"), 1, "'web' has no payload at /nowhere"),
        (("payload", "confirm", "web", "pl_1", "--keep", "both"), 2, "neither 'guest' nor 'host'"),
        (("undelete", "never"), 1, "limpet trash ls"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(daemon: StandIn, words: tuple[str, ...], code: int, message: str) -> None:
    done = daemon.cli(*words)
    assert (done.returncode, done.stdout) == (125 if words[0] == "run" and code == 1 else code, b"")
    assert message in done.stderr.decode()


def test_vault_verbs(daemon: StandIn) -> None:
    """D6"""
    done = daemon.cli("vault", "check")
    assert (done.returncode, done.stdout) == (1, b"web: ok, 3 generations, 12 objects, 4.0 KiB\n")
    assert done.stderr == b"error: broken: gens/000004: object 2 is not as it was written\n"
    assert told(daemon, "vault", "repair", "broken")[0] == "broken: gens/000004 set aside; back to generation 3"
    assert [one["ok"] for one in json.loads(daemon.cli("vault", "check", "--json").stdout)] == [True, False]
    assert told(daemon, "vault", "gc", "web") == ["web@2"]
    assert told(daemon, "vault", "df")[-1].split() == ["total", "-", "6", "4.0", "KiB", "2.0", "KiB"]
    assert told(daemon, "vault", "ls", "-q") == ["sb_gone", "sb_web"]
    assert [row.split()[:3] for row in told(daemon, "vault", "ls")[1:]] == [
        ["gone", "trashed", "3"], ["web", "running", "3"],
    ]  # fmt: skip


def test_payload_verbs(daemon: StandIn) -> None:
    """PAY-1"""
    (id,) = told(daemon, "payload", "add", "web", "data:/home/user/data:interval=5s")
    done = daemon.cli("payload", "add", "web", "edited:/e")
    assert b"a.txt was edited on the host\nhint: limpet payload confirm" in done.stderr
    header, first, second = told(daemon, "payload", "ls")
    assert header.split() == ["PAYLOAD", "SANDBOX", "HOST", "GUEST", "INTERVAL", "STATE"]
    assert first.split() == [id, "web", f"{daemon.home}/data", "/home/user/data", "5", "s", "ok"]
    assert told(daemon, "payload", "ls", "-q", "web")[0] == id
    done = daemon.cli("payload", "status", "web")
    assert b"drifted" in done.stdout and b"warning: pl_" in done.stderr
    assert "1 ok, 1 drifted" in told(daemon, "status")[1]
    assert "a.txt was edited on the host" in told(daemon, "status", "web")[-1]
    assert told(daemon, "payload", "confirm", "web", "/e") == [second.split()[0]]
    assert told(daemon, "payload", "rm", "web", "data") == [id]
    assert [one["guest_dir"] for one in json.loads(daemon.cli("payload", "ls", "--json").stdout)] == ["/e"]


def test_create_and_run_take_payloads(daemon: StandIn) -> None:
    """PAY-1"""
    daemon.cli("create", "fed", "--payload", "a:/a", "--payload", "b:/b:interval=1m")
    sent = [(one.host_dir, one.guest_dir, one.interval) for one in daemon.boxes.created[-1].payloads]
    assert sent == [(f"{daemon.home}/a", "/a", 1.0), (f"{daemon.home}/b", "/b", 60.0)]
    done = daemon.cli("run", "--no-workspace", "--name", "fed", "--payload", "c:/c", "--", "true")
    assert done.returncode == 0, done.stderr
    assert f"{daemon.home}/c <- /c" in done.stderr.decode()
    again = daemon.cli("run", "--no-workspace", "--name", "fed", "--payload", "c:/c", "--", "true")
    assert (again.returncode, again.stderr) == (0, b"")


def test_rm_goes_to_the_trash_and_comes_back(daemon: StandIn) -> None:
    """D7"""
    daemon.add("old", State.STOPPED)
    done = daemon.cli("rm", "old")
    assert (done.stdout, done.stderr) == (b"old\n", b"in the trash; to have it back: limpet undelete old\n")
    header, row = told(daemon, "trash", "ls")
    assert header.split() == ["NAME", "REMOVED", "GOES", "AT", "SIZE", "GENERATIONS", "ID"]
    assert row.split()[0] == "old"
    daemon.add("old")
    assert b"hint: limpet undelete old --as NEW" in daemon.cli("undelete", "old").stderr
    done = daemon.cli("undelete", "old", "--as", "older")
    assert (done.stdout, done.stderr) == (b"older\n", b"stopped; next: limpet start older\n")
    done = daemon.cli("rm", "--purge", "older")
    assert (done.stdout, done.stderr) == (b"older\n", b"")
    assert told(daemon, "trash", "ls", "-q") == []


def test_rm_at_a_terminal_tells_what_only_the_sandbox_has(daemon: StandIn) -> None:
    """D7"""
    daemon.add("precious", State.STOPPED)
    daemon.add("plain", State.STOPPED)
    terminal = Terminal(daemon, "rm", "precious", "plain")
    terminal.until(b"Remove? [y/N]")
    assert b"precious has 2 commits; 1 stash that the host does not have; changed: src/0.py" in terminal.seen
    assert b"src/4.py and 2 more; untracked: /home/user/odd" in terminal.seen
    assert b"plain has" not in terminal.seen and b"\x1b[31m" not in terminal.seen
    terminal.press(b"n\r")
    assert terminal.end() == 1
    terminal = Terminal(daemon, "rm", "plain")  # nothing is lost: no question
    assert terminal.end() == 0
    terminal = Terminal(daemon, "rm", "--purge", "precious")
    terminal.until(b"Remove for good? [y/N]")
    terminal.press(b"y\r")
    assert terminal.end() == 0
    assert [entry.name for entry in daemon.trash.known] == ["plain"]


def test_trash_empty_asks_at_a_terminal(daemon: StandIn) -> None:
    """D7"""
    daemon.add("old", State.STOPPED)
    daemon.cli("rm", "old")
    terminal = Terminal(daemon, "trash", "empty")
    terminal.until(b"Remove old for good? [y/N]")
    terminal.press(b"n\r")
    assert terminal.end() == 1
    done = daemon.cli("trash", "empty", "old")
    assert (done.stdout, done.stderr) == (b"old\n", b"2.0 KiB freed\n")


def test_completion_knows_removed_sandboxes_and_payloads(daemon: StandIn) -> None:
    daemon.add("removed", State.STOPPED)
    daemon.cli("rm", "removed")
    (id,) = told(daemon, "payload", "add", "web", "data:/home/user/data")
    assert daemon.complete("limpet undelete re") == daemon.complete("limpet trash empty re") == ["removed"]
    assert daemon.complete("limpet history ") == ["web", "removed"]
    assert daemon.complete("limpet payload rm web pl_") == [id]


def test_ls_says_why_a_sandbox_stands_still(daemon: StandIn) -> None:
    """VM-19"""
    daemon.add("full", State.PAUSED, error="the host's disk is full")
    daemon.add("ended", State.STOPPED, error="QEMU was killed")
    assert daemon.cli("ls").stderr == b"warning: full: the host's disk is full\n"
