"""The only place that fsyncs and renames. A crash leaves the old file or the new one, never a mixture.

    write temporary beside the target → fsync file → rename over the target → fsync directory

A crash before the rename leaves the old content and a stray `.tmp-*` (swept by `sweep`); after it, the new content;
the directory's fsync makes the rename itself durable, so only after `replace_file` returns is it promised.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from limpet.errors import InsufficientSpace, LimpetError

_PREFIX = ".tmp-"


def replace_file(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Make `path` hold exactly `content`, atomically and durably. Raises InsufficientSpace or OSError."""
    fd, temporary = tempfile.mkstemp(prefix=_PREFIX, dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(temporary).rename(path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise _explained(error, path) from error
    sync_directory(path.parent)


def publish(source: Path, target: Path) -> None:
    """Give a finished file or directory tree its final name: its data reaches the disk first, the rename is the
    commit point. `target` must not be a non-empty directory."""
    sync_tree(source)
    source.rename(target)
    sync_directory(target.parent)


def sync_tree(path: Path) -> None:
    """fsync a file, or every regular file and directory below a directory."""
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            if not child.is_symlink():
                sync_tree(child)
        sync_directory(path)
    elif path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
        path.rename(doomed)
        sync_directory(path.parent)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            doomed.rename(path)
        raise
    shutil.rmtree(doomed, ignore_errors=True)


def staging(directory: Path, name: str) -> Path:
    """A fresh directory for work in progress beside its target; `sweep` removes it after a crash."""
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=directory))


def sweep(directory: Path, *, age: float = 0.0) -> list[Path]:
    """Delete what a crash left unfinished in `directory`; returns the paths. `age` in seconds: only what is older,
    where another process may be at work."""
    strays = [child for child in directory.iterdir() if child.name.startswith(_PREFIX)] if directory.is_dir() else []
    strays = [stray for stray in strays if not age or time.time() - stray.lstat().st_mtime > age]
    for stray in strays:
        if stray.is_dir() and not stray.is_symlink():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)
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


def _explained(error: BaseException, path: Path) -> BaseException:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        full: LimpetError = InsufficientSpace(f"no space left to write {path}", hint="free some space and try again")
        return full
    return error
