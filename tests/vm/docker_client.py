"""The stock docker client, as a user of a sandbox drives it: with pipes or at a terminal."""

from __future__ import annotations

import fcntl
import io
import os
import select
import shutil
import struct
import subprocess
import tarfile
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from limpet import process


class Docker:
    """The client on the engine behind `host` (`unix://…`). It knows no other one and nothing of the user's settings."""

    def __init__(self, host: str, config: Path) -> None:
        program = shutil.which("docker")
        if program is None:
            pytest.fail("no docker client: run `make test`, or put one on PATH (tools/docker_client.sh)")
        self.program = program
        mine = {key: value for key, value in os.environ.items() if not key.startswith(("DOCKER_", "BUILDX_"))}
        self.environment = {**mine, "DOCKER_HOST": host, "DOCKER_CONFIG": str(config), "DOCKER_BUILDKIT": "0"}

    def __call__(self, *words: str, input: bytes | None = None, timeout: float = 60) -> str:
        """What it prints, without the last line's end; it has to succeed."""
        done = self.attempt(*words, input=input, timeout=timeout)
        assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr.decode(errors='replace')}"
        return done.stdout.decode().removesuffix("\n")

    def attempt(
        self, *words: str, input: bytes | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[bytes]:
        """It may fail."""
        return subprocess.run(
            [self.program, *words], env=self.environment, input=input, capture_output=True, check=False,
            stdin=subprocess.DEVNULL if input is None else None, timeout=timeout,
        )  # fmt: skip

    def start(self, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
        """One that runs beside the test, its output in a pipe."""
        given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **streams}
        return subprocess.Popen([self.program, *words], env=self.environment, **given)

    def at_terminal(self, *words: str, rows: int, columns: int) -> Terminal:
        return Terminal([self.program, *words], self.environment, rows, columns)


class Terminal:
    """A command at a terminal of its own: what a person would see and type."""

    def __init__(self, argv: Sequence[str], environment: dict[str, str], rows: int, columns: int) -> None:
        self._master, slave = os.openpty()
        self.resize(rows, columns)
        # setsid(1) makes the terminal the controlling one, so that its signals arrive: SIGWINCH and ^C.
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *argv], stdin=slave, stdout=slave, stderr=slave,
            env={**environment, "TERM": "xterm"},
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        """As dragging the window does: tty_ioctl(4), TIOCSWINSZ."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def enter(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str, seconds: float = 30.0) -> None:
        """Wait until `text` has been printed since the last call."""
        deadline = time.monotonic() + seconds
        while (at := self.seen.find(text.encode())) < 0:
            assert self._read(deadline), f"no {text!r} in {self.seen!r}"
        self.seen = self.seen[at + len(text) :]

    def wait(self, seconds: float = 30.0) -> int:
        """The exit status, once the command has ended."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self._process.wait(max(deadline - time.monotonic(), 0.1))

    def _read(self, deadline: float) -> bool:
        """Whether more came before the deadline and the end."""
        ready, _, _ = select.select([self._master], [], [], max(deadline - time.monotonic(), 0))
        try:
            chunk = os.read(self._master, 65536) if ready else b""
        except OSError:  # EIO: the other end is closed
            chunk = b""
        self.seen += chunk
        return bool(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._master)
        self._process.kill()
        self._process.wait()


def rootfs(files: dict[str, bytes] | None = None) -> bytes:
    """A tar archive of a system that is one busybox, for `docker import`, with these files besides."""
    busybox = Path(process.require("busybox"))
    applets = process.run_sync([str(busybox), "--list"]).stdout.decode().split()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for directory in ("bin", "etc", "root", "srv", "tmp"):
            _add(archive, directory, kind=tarfile.DIRTYPE, mode=0o1777 if directory == "tmp" else 0o755)
        _add(archive, "bin/busybox", busybox.read_bytes(), mode=0o755)
        for applet in sorted(set(applets) - {"busybox"}):
            _add(archive, f"bin/{applet}", kind=tarfile.SYMTYPE, target="busybox")
        _add(archive, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
        for name, content in (files or {}).items():
            _add(archive, name, content)
    return made.getvalue()


def _add(
    archive: tarfile.TarFile, name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, mode: int = 0o644,
    target: str = "",
) -> None:  # fmt: skip
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.size, entry.linkname = kind, mode, len(content), target
    archive.addfile(entry, io.BytesIO(content))
