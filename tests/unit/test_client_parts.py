"""Parts of the client by themselves: starting the daemon, archives that want out, generated code."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from limpet import Client, errors
from limpet.client import _daemon, _tar, _wire
from limpet.errors import BadRequest, FailedPrecondition, Unavailable
from limpet.paths import discover

from .client_kit import stand_in

ROOT = Path(__file__).parent.parent.parent


def test_synchronous_client_is_made_from_the_asynchronous_one() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "unasync.py", "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def fake_python(directory: Path, script: str) -> str:
    """Something to start in place of the daemon."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_daemon_that_cannot_start_is_an_error_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo 'error: no room' >&2; echo 'hint: make some' >&2; exit 1"
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, script))
    with Client(tmp_path / "home") as client, pytest.raises(Unavailable, match="could not start: no room") as caught:
        client.status()
    assert caught.value.hint == "make some"


def test_daemon_that_dies_without_a_word_points_to_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "exit 3"))
    with pytest.raises(Unavailable) as caught:
        _daemon.start(discover(tmp_path / "home"), str(tmp_path / "home"))
    assert "daemon.err" in (caught.value.hint or "")


def test_loser_of_a_race_finds_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = discover(tmp_path / "h")
    winner = (
        "import socket, time; s = socket.socket(socket.AF_UNIX);"
        f" time.sleep(0.3); s.bind({str(paths.daemon_socket)!r}); s.listen(); time.sleep(5)"
    )
    paths.make()
    with subprocess.Popen([sys.executable, "-c", winner]) as process:
        script = "echo 'error: another limpetd (pid 1) already serves' >&2; exit 1"
        monkeypatch.setattr(sys, "executable", fake_python(tmp_path, script))
        assert _daemon.start(paths) is not None or _daemon.listening(paths.daemon_socket)
        process.kill()


def test_unwritable_home_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Client(tmp_path / "file") as client, pytest.raises(FailedPrecondition, match="cannot create"):
        client.status()


def test_answer_of_another_protocol_says_to_replace_the_daemon() -> None:
    body = b'{"code": "failed_precondition", "message": "protocol 2 is spoken here"}'
    error = _wire.failure(412, body, {"limpet-protocol": "2"})
    assert "limpet daemon stop" in (error.hint or "")


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"detail": 1}', b"\xff"])
def test_answer_that_is_no_error_of_ours_is_still_one(body: bytes) -> None:
    error = _wire.failure(500, body, {}, "op_1")
    assert isinstance(error, errors.Internal) and error.op_id == "op_1"


def test_no_name_can_change_the_route() -> None:
    assert _wire.path_of("sandboxes", "../x?y", "files") == "/v1/sandboxes/..%2Fx%3Fy/files"
    assert _wire.target("/v1/x", {"path": "a b\udcff&c", "none": None, "no": False, "yes": True}) == (
        "/v1/x?path=a+b%FF%26c&yes=1"
    )


def archive(*members: tuple[str, bytes | None, str]) -> io.BytesIO:
    """A tar of (name, type, content or link target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind or tarfile.REGTYPE
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                member.linkname = content
            else:
                member.size = len(content)
            member.mode = 0o4755
            tar.addfile(member, io.BytesIO(content.encode()))
    return io.BytesIO(buffer.getvalue())


@pytest.mark.parametrize(
    "members",
    [
        [("../out", None, "x")],
        [("/out", None, "x")],
        [("in/../../out", None, "x")],
        [("link", tarfile.SYMTYPE, ".."), ("link/out", None, "x")],
        [("hard", tarfile.LNKTYPE, "../out")],
    ],
)
def test_archive_that_wants_out_is_refused(tmp_path: Path, members: list[tuple[str, bytes | None, str]]) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(BadRequest):
        _tar.unpack(archive(*members), inside)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_archive_does_not_write_through_a_link_that_lies_there(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for directory in (inside, outside):
        directory.mkdir()
    (inside / "link").symlink_to(outside)
    with pytest.raises(BadRequest, match="symbolic link"):
        _tar.unpack(archive(("link/x", None, "x")), inside)
    assert list(outside.iterdir()) == []


def test_archive_replaces_a_link_instead_of_following_it(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "precious").write_text("mine")
    (inside / "x").symlink_to(tmp_path / "precious")
    _tar.unpack(archive(("x", None, "theirs")), inside)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (inside / "x").read_text() == "theirs"


def test_unpacked_files_have_no_setuid_bit_and_devices_are_left_out(tmp_path: Path) -> None:
    _tar.unpack(archive(("x", None, "x"), ("dev", tarfile.CHRTYPE, "")), tmp_path)
    assert (tmp_path / "x").stat().st_mode & 0o7777 == 0o755
    assert not (tmp_path / "dev").exists()


def test_damaged_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="damaged"):
        _tar.unpack(io.BytesIO(b"no tar at all" * 100), tmp_path)


def test_packing_and_unpacking_keeps_what_matters(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "d" / "empty").mkdir(parents=True)
    (source / "d" / ("long" * 40)).write_bytes(bytes(3_000_000))
    (source / "\udcff").write_bytes(b"not utf-8")
    (source / "one").write_bytes(b"linked")
    os.link(source / "one", source / "two")
    os.utime(source / "one", ns=(1, 1_234_567_890_123_456_789))
    (source / "dangling").symlink_to("/no/where")
    os.mkfifo(source / "fifo")
    _tar.unpack(io.BytesIO(b"".join(_tar.pack(source, "x"))), tmp_path, rename="copy")
    copy = tmp_path / "copy"
    assert sorted(path.name for path in copy.iterdir()) == sorted(["d", "\udcff", "one", "two", "dangling"])
    assert (copy / "d" / ("long" * 40)).stat().st_size == 3_000_000
    assert (copy / "one").stat().st_ino == (copy / "two").stat().st_ino
    assert int((copy / "one").stat().st_mtime) == 1_234_567_890
    assert (copy / "dangling").readlink() == Path("/no/where")


def test_command_is_followed_on_when_the_connection_breaks() -> None:
    """VM-8: the daemon ends in the middle of a command; what the client had read already does not come again."""
    with (
        stand_in() as server,
        Client(server.home, autostart=False) as client,
        client.exec("web", ["sh", "-c", "echo one; sleep 1; echo two"]) as command,
    ):
        assert command.read() == ("stdout", b"one\n")
        assert command._socket is not None
        command._socket.close()
        assert command.read() == ("stdout", b"two\n")
        assert server.local_execs.attached == [(command.id, 4, 0)]
        assert command.result().exit_code == 0


def test_command_that_was_being_fed_is_not_taken_up_silently() -> None:
    with stand_in() as server, Client(server.home, autostart=False) as client:
        command = client.exec("web", ["cat"], stdin=True)
        command.stdin.write(b"x")
        assert command.read() == ("stdout", b"x")
        assert command._socket is not None
        command._socket.close()
        with pytest.raises(Unavailable, match="connection to the daemon broke") as caught:
            command.read()
        assert caught.value.hint == f"limpet attach web {command.id}"
