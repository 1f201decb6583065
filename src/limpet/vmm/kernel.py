"""The kernel as QEMU gets it: a copy in memory that is taken back once the guest has it.

QEMU maps the kernel file, copies it into the guest's memory, and keeps the mapping for the next reset: 48 MiB for each
machine. Ours are never reset (-no-reboot makes a reset the end), so those pages are only a cost. A memfd can be
emptied under the mapping; a file that others use cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from limpet.errors import FailedPrecondition


@contextlib.asynccontextmanager
async def lent(kernel: Path) -> AsyncIterator[int]:
    """A descriptor with a copy of `kernel` (20 ms), emptied at the end of the block. QEMU must have loaded it by then:
    it has when it greets on QMP, because it loads before it runs its main loop. Raises FailedPrecondition."""
    try:
        fd = await asyncio.to_thread(_copy, kernel)
    except OSError as error:
        raise FailedPrecondition(f"cannot read the kernel {kernel}: {error.strerror}", hint="limpet setup") from None
    try:
        yield fd
    finally:
        os.ftruncate(fd, 0)
        os.close(fd)


def _copy(kernel: Path) -> int:
    with kernel.open("rb") as source:
        target = os.memfd_create("limpet-kernel", os.MFD_CLOEXEC)
        try:
            left = os.fstat(source.fileno()).st_size
            while left > 0 and (done := os.sendfile(target, source.fileno(), None, left)):
                left -= done
        except BaseException:
            os.close(target)
            raise
    return target
