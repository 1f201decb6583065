"""The logs of services: their last lines, and their beginning cut off beside a writer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limpet_agent import libc, servicelog


@pytest.mark.parametrize(
    ("lines", "expected"),
    [(None, b"a\nb\n\nc"), (0, b""), (1, b"c"), (2, b"\nc"), (3, b"b\n\nc"), (4, b"a\nb\n\nc"), (9, b"a\nb\n\nc")],
)
def test_the_last_lines_are_the_last_lines(tmp_path: Path, lines: int | None, expected: bytes) -> None:
    """RUN-7: with an end of line at the end and without; and more than one piece of them."""
    log = tmp_path / "log"
    for end in (b"", b"\n"):
        log.write_bytes(b"a\nb\n\nc" + end)
        assert servicelog.tail(str(log), lines) == (expected + end if lines != 0 else b"")
    log.write_bytes(b"".join(b"%07d\n" % n for n in range(100_000)))
    assert servicelog.tail(str(log), 20_000) == b"".join(b"%07d\n" % n for n in range(80_000, 100_000))
    assert servicelog.tail(str(tmp_path / "none"), lines) == b""


def test_a_log_of_a_gigabyte_is_read_and_cut_in_no_time(tmp_path: Path) -> None:
    """RUN-7: only its end is touched."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(b"line %d\n" % n for n in range(1000)))
    began = time.monotonic()
    assert servicelog.tail(str(log), 2) == b"line 998\nline 999\n"
    assert len(servicelog.tail(str(log), None)) == servicelog.MOST
    assert servicelog.trim(str(log))
    assert time.monotonic() - began < 2
    assert log.stat().st_size <= servicelog.LIMIT // 2 + os.statvfs(log).f_bsize
    assert servicelog.tail(str(log), 1) == b"line 999\n"
    assert not servicelog.trim(str(log))


_WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for n in range(400000):
    os.write(fd, b"%019d\\n" % n)
"""


def test_a_log_is_cut_beside_a_service_that_goes_on_writing(tmp_path: Path) -> None:
    """RUN-7: on a file system that can do it at once no line is lost or torn, but for the first."""
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(log)]) as writer:
        cut = 0
        while writer.poll() is None:
            cut += log.exists() and servicelog.trim(str(log), 1 << 20)
            time.sleep(0.001)
    assert writer.returncode == 0 and cut > 2
    lines = log.read_bytes().split(b"\n")[1:-1]
    assert [int(line) for line in lines] == list(range(400_000 - len(lines), 400_000))
    assert log.stat().st_size <= 2 << 20


def test_a_log_is_not_copied_where_that_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-7: a service that writes meanwhile would lose it."""
    log = tmp_path / "log"
    log.write_bytes(bytes(1 << 20))
    try:
        with log.open("r+b") as file:
            libc.collapse(file.fileno(), os.statvfs(log).f_bsize)
    except OSError:
        pytest.skip("this file system cannot")
    monkeypatch.setattr(os, "ftruncate", None)
    assert servicelog.trim(str(log), 1 << 19)


def test_a_log_on_another_file_system_is_cut_too() -> None:
    """RUN-7: without that call (tmpfs)."""
    log = Path(f"/dev/shm/limpet-log-{os.getpid()}")
    try:
        log.write_bytes(b"x" * (3 << 20) + b"end\n")
        assert servicelog.trim(str(log), 2 << 20)
        assert log.stat().st_size == 1 << 20 and log.read_bytes().endswith(b"xend\n")
    finally:
        log.unlink()
