"""The intake disk seen from the host: a sparse file, cut into slots that carry bulk bytes into the guest.

A slot is written, announced on the channel (REF) and free again when the guest has returned the credit for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import zlib
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

from limpet.errors import Unavailable

SLOT = 1 << 20
SLOTS = 256


class Intake:
    """Slots of one intake file. Raises Unavailable when the file cannot be opened or written."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(f"cannot open the intake disk {path}: {error.strerror}") from None
        slots = min(SLOTS, os.fstat(self._fd).st_size // SLOT)
        self._free = deque(range(slots))
        self._waiting: deque[asyncio.Future[int]] = deque()
        if not slots:
            self.close()
            raise Unavailable(f"the intake disk {path} is smaller than one slot of {SLOT} bytes")

    async def take(self) -> int:
        """A free slot; waits until there is one. Bound the wait."""
        if self._free:
            return self._free.popleft()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give_back(future.result())
            else:
                self._waiting.remove(future)
            raise

    def give_back(self, slot: int) -> None:
        """The guest has read this slot, or never will."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(slot)
                return
        self._free.append(slot)

    def write(self, slot: int, data: bytes | memoryview) -> tuple[int, int]:
        """Fill a slot (at most `SLOT` bytes); what a REF needs: (offset, crc32)."""
        offset = slot * SLOT
        view = memoryview(data)
        written = 0
        try:
            while written < len(view):
                written += os.pwrite(self._fd, view[written:], offset + written)
        except OSError as error:
            raise Unavailable(f"cannot write the intake disk: {error.strerror}") from None
        return offset, zlib.crc32(data)

    def close(self) -> None:
        """Close the file; who waits for a slot is told that there is none."""
        for future in self._waiting:
            future.cancel()
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
        self._fd = -1


async def whole_slots(data: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces of a slot each: what is aligned the guest writes past its page cache, 5 times faster."""
    kept = bytearray()
    async for piece in data:
        kept += piece
        while len(kept) >= SLOT:
            rest = kept[SLOT:]
            del kept[SLOT:]
            yield bytes(kept)
            kept = rest
    if kept:
        yield bytes(kept)
