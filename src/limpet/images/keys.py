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
