"""Noticing that a volume has changed: promptly by fanotify, completely by transaction ids.

    snapshot ── events are collected from just before it ──► watch ── the first event, or a newer ctransid ──► dirty

fanotify tells of every system call that changes something, and in which subvolume (the file handle holds its id); it
does not tell of stores through a memory map. A subvolume's ctransid moves with every change, but for data only at
writeback. So both are asked: a change is noticed at once, or at the next look after its writeback. Nobody listens
between `dirty` and the next snapshot, so that a guest that writes much does not pay for it.
"""

from __future__ import annotations

import os
from _thread import start_new_thread
from struct import unpack_from

from limpet_agent.btrfs import Subvolume, ctransid, open_directory
from limpet_agent.faults import Fault
from limpet_agent.loop import IN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from limpet_agent.loop import Loop, Timer
    from limpet_agent.streams import Stream

_FLAGS = 0x1 | 0x2 | 0x200  # FAN_CLOEXEC, FAN_NONBLOCK, FAN_REPORT_FID (fanotify_init(2)); the queue has a bound
_ADD_FILESYSTEM = 0x1 | 0x100
_CHANGES = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x40000000  # modify, attrib, moved, create, delete; directories
_AT_FDCWD = -100
_HANDLE = 28  # where the subvolume's id is: after info header 4, fsid 8, struct file_handle 8, an inode's number 8
_READ = 8 << 10  # bytes, about 150 events
_STRANGERS = 16  # events elsewhere that are listened to until the next look


class _Listening:
    """One fanotify group over the whole file system. Raises OSError."""

    def __init__(self, top: str) -> None:
        import ctypes
        from ctypes import c_char_p, c_int, c_uint, c_uint64

        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.fanotify_init(_FLAGS, os.O_RDONLY)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "fanotify_init")
        libc.fanotify_mark.argtypes = (c_int, c_uint, c_uint64, c_int, c_char_p)
        # At the top: the kernel takes no such mark at a subvolume, whose file system id is another.
        if libc.fanotify_mark(self.fd, _ADD_FILESYSTEM, _CHANGES, _AT_FDCWD, top.encode()):
            number = ctypes.get_errno()
            os.close(self.fd)
            raise OSError(number, "fanotify_mark")

    def heard(self) -> set[int]:
        """The ids of the subvolumes that the next events are about. An overflow of the queue is about none: then the
        transaction ids tell."""
        try:
            data = os.read(self.fd, _READ)
        except BlockingIOError:
            return set()
        found, at = set(), 0
        while at < len(data):  # struct fanotify_event_metadata, then the file handle
            length, metadata = unpack_from("=I2xH", data, at)
            if length >= metadata + _HANDLE + 8:
                found.add(unpack_from("=Q", data, at + metadata + _HANDLE)[0])
            at += length
        return found

    def close(self) -> None:
        """Waits for the kernel, 10 ms and more: not for the loop's thread."""
        os.close(self.fd)


class _Watch:
    """One question of the host: which of these volumes has changed since? Raises Fault, OSError."""

    def __init__(self, top: str, stream: Stream, since: Mapping[str, int], poll: float) -> None:
        self.stream, self.poll = stream, poll
        self.timer: Timer | None = None
        self._volumes: dict[str, tuple[int, int, int]] = {}  # descriptor, subvolume's id, ctransid
        try:
            for name, transaction in since.items():
                fd = open_directory(f"{top}/@{name}")
                self._volumes[name] = (fd, 0, transaction)
                self._volumes[name] = (fd, Subvolume(fd).ident, transaction)
        except BaseException:
            self.close()
            raise

    def changed(self, heard: set[int]) -> list[str]:
        """The volumes that changed; of `heard` it is known."""
        return [name for name, (fd, ident, since) in self._volumes.items() if ident in heard or _newer(fd, since)]

    def concerns(self, heard: set[int]) -> bool:
        """Whether one of the volumes is among these."""
        return any(ident in heard for _fd, ident, _since in self._volumes.values())

    def close(self) -> None:
        for fd, _ident, _since in self._volumes.values():
            os.close(fd)
        self._volumes.clear()
        if self.timer is not None:
            self.timer.cancel()


def _newer(fd: int, since: int) -> bool:
    try:
        return ctransid(fd) > since
    except OSError:  # deleted: the host will see
        return True


class Watching:
    """The one watch that there is, and what is listened to for it. All but `listen` is for the loop's thread."""

    def __init__(self, loop: Loop, top: str, log: Callable[..., None]) -> None:
        self._loop, self._top, self._log = loop, top, log
        self._watch: _Watch | None = None
        self._listening: _Listening | None = None
        self._strangers = 0

    def listen(self) -> None:
        """Collect events from now on, for the next watch. From another thread, before a snapshot: an event too many
        costs a look, one that is missing is noticed late."""
        fresh: _Listening | None
        try:
            fresh = _Listening(self._top)
        except (OSError, ImportError, AttributeError) as error:  # changes are noticed by the transaction ids alone
            self._log("cannot listen for changes", error=repr(error))
            fresh = None
        self._loop.from_thread(lambda: self._take(fresh))

    def begin(self, stream: Stream, since: Mapping[str, int], poll: float) -> None:
        """Tell the stream as soon as one of these volumes has changed after its transaction. Takes the place of the
        watch before. Raises Fault, OSError."""
        watch = _Watch(self._top, stream, since, poll)
        if self._watch is not None:
            self._watch.stream.reset(Fault("busy", "another watch took the place of this one"))
        self._watch = watch
        stream.on_gone = lambda: self._end(watch)
        if self._listening is not None:
            self._go_on(watch)
        else:
            start_new_thread(self._prepare, (watch,))

    def _prepare(self, watch: _Watch) -> None:
        self.listen()
        self._loop.from_thread(lambda: self._go_on(watch))

    def _take(self, fresh: _Listening | None) -> None:
        self._stop_listening()
        self._listening = fresh
        self._attend()

    def _attend(self) -> None:
        if self._watch is not None and self._listening is not None:
            self._loop.watch(self._listening.fd, IN, self._heard)

    def _heard(self, _events: int) -> None:
        if self._watch is None or self._listening is None:
            return
        heard = self._listening.heard()
        if self._watch.concerns(heard):
            self._tell(self._watch, self._watch.changed(heard))
            return
        self._strangers += 1  # this may go on without an end: leave it until the next look
        if self._strangers > _STRANGERS:
            self._loop.unwatch(self._listening.fd)

    def _go_on(self, watch: _Watch) -> None:
        """Look, and look again after a while."""
        if self._watch is not watch:
            return
        changed = watch.changed(self._listening.heard() if self._listening is not None else set())
        if changed:
            self._tell(watch, changed)
        else:
            self._strangers = 0
            self._attend()
            watch.timer = self._loop.after(watch.poll, lambda: self._go_on(watch))

    def _tell(self, watch: _Watch, names: list[str]) -> None:
        self._end(watch)
        watch.stream.answer({"dirty": names})

    def _end(self, watch: _Watch) -> None:
        if self._watch is watch:
            self._watch = None
            watch.close()
            self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listening is not None:
            self._loop.unwatch(self._listening.fd)
            start_new_thread(self._listening.close, ())
            self._listening = None
