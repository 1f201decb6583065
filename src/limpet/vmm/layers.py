"""Layers: the qcow2 files that sandboxes' disks are made of, each holding what differs from the one that it lies on.

    ly_c (active) ──► ly_b ──► ly_a ──► an image's root.raw          ──► is the qcow2 header's backing file

Only the active layer of a running machine is ever written; once something lies on a layer it never changes. So
checkpoints, forks and restores cost an empty file, whoever made a layer can go without harm to those on it, and what
nobody reaches any more is garbage. Backing files are named relative to the directory of layers: it can be moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from limpet import durable, process
from limpet.errors import AlreadyExists, FailedPrecondition, InsufficientSpace
from limpet.names import new_id

Format = Literal["raw", "qcow2"]

_FICLONE = 0x40049409  # linux/fs.h: make a file share another one's blocks
_SLACK = 64 << 20  # bytes that a fresh layer takes before it is of any use
_SUFFIX = ".qcow2"
_BLOCK = 4096
_LONGEST_NAME = 1023  # bytes of a backing file's name (docs/interop/qcow2.txt)


class Layers:
    """The layers in one directory, by id (`ly_…`)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._building = 0
        self._builds = 0
        self.owed = False  # whether a collection was put off because something was being built
        self._patterns: dict[tuple[Format, int], bytes] = {}

    def path(self, layer: str) -> Path:
        """Where a layer is, whether or not it exists."""
        return self._directory / f"{layer}{_SUFFIX}"

    async def overlay(self, backing: Path, format: Format = "qcow2") -> str:
        """A new, empty layer on `backing`, durable when this returns. Raises FailedPrecondition when `backing` is
        missing, InsufficientSpace."""
        if not backing.is_file():
            raise FailedPrecondition(f"the disk image {backing} is missing", hint="limpet doctor")
        durable.require_space(self._directory, _SLACK, "a new disk")
        layer = new_id("ly")
        path = self.path(layer)
        base = os.path.relpath(backing, self._directory)
        try:
            empty = await self._pattern(backing, base, format)
            await asyncio.to_thread(_write, path, _lying_on(empty, os.fsencode(base)))
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise InsufficientSpace(f"cannot make {path}: {error.strerror}", hint="free some space") from None
            raise
        return layer

    async def _pattern(self, backing: Path, base: str, format: Format) -> bytes:
        """An empty layer for a disk of that size and format, as qemu-img makes it: asked for once, because starting a
        program takes longer than all the rest of a clone's disks."""
        key = (format, virtual_size(backing))
        if key not in self._patterns:
            with tempfile.TemporaryDirectory(dir=self._directory, prefix=".tmp-") as work:
                path = Path(work) / "empty"
                options = ["-q", "-f", "qcow2", "-u", "-b", base, "-F", format]
                await process.run(["qemu-img", "create", *options, str(path), str(key[1])], timeout=60)
                self._patterns[key] = path.read_bytes()
        return self._patterns[key]

    async def copy(self, source: Path) -> str:
        """A layer that is a copy of a qcow2 file of its own; durable when this returns."""
        layer = new_id("ly")
        await asyncio.to_thread(copy, source, self.path(layer))
        return layer

    async def durable(self) -> None:
        """Make the names of new layers durable."""
        await asyncio.to_thread(durable.sync_directory, self._directory)

    def chain(self, layer: str) -> list[Path]:
        """A layer's file and everything below it, down to an image's raw file. Raises FailedPrecondition when one is
        missing or is no qcow2 file."""
        return chain(self.path(layer))

    def reachable(self, layer: str) -> list[Path]:
        """A layer's file and everything below it that can be found."""
        return list(_reached(self.path(layer), set()))

    def used(self, *layers: str) -> int:
        """Bytes that layers occupy on the host, holes not counted; a missing one counts nothing."""
        return sum(occupied(self.path(layer)) for layer in layers)

    def drop(self, *layers: str) -> None:
        """Delete layers that nothing lies on. One that is gone already is fine."""
        for layer in layers:
            self.path(layer).unlink(missing_ok=True)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """While such a block lasts nothing is collected: what is being made is not reachable yet."""
        self._building += 1
        self._builds += 1
        try:
            yield
        finally:
            self._building -= 1
            self._builds += 1

    @property
    def in_flux(self) -> bool:
        """Whether something is being built."""
        return self._building > 0

    @property
    def builds(self) -> int:
        """Another number whenever a `building` block has begun or ended: what nobody reached before may be reached
        since."""
        return self._builds

    def garbage(self, roots: Iterable[str]) -> list[Path]:
        """The layers that no root reaches; none while something is being built, and none when a layer is damaged: what
        it lies on is not known any more, and may be all that is left of somebody's work."""
        if self._building:
            return []
        reached: set[Path] = set()
        try:
            for root in roots:
                reached.update(_reached(self.path(root), reached, strict=True))
        except FailedPrecondition:
            return []
        files = self._directory.glob(f"ly_*{_SUFFIX}") if self._directory.is_dir() else ()
        return sorted(file for file in files if file not in reached)


