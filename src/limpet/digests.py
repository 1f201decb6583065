"""Digests of files, and how to know that a file is still the one that was digested.

A digest is SHA-256 over a file's size and what is not zero in it, MiB by MiB: holes cost nothing, and it does not
depend on which zeroes a file system stores. A `Seal` is a digest with the file's stamp: size, inode and change time,
which every write renews and no program can set back. While the stamp is the same, the file need not be read again.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Seal:
    """What a file was when it was sealed. `stamp`: inode, modification and change time in nanoseconds."""

    size: int
    digest: str  # hex
    stamp: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path, digest: str | None = None) -> Seal:
        """Seal a file; its digest is computed unless it is known."""
        before = path.stat()
        return cls(before.st_size, digest or file_digest(path), _stamp(before))

    def problem(self, path: Path, *, thorough: bool = False) -> str | None:
        """What is wrong with the file, or None when it is the one that was sealed. It is read when its stamp is
        another, or when that is asked for (`thorough`)."""
        try:
            found = path.stat()
            if found.st_size != self.size:
                return f"{path} has {found.st_size} bytes instead of {self.size}"
            if (thorough or _stamp(found) != self.stamp) and file_digest(path) != self.digest:
                return f"{path} is damaged: its content has changed"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's size, its data that is not zero, and where that lies; as hex digits."""
    with open(path, "rb") as file:
        digest = Digest(os.fstat(file.fileno()).st_size)
        for offset, block in blocks(file):
            digest.add(offset, block)
    return digest.hexdigest()


class Digest:
    """`file_digest` of a file that comes block by block, in order, as `blocks` gives them."""

    def __init__(self, size: int) -> None:
        self._hash = hashlib.sha256(size.to_bytes(8, "big"))

    def add(self, offset: int, block: bytes) -> None:
        self._hash.update(offset.to_bytes(8, "big") + block)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def blocks(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The MiB-sized, MiB-aligned blocks of a file that are not all zero, as (offset, content); the last one of a file
    may be shorter."""
    for start, end in extents(file.fileno()):
        file.seek(start)
        while start < end and (block := file.read(min(BLOCK, end - start))):
            if block.count(0) != len(block):  # whether zeroes are stored or a hole depends on the file system
                yield start, block
            start += len(block)


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """The data of a sparse file as (start, end), widened to whole MiB so that it does not depend on the file system."""
    size, position = os.fstat(fd).st_size, 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        start, end = max(position, start - start % BLOCK), min(size, end + -end % BLOCK)
        yield start, end
        position = end


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns
