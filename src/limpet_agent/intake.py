"""Bulk bytes from the host by reference: it puts them on the intake disk, the channel says where, we read them there.

The disk is read with O_DIRECT, past the page cache, which would show what an earlier transfer left at that place.
"""

from __future__ import annotations

import mmap
import os
import zlib

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
