"""Content keys: the name of everything that setup makes is a hash of everything that went into it.

Two builds with the same key are interchangeable; whatever changes the result must change the key. What cannot be known
before building (which package versions the archive holds today) is left out on purpose: it makes a second setup
need no network, and a published artifact never changes under its name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

BUILDER = "1"  # raise it when the build code changes in a way that its inputs do not show

_LENGTH = 16  # hex digits: 64 bits, far more than a cache of some dozen entries needs


def key_of(*parts: str | bytes) -> str:
    """The key of these inputs, in this order. Parts are length-prefixed: no two lists run together."""
    digest = hashlib.sha256()
    for part in (BUILDER, *parts):
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:_LENGTH]


def sources(package: Path) -> list[Path]:
    """The Python sources of a package, sorted, as paths relative to it."""
    return sorted(path.relative_to(package) for path in package.rglob("*.py"))


def tree_key(package: Path, files: Iterable[Path]) -> str:
    """The key of these files: their names below `package` and their bytes."""
    parts: list[str | bytes] = []
    for file in files:
        parts += [os.fsencode(file), (package / file).read_bytes()]
    return key_of(*parts)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's data extents and where they lie. Holes are skipped: a 16 GiB sparse disk takes a second."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "big"))
        for start, end in _extents(file.fileno(), size):
            file.seek(start)
            while start < end and (block := file.read(min(1 << 20, end - start))):
                if block.count(0) != len(block):  # whether zeroes are stored or a hole depends on the file system
                    digest.update(start.to_bytes(8, "big") + block)
                start += len(block)
    return digest.hexdigest()


def _extents(fd: int, size: int) -> Iterable[tuple[int, int]]:
    """The data of a sparse file as (start, end), widened to whole MiB so that it does not depend on the file system."""
    mebi, position = 1 << 20, 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        start, end = max(position, start - start % mebi), min(size, end + -end % mebi)
        yield start, end
        position = end
