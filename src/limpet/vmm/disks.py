"""The disks of one machine: overlays over shared images, and the intake disk."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limpet import durable, process
from limpet.errors import FailedPrecondition

INTAKE_BYTES = 256 << 20  # sparse; the host reuses it piece by piece
_FICLONE = 0x40049409  # linux/fs.h: make a file share another one's blocks
_SLACK = 64 << 20  # bytes that a fresh sandbox writes before it is of any use


@dataclass(frozen=True)
class Overlay:
    """A qcow2 file that holds what differs from `backing`. `size` is what the guest sees, in bytes; None: as large
    as the backing file."""

    path: Path
    backing: Path
    backing_format: Literal["raw", "qcow2"] = "raw"
    size: int | None = None


async def create_disks(
    overlays: Sequence[Overlay],
    intake: Path,
    *,
    copies: Mapping[Path, Path] | None = None,
    intake_bytes: int = INTAKE_BYTES,
) -> None:
    """Create the overlays, the `copies` (new disk → what it is a copy of) and a sparse intake disk: all at once, and
    durably. On failure none of them is left. Raises InsufficientSpace, FailedPrecondition when a source is missing or
    a disk exists already."""
    durable.require_space(intake.parent, _SLACK, "a new sandbox")
    copies = copies or {}
    paths = [*(overlay.path for overlay in overlays), *copies, intake]
    if existing := [path for path in paths if path.exists()]:
        raise FailedPrecondition(f"{existing[0]} exists already")
    try:
        create_intake(intake, intake_bytes)
        async with asyncio.TaskGroup() as group:
            for overlay in overlays:
                group.create_task(_create_overlay(overlay))
            for target, source in copies.items():
                group.create_task(asyncio.to_thread(_copy, source, target))
        durable.sync_directory(intake.parent)
    except BaseException as error:
        for path in paths:
            path.unlink(missing_ok=True)
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None
        raise


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
    found = _virtual_size(info.stdout)
    if size < found:
        raise FailedPrecondition(f"the disk has {found >> 20} MiB; a disk can only grow", hint="give a larger size")
    await process.run(["qemu-img", "resize", "-q", str(overlay), str(size)], timeout=30)


def disk_used(*paths: Path) -> int:
    """Bytes that files occupy on the host, holes not counted; a missing file counts nothing."""
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512  # st_blocks counts 512-byte units whatever the file system (stat(2))
    return total


def _copy(source: Path, target: Path) -> None:
    _require_source(source)
    with source.open("rb") as old, open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new:
        try:
            fcntl.ioctl(new, _FICLONE, old.fileno())  # Btrfs and XFS share the blocks
        except OSError:
            shutil.copyfileobj(old, new)
    durable.sync_tree(target)


def _require_source(path: Path) -> None:
    if not path.is_file():
        raise FailedPrecondition(f"the disk image {path} is missing", hint="limpet setup")


async def _create_overlay(overlay: Overlay) -> None:
    _require_source(overlay.backing)
    size = [] if overlay.size is None else [str(overlay.size)]
    # The backing path is absolute: the overlay must not depend on where it lies itself.
    options = ["-q", "-f", "qcow2", "-b", str(overlay.backing.absolute()), "-F", overlay.backing_format]
    await process.run(["qemu-img", "create", *options, str(overlay.path), *size], timeout=60)
    await asyncio.to_thread(durable.sync_tree, overlay.path)
    overlay.path.chmod(0o600)


def _virtual_size(info: bytes) -> int:
    return int(json.loads(info)["virtual-size"])
