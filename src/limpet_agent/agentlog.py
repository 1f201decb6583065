"""The agent's own log: one line each, with the op id, in two files of at most half a MiB."""

from __future__ import annotations

import os
import time

_LIMIT = 512 << 10


class Log:
    """Appends to `path`; a full file becomes `path`.1. Never raises: a log must not stop the work."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._size = 0

    def __call__(self, event: str, op_id: str | None = None, **details: object) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03}Z"
        said = "".join(f" {key}={value!r}" for key, value in details.items())
        line = f"{stamp} [{os.getpid()}] {op_id or '-'} {event}{said}"
        data = line[:4000].encode(errors="backslashreplace").replace(b"\n", b" ") + b"\n"
        try:
            self._write(data)
        except OSError:
            self._close()

    def tail(self, lines: int) -> bytes:
        """The last `lines` lines, from both files."""
        kept = b""
        for path in (self.path + ".1", self.path):
            try:
                with open(path, "rb") as file:
                    kept += file.read(_LIMIT * 2)
            except OSError:
                continue
        return b"".join(kept.splitlines(keepends=True)[-lines:]) if lines > 0 else b""

    def _write(self, data: bytes) -> None:
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._fd).st_size
        self._size += os.write(self._fd, data)
        if self._size > _LIMIT:
            os.replace(self.path, self.path + ".1")
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
