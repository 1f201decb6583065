"""The intake disk of one machine, and the size that its guest sees of the others. What disks are made of: layers.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

from limpet import process
from limpet.errors import FailedPrecondition

INTAKE_BYTES = 256 << 20  # sparse; the host reuses it piece by piece


def create_intake(path: Path, size: int = INTAKE_BYTES) -> None:
    """Make `path` an empty sparse file of `size` bytes; what it held is gone."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


async def resize(overlay: Path, size: int) -> None:
    """Let a stopped machine see a larger disk (bytes). The guest grows its file system at the next boot.
    Raises FailedPrecondition when that would shrink it."""
    info = await process.run(["qemu-img", "info", "--output=json", str(overlay)], timeout=30)
    found = int(json.loads(info.stdout)["virtual-size"])
    if size < found:
        raise FailedPrecondition(f"the disk has {found >> 20} MiB; a disk can only grow", hint="give a larger size")
    await process.run(["qemu-img", "resize", "-q", str(overlay), str(size)], timeout=30)
