"""One daemon per state directory: an exclusive flock, with the pid of its holder written in the file for messages."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from limpet.errors import FailedPrecondition


def acquire(path: Path) -> int:
    """The descriptor that holds the lock until it is closed. Raises FailedPrecondition when somebody else has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise FailedPrecondition(
            f"another limpetd (pid {holder}) already serves {path.parent}",
            hint="`limpet daemon stop` ends it; LIMPET_HOME selects another state directory",
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
