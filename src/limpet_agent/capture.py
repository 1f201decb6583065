"""One lane of a command's output, kept in a sparse file in which file offset = logical offset.

The bytes go from the pipe to the file inside the kernel (splice). The descriptor's own position is the end of the
lane: PID 1 holds the same open file description, so a new agent continues where a killed one stopped. What is older
than `KEEP` is punched out of the file; its end never moves back.
"""

from __future__ import annotations

import errno
import fcntl
import os
from struct import pack

KEEP = 16 << 20
_PUNCH_AT = KEEP + (4 << 20)
_STEP = 1 << 20
_PIPE_SIZE = 1 << 20
_F_SETPIPE_SZ = 1031  # fcntl(2)
_FIONREAD = 0x541B  # asm-generic/ioctls.h: bytes that wait in a pipe
_FS_IOC_UNRESVSP64 = 0x4030582B  # _IOW('X', 43, struct space_resv): punches a hole on any file system; needs no ctypes
_BLOCK = 4096


class Lane:
    """Captures what arrives on `source` (a pipe's reading end, or a terminal). `end` counts all bytes ever."""

    def __init__(self, name: str, path: str, source: int, *, terminal: bool, file: int = -1) -> None:
        self.name, self.path, self.terminal = name, path, terminal
        self.source, self.file = source, file
        self.start = self.end = 0
        if file >= 0:
            self._recover()

    def pump(self) -> bool:
        """Move what is there, at most 1 MiB. False at the end of the output."""
        try:
            moved = self._move()
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno == errno.EIO and self.terminal:  # how a terminal says that nobody has it open
                moved = 0
            else:
                moved = self._discard()
                if moved < 0:
                    return True
        if not moved:
            return False
        self.end += moved
        if self.end - self.start > _PUNCH_AT:
            self._punch(self.end - KEEP)
        return True

    def read(self, offset: int, size: int) -> bytes:
        """Kept bytes from `offset` on (at least `start`); empty when there are none yet."""
        size = min(size, self.end - offset)
        return os.pread(self.file, size, offset) if size > 0 else b""

    def close_source(self) -> None:
        """No more output."""
        if self.source >= 0:
            if not self.terminal:  # the terminal's descriptor is the command's, see execs.py
                os.close(self.source)
            self.source = -1

    def close(self) -> None:
        """Close what is open; the file stays."""
        self.close_source()
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def reopen(self) -> None:
        """Open the file of a lane that was closed, to read it."""
        if self.file < 0 and self.end:
            self.file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def _move(self) -> int:
        if self.file < 0:
            return self._first()
        return self._read_write() if self.terminal else self._splice()

    def _first(self) -> int:
        """The first bytes make the file: a command that says nothing costs no file. The file comes before the bytes
        are taken out of the pipe: killed in between, the next agent finds both."""
        if not self.terminal and any(fcntl.ioctl(self.source, _FIONREAD, bytes(4))):
            self._create()
            self._widen()
            return self._splice()
        data = os.read(self.source, 64 << 10)
        if data:
            self._create()
            self._write(data)
        return len(data)

    def _create(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self.file = os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
            self.file = os.open(self.path, flags, 0o600)

    def _widen(self) -> None:
        try:
            fcntl.fcntl(self.source, _F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:  # over the user's pipe limit: the default will do
            pass

    def _splice(self) -> int:
        try:
            return os.splice(self.source, self.file, _STEP, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return self._read_write()  # a file system without splice

    def _read_write(self) -> int:
        data = os.read(self.source, 64 << 10)
        self._write(data)
        return len(data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.file, view) :]

    def _discard(self) -> int:
        """The disk is full: the command goes on, its output is lost, and readers are told of a gap.
        0 at the end of the output, -1 when there is nothing just now."""
        try:
            size = len(os.read(self.source, 64 << 10))
        except BlockingIOError:
            return -1
        except OSError:
            return 0
        if self.file >= 0:
            os.lseek(self.file, self.end + size, os.SEEK_SET)
        self.start = self.end + size
        return size

    def _punch(self, keep_from: int) -> None:
        hole_end = keep_from // _BLOCK * _BLOCK
        space = pack("hhxxxxqqiI16x", 0, os.SEEK_SET, 0, hole_end, 0, 0)
        try:
            fcntl.ioctl(self.file, _FS_IOC_UNRESVSP64, space)
        except OSError:  # no holes on this file system: the bytes stay, but are not promised
            pass
        self.start = hole_end

    def _recover(self) -> None:
        self.end = os.lseek(self.file, 0, os.SEEK_CUR)
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.start = self.end
            return
        try:
            self.start = min(os.lseek(fd, 0, os.SEEK_DATA), self.end)
        except OSError:  # nothing but a hole
            self.start = self.end
        finally:
            os.close(fd)