def chain(path: Path) -> list[Path]:
    """A disk file and everything that it lies on, the top first."""
    found = [path]
    while (below := backing_file(found[-1])) is not None:
        if below in found:
            raise FailedPrecondition(f"{path} lies on itself")
        found.append(below)
    return found


def backing_file(path: Path) -> Path | None:
    """What a qcow2 file lies on, by its header (docs/interop/qcow2.txt); None for nothing, and for raw files, which are
    known by their name. Raises FailedPrecondition when it is missing or damaged."""
    if path.suffix == ".raw":
        return None
    try:
        with path.open("rb") as file:
            magic, _version, offset, size = struct.unpack(">4sIQI", file.read(20))
            file.seek(offset)
            name = file.read(min(size, _LONGEST_NAME))
    except OSError as error:
        raise FailedPrecondition(f"the disk {path} cannot be read: {error.strerror}") from None
    except (struct.error, ValueError, OverflowError):
        raise FailedPrecondition(f"the disk {path} is damaged") from None
    if magic != b"QFI\xfb" or len(name) != size or b"\0" in name:
        raise FailedPrecondition(f"the disk {path} is damaged")
    return Path(os.path.normpath(path.parent / os.fsdecode(name))) if size else None


def virtual_size(disk: Path) -> int:
    """Bytes of the disk that a guest sees (docs/interop/qcow2.txt). Raises FailedPrecondition when it is damaged."""
    if disk.suffix == ".raw":
        return disk.stat().st_size
    with disk.open("rb") as file:
        header = file.read(32)
    if len(header) < 32 or header[:4] != b"QFI\xfb":
        raise FailedPrecondition(f"the disk {disk} is damaged")
    return int.from_bytes(header[24:], "big")


def _lying_on(empty: bytes, name: bytes) -> bytes:
    """An empty qcow2 file with another backing file's name, which is the last thing in its first cluster."""
    offset, size = struct.unpack_from(">QI", empty, 8)
    if len(name) > _LONGEST_NAME:
        raise FailedPrecondition("the path of the disk is too long", hint="set LIMPET_HOME to a shorter one")
    renamed = bytearray(empty)
    renamed[offset : offset + size] = bytes(size)
    renamed[offset : offset + len(name)] = name
    struct.pack_into(">I", renamed, 16, len(name))
    return bytes(renamed)


def _write(path: Path, content: bytes) -> None:
    """Make a new file with holes where nothing is, durably."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb", buffering=0) as file:
        for start in range(0, len(content), _BLOCK):
            if any(block := content[start : start + _BLOCK]):
                os.pwrite(file.fileno(), block, start)
        os.ftruncate(file.fileno(), len(content))
    durable.sync_tree(path)


def occupied(path: Path) -> int:
    """Bytes that a file occupies on the host; a missing one counts nothing."""
    try:
        return path.stat().st_blocks * 512  # st_blocks counts 512-byte units whatever the file system (stat(2))
    except FileNotFoundError:
        return 0


def copy(source: Path, target: Path) -> None:
    """Copy a file durably, sharing its blocks where the file system can. Raises FailedPrecondition when `source` is
    missing, AlreadyExists when `target` is there, InsufficientSpace."""
    if not source.is_file():
        raise FailedPrecondition(f"the disk image {source} is missing", hint="limpet setup")
    try:
        with source.open("rb") as old, open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new:
            try:
                fcntl.ioctl(new, _FICLONE, old.fileno())  # Btrfs and XFS share the blocks
            except OSError:
                shutil.copyfileobj(old, new, 1 << 20)
        durable.sync_tree(target)
    except FileExistsError:
        raise AlreadyExists(f"{target} exists already") from None  # it may hold somebody's work
    except OSError as error:
        target.unlink(missing_ok=True)
        raise InsufficientSpace(f"cannot copy {source.name}: {error.strerror}", hint="free some space") from None


def _reached(path: Path, known: set[Path], *, strict: bool = False) -> dict[Path, None]:
    """What is reached from a layer and not known yet. `strict`: raises FailedPrecondition for one that is there but
    cannot be read."""
    found: dict[Path, None] = {}  # in order
    below: Path | None = path
    while (here := below) is not None and here not in known and here not in found:
        found[here] = None
        try:
            below = backing_file(here)
        except FailedPrecondition:
            if strict and here.exists():
                raise
            below = None
    return found
