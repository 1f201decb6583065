"""The lock that a running machine holds, and the one function that says whether it runs.

QEMU inherits an open, flock(2)ed descriptor. The lock belongs to the open file, not to the process that took it: it
outlives the daemon, cannot be faked by a reused pid, and the kernel drops it when QEMU ends, however that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from limpet import process
from limpet.errors import Busy, DeadlineExceeded

# `held` takes the lock for an instant to see whether it is free: a launch must not take that for a machine.
_PATIENCE = 0.1


def held(lock: Path) -> bool:
    """Whether a machine runs: somebody holds `lock`. A missing file means no."""
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


@contextlib.contextmanager
def taken(lock: Path) -> Iterator[int]:
    """Take `lock` and give its descriptor, to be inherited; our own copy is closed at the end of the block.
    Raises Busy when a machine holds it."""
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not try_lock(fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise Busy(f"a machine is already running on {lock.parent}", hint="stop or kill it first")
            time.sleep(0.005)
        yield fd
    finally:
        os.close(fd)


def holder(lock: Path) -> process.ProcessRef | None:
    """The process that has `lock` open, found without any record of it: for when the records are lost. Of several
    (a daemon that looks at this instant) the oldest is taken. Only processes of this user are seen, unless root."""
    try:
        wanted = lock.stat()
    except FileNotFoundError:
        return None
    found = [ref for pid in _processes() if _has_open(pid, wanted) and (ref := process.reference(pid))]
    return min(found, key=lambda ref: ref.started, default=None)


async def gone(ref: process.ProcessRef, timeout: float | None) -> None:
    """Wait until a process has ended: its pidfd becomes readable, also when it is nobody's child of ours."""
    try:
        fd = os.pidfd_open(ref.pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        # not `alive`: a first thread that is dead says nothing of the others, which still hold the lock
        if process.start_time(ref.pid) not in (None, ref.started):
            return
        loop.add_reader(fd, ended.set)
        async with asyncio.timeout(timeout):
            await ended.wait()
    except TimeoutError:
        raise DeadlineExceeded(f"process {ref.pid} did not end within {timeout:g} s") from None
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def try_lock(fd: int, kind: int) -> bool:
    """flock(2) `fd` as LOCK_SH or LOCK_EX without waiting; whether that worked."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _processes() -> list[int]:
    numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in numbers if pid != os.getpid()]


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        for entry in list(Path(f"/proc/{pid}/fd").iterdir()):
            with contextlib.suppress(OSError):
                if os.path.samestat(entry.stat(), wanted):
                    return True
    return False
