"""What was done to the disk, for tests: they enumerate what a power loss at any moment may leave of it.

While `recording()` is on, every primitive appends what it did after it did it. Each fsync also tells what it found, the
content of the file or the names in the directory, because others may have written there: tools, libraries, a copy.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal[
    "create", "write", "fsync", "rename", "exchange", "link", "symlink", "unlink", "mkdir", "rmdir", "fsync_dir"
]


@dataclass(frozen=True)
class Op:
    """One effect. `target`: the new name of a rename or a link, the other one of an exchange, the text of a symlink.
    `data`: what was written at `offset`; at an fsync the whole file; at an fsync_dir its names as `listing` gives
    them."""

    kind: Kind
    path: Path
    target: Path | str | None = None
    data: bytes | None = None
    offset: int = 0


_ops: list[Op] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Op]]:
    """Record everything that this process does through `durable` in the block. Only for tests; not nested."""
    global _ops
    assert _ops is None, "already recording"
    ops = _ops = []
    try:
        yield ops
    finally:
        _ops = None


def active() -> bool:
    """Whether somebody records: what is only told to them need not be looked up otherwise."""
    return _ops is not None


def record(
    kind: Kind, path: Path, target: Path | str | None = None, *, data: bytes | None = None, offset: int = 0
) -> None:
    """Tell the recorder, if there is one."""
    if _ops is not None:
        _ops.append(Op(kind, path.absolute(), target.absolute() if isinstance(target, Path) else target, data, offset))


def listing(directory: Path) -> bytes:
    """What is in a directory, as JSON: `{name: "file" | "dir" | "other" | "link:TEXT"}`."""
    found = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_symlink():
                found[entry.name] = f"link:{os.readlink(entry.path)}"  # noqa: PTH115  (a Path would tidy the text)
            else:
                found[entry.name] = "dir" if entry.is_dir() else "file" if entry.is_file() else "other"
    return json.dumps(found, sort_keys=True).encode()
