"""Bulk bytes from the host by reference: it puts them on the intake disk, the channel says where, we read them there.

The disk is read with O_DIRECT, past the page cache, which would show what an earlier transfer left at that place.
"""

from __future__ import annotations

import mmap
import os
import zlib
from _thread import allocate_lock, start_new_thread

from limpet_agent import frames
from limpet_agent.faults import Fault, from_os

BLOCK = 4096  # O_DIRECT wants offset, length and memory aligned; 4096 suits every device


class Intake:
    """The intake disk, opened when first needed. Usable from several threads."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._fd = -1

    @staticmethod
    def buffer() -> mmap.mmap:
        """Page-aligned memory for `fetch`. Use it again: under emulation, new pages cost more than what fills them."""
        return mmap.mmap(-1, frames.MAX_PAYLOAD)

    def fetch(self, payload: bytes, buffer: mmap.mmap) -> memoryview:
        """The bytes that a REF stands for, in `buffer`. Raises Fault when the disk cannot be read or the bytes are
        not those."""
        offset, length, checksum = frames.reference(payload)
        if offset % BLOCK:
            raise Fault("bad_request", "REF is not aligned")
        view = memoryview(buffer)
        try:
            got = os.preadv(self._descriptor(), [view[: -(-length // BLOCK) * BLOCK]], offset)
        except OSError as error:
            raise from_os(error, "intake disk") from None
        if got < length or zlib.crc32(view[:length]) != checksum:
            raise Fault("internal", "the intake disk does not hold what was announced")
        return view[:length]

    def _descriptor(self) -> int:
        if self._fd < 0:
            if self._path is None:
                raise Fault("failed_precondition", "this machine has no intake disk")
            flags = os.O_RDONLY | os.O_CLOEXEC
            try:
                self._fd = os.open(self._path, flags | os.O_DIRECT)
            except OSError:  # a file on tmpfs, in tests
                self._fd = os.open(self._path, flags)
        return self._fd


class Ahead:
    """Reads and checks the next piece in a helper thread while the present one is being written: twice the speed."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._buffers = [intake.buffer()]
        self._present = 0
        self._coming: bytes | None = None
        self._done = allocate_lock()
        self._result: memoryview | BaseException | None = None

    def fetch(self, payload: bytes, following: bytes | None) -> memoryview:
        """The bytes of a REF, valid until the next call; `following` is the REF that will be asked for next, if it is
        known. Raises Fault."""
        found = self._await() if self._coming is payload else self._get(payload)
        if following is not None:
            self._begin(following)
        if isinstance(found, BaseException):
            raise found
        return found

    def _get(self, payload: bytes) -> memoryview:
        return self._intake.fetch(payload, self._buffers[self._present])

    def _begin(self, payload: bytes) -> None:
        if len(self._buffers) == 1:
            self._buffers.append(self._intake.buffer())
        self._present ^= 1
        buffer = self._buffers[self._present]
        self._coming = payload
        self._done.acquire()
        start_new_thread(self._run, (payload, buffer))

    def _run(self, payload: bytes, buffer: mmap.mmap) -> None:
        try:
            self._result = self._intake.fetch(payload, buffer)
        except BaseException as error:
            self._result = error
        finally:
            self._done.release()

    def _await(self) -> memoryview | BaseException:
        self._done.acquire()
        self._done.release()
        self._coming = None
        result, self._result = self._result, None
        assert result is not None
        return result
