"""Freezing file systems for the length of a snapshot: whole on the disk, and nothing more written (FIFREEZE).

    hold the loop ──► freeze ──► (the host takes its snapshot) ──► thaw ──► go on

A process that writes to a frozen file system waits until the thaw; if the agent did, nobody would thaw. So it freezes
in a thread, and its loop handles the channel and the timer of the thaw only. The thaw comes by itself when the host is
late; PID 1 knows the time too, for an agent that dies, or hangs in a write that was under way.
"""

from __future__ import annotations

import errno
import fcntl
import os
from _thread import start_new_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from limpet_agent.keeper import Keeper
    from limpet_agent.loop import Loop

_RCU = "/sys/kernel/rcu_expedited"
_BACKSTOP = 1.0  # seconds after which PID 1 does what the agent should have done
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h
_KINDS = ("ext4", "ext3", "ext2", "btrfs", "xfs", "f2fs")


def file_systems() -> list[str]:
    """Where the writable file systems on disks are mounted, each once, the root's last: what holds `/run` and the
    channel is none of them."""
    found: dict[str, str] = {}
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            device, path, kind, options = line.split()[:4]
            if kind in _KINDS and "ro" not in options.split(","):
                found.setdefault(device, path.replace("\\040", " "))
    return sorted(found.values(), key=len, reverse=True)


def freeze(paths: list[str]) -> tuple[list[str], list[str]]:
    """Freeze each; which were, and which could not be and why. Blocks until what is dirty is on the disk."""
    done, failed = [], []
    _hurry(b"1")
    for path in paths:
        try:
            _control(path, _FIFREEZE)
            done.append(path)
        except OSError as error:
            failed.append(f"{path}: {error.strerror}")
    _hurry(b"0")
    return done, failed


def _hurry(flag: bytes) -> None:
    """A freeze waits for several RCU grace periods, by the clock: more than half of its time if they are not
    expedited."""
    try:
        fd = os.open(_RCU, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, flag)
    finally:
        os.close(fd)


def thaw(paths: list[str]) -> bool:
    """Thaw each, in the reverse order; whether all of them were still frozen."""
    frozen = True
    for path in reversed(paths):
        try:
            _control(path, _FITHAW)
        except OSError as error:
            frozen = frozen and error.errno != errno.EINVAL  # EINVAL: it was not frozen
    return frozen


def _control(path: str, request: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, 0)
    finally:
        os.close(fd)


class Standstill:
    """One freeze, from the request to the thaw. `over` is called when everything may go on."""

    def __init__(self, loop: Loop, keeper: Keeper, over: Callable[[], None]) -> None:
        self._loop, self._keeper, self._over = loop, keeper, over
        self._frozen: list[str] | None = None  # until the thread is done
        self._ends: list[Callable[[bool], None]] = []

    def begin(self, channel: int, seconds: float, told: Callable[[dict[str, Any]], None]) -> None:
        """Freeze, for at most `seconds`, and tell what was and what was not. Only the descriptor `channel` is served
        meanwhile."""
        paths = file_systems()
        self._loop.hold(frozenset((channel,)))
        self._keeper.frozen(seconds + _BACKSTOP)
        self._timer = self._loop.after(seconds, lambda: self.end(lambda _whole: None), urgent=True)
        start_new_thread(self._freeze, (paths, told))

    def _freeze(self, paths: list[str], told: Callable[[dict[str, Any]], None]) -> None:
        done, failed = freeze(paths)
        self._loop.from_thread(lambda: self._froze(done, failed, told))

    def _froze(self, done: list[str], failed: list[str], told: Callable[[dict[str, Any]], None]) -> None:
        self._frozen = done
        told({"frozen": done, "failed": failed})
        if self._ends:
            self._thaw()

    def end(self, told: Callable[[bool], None]) -> None:
        """Thaw, at once or when the freeze that is under way is through; tell whether all had been frozen."""
        self._ends.append(told)
        if self._frozen is not None:
            self._thaw()

    def _thaw(self) -> None:
        whole = thaw(self._frozen or [])
        self._timer.cancel()
        self._keeper.frozen(None)
        self._loop.hold(None)
        self._over()
        for told in self._ends:
            told(whole)
