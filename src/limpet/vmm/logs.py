"""Bounded logs: a file that another process appends to is shortened from the front."""

from __future__ import annotations

import os
from pathlib import Path


def trim_log(path: Path, limit: int) -> None:
    """Once a log is larger than `limit` bytes, keep its last `limit // 2`, from the start of a line. The writer must
    append (O_APPEND): it goes on at the new end. What it writes in the instant between reading and cutting is lost."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        size = os.fstat(fd).st_size
        if size <= limit:
            return
        tail = os.pread(fd, limit // 2, size - limit // 2)
        os.ftruncate(fd, 0)
        os.write(fd, tail[tail.find(b"\n") + 1 :])
    finally:
        os.close(fd)
