"""The only place that fsyncs and renames. A crash leaves the old file or the new one, never a mixture.

    write temporary beside the target → fsync file → rename over the target → fsync directory

A crash before the rename leaves the old content and a stray `.tmp-*` (swept by `sweep`); after it, the new content;
the directory's fsync makes the rename itself durable, so only after `replace_file` returns is it promised.

`_primitives` has the single steps, for those who put them together otherwise (the vault does); `recording` tells tests
what was done.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from limpet.durable import _primitives
from limpet.durable._primitives import (
    NewFile,
    erase,
    exchange,
    link,
    mkdir,
    new_file,
    rename,
    replace_symlink,
    rmdir,
    sync_directory,
    sync_file,
    sync_filesystem,
    unlink,
)
from limpet.durable._recording import Op, record, recording
from limpet.errors import InsufficientSpace

__all__ = [
    "NewFile", "Op", "erase", "exchange", "free_bytes", "link", "make_directory", "mkdir", "new_file", "publish",
    "recording", "remove_tree", "rename", "replace_file", "replace_symlink", "require_space", "rmdir", "set_aside",
    "staging", "sweep", "sync_directory", "sync_file", "sync_filesystem", "sync_tree", "unlink",
]  # fmt: skip

_PREFIX = _primitives.TEMPORARY


def replace_file(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Make `path` hold exactly `content`, atomically and durably. Raises InsufficientSpace or OSError."""
    temporary = _primitives.temporary_beside(path)
    with new_file(temporary, mode) as file:
        file.write(content)
    try:
        rename(temporary, path)
    except BaseException as error:
        unlink(temporary, missing_ok=True)
        raise _primitives.explained(error, path) from error
    sync_directory(path.parent)


def publish(source: Path, target: Path) -> None:
    """Give a finished file or directory tree its final name: its data reaches the disk first, the rename is the
    commit point. `target` must not be a non-empty directory."""
    sync_tree(source)
    rename(source, target)
    sync_directory(target.parent)


def sync_tree(path: Path) -> None:
    """fsync a file, or every regular file and directory below a directory."""
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            if not child.is_symlink():
                sync_tree(child)
        sync_directory(path)
    elif path.is_file():
        sync_file(path)


def make_directory(path: Path, mode: int = 0o700) -> None:
    """Make a directory, and those above it that are missing, durably. One that is there stays as it is."""
    if path.is_dir():
        return
    make_directory(path.parent, mode)
    with contextlib.suppress(FileExistsError):
        mkdir(path, mode)
    sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory so that a crash never leaves half of it under its name: rename aside, then delete."""
    with set_aside(path):
        pass


@contextlib.contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """Take a directory, if there is one, away from its name for the length of the block, at whose end it is deleted.
    When the block raises it has its name again."""
    doomed = path.with_name(f"{_PREFIX}rm-{path.name}")
    with contextlib.suppress(FileNotFoundError):
        rename(path, doomed)
        sync_directory(path.parent)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            rename(doomed, path)
            sync_directory(path.parent)
        raise
    erase(doomed)


def staging(directory: Path, name: str) -> Path:
    """A fresh directory for work in progress beside its target; `sweep` removes it after a crash."""
    made = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=directory))
    record("mkdir", made)
    return made


def sweep(directory: Path, *, age: float = 0.0) -> list[Path]:
    """Delete what a crash left unfinished in `directory`; returns the paths. `age` in seconds: only what is older,
    where another process may be at work."""
    strays = [child for child in directory.iterdir() if child.name.startswith(_PREFIX)] if directory.is_dir() else []
    strays = [stray for stray in strays if not age or time.time() - stray.lstat().st_mtime > age]
    for stray in strays:
        erase(stray)
    return strays


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def require_space(path: Path, needed: int, what: str) -> None:
    """Raise InsufficientSpace unless `needed` bytes are free where `path` is."""
    free = free_bytes(path)
    if free < needed:
        raise InsufficientSpace(
            f"{what} needs {needed >> 20} MiB on {path}, {free >> 20} MiB are free",
            hint="free some space, or set LIMPET_HOME to a larger disk",
        )
