"""The logs of services: they append, we read the end and cut off the beginning before it grows large."""

from __future__ import annotations

import os

from limpet_agent import libc

LIMIT = 8 << 20  # bytes; what a log is cut to when it is longer is half of that
MOST = 4 << 20  # bytes that are read at most
_PIECE = 64 << 10


def open_end(path: str) -> int:
    """A descriptor for a service to write its log to."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def tail(path: str, lines: int | None, most: int = MOST) -> bytes:
    """The last lines (None: all), at most the newest `most` bytes; nothing when there is no log. Costs what it
    returns, however long the log is. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    pieces: list[bytes] = []
    try:
        at = end = os.fstat(fd).st_size
        missing = lines  # line ends that are still to be found, beside the last byte's own
        while at > max(end - most, 0) and (missing is None or missing >= 0):
            start = max(at - _PIECE, end - most, 0)
            piece = os.pread(fd, at - start, start)
            pieces.append(piece)
            at = start
            if missing is not None:
                missing -= piece.count(b"\n")
    finally:
        os.close(fd)
    return last_lines(b"".join(reversed(pieces)), lines)


def last_lines(data: bytes, lines: int | None) -> bytes:
    """The last lines of some bytes."""
    at = len(data)
    if lines is None:
        return data
    if lines <= 0:
        return b""
    if data.endswith(b"\n"):
        at -= 1
    for _ in range(lines):
        at = data.rfind(b"\n", 0, at)
        if at < 0:
            return data
    return data[at + 1 :]


def trim(path: str, limit: int = LIMIT) -> bool:
    """Cut off the beginning of a log that is longer than `limit`, beside a service that goes on writing; whether it
    was. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        size = os.fstat(fd).st_size
        if size <= limit:
            return False
        block = os.fstatvfs(fd).f_bsize
        surplus = (size - limit // 2) // block * block
        try:
            libc.collapse(fd, surplus)
        except OSError:  # not ext4 or XFS: what is written between these two calls is lost
            kept = os.pread(fd, limit // 2, size - limit // 2)
            os.ftruncate(fd, 0)
            os.write(fd, kept)
        return True
    finally:
        os.close(fd)
