"""Single effects on the disk: written and renamed here and nowhere else, so that a test can record all of them.

None makes a *name* durable by itself: that is `sync_directory`, which whoever puts several effects together calls once
at the right place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from limpet.durable._recording import active, listing, record
from limpet.errors import InsufficientSpace, LimpetError, Unimplemented

TEMPORARY = ".tmp-"  # names that begin so are nobody's after a crash

_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


class NewFile:
    """A file that is being written from beginning to end. Made by `new_file`."""

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        self._file = open(fd, "w+b", buffering=1 << 18)  # noqa: SIM115  (closed by new_file)
        os.fchmod(fd, mode)  # whatever the umask says
        self.size = 0  # bytes written so far
        record("create", path)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append. Raises InsufficientSpace or OSError."""
        try:
            self._file.write(data)
        except OSError as error:
            raise explained(error, self.path) from error
        record("write", self.path, data=bytes(data) if active() else None, offset=self.size)
        self.size += len(data)

    def read(self, offset: int, length: int) -> bytes:
        """What was written at `offset`: fewer bytes at the end."""
        self._file.flush()
        return os.pread(self._file.fileno(), length, offset)

    def _finish(self) -> None:
        self._file.flush()
        _fsync_file(self._file.fileno(), self.path)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: told already
            self._file.close()


@contextlib.contextmanager
def new_file(path: Path, mode: int = 0o600) -> Iterator[NewFile]:
    """A file that must not exist yet. At the end of the block its content is durable, its name is not (see
    `sync_directory`); when the block raises it is gone. Raises InsufficientSpace or OSError.

    A failed fsync is not tried again: the kernel forgets what it could not write after telling it once."""
    try:
        file = NewFile(path, mode)
    except OSError as error:
        raise explained(error, path) from error
    try:
        yield file
        file._finish()
    except BaseException as error:
        file._close()
        unlink(path, missing_ok=True)
        raise explained(error, path) from error
    file._close()


def rename(source: Path, target: Path) -> None:
    """Give a file or directory another name in place of what has it: after a crash that is the old one or the new."""
    source.rename(target)
    record("rename", source, target)


def exchange(a: Path, b: Path) -> None:
    """Swap two names in one step. Raises Unimplemented where the file system cannot."""
    result = _libc().renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if result != 0:
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise Unimplemented(f"the file system of {a} cannot exchange two names")
        raise OSError(number, os.strerror(number), str(a), None, str(b))
    record("exchange", a, b)


def link(source: Path, target: Path) -> None:
    """Give a file one more name, which must be free."""
    os.link(source, target, follow_symlinks=False)
    record("link", source, target)


def replace_symlink(path: Path, text: str) -> None:
    """Make `path` a symlink that says `text`, in place of what has the name: the text comes and goes with the name, so
    that there is nothing to fsync but the directory."""
    temporary = temporary_beside(path)
    temporary.symlink_to(text)
    record("symlink", temporary, text)
    try:
        rename(temporary, path)
    except BaseException:
        unlink(temporary, missing_ok=True)
        raise


def unlink(path: Path, missing_ok: bool = False) -> None:
    """Take a name away."""
    try:
        path.unlink()
    except FileNotFoundError:
        if not missing_ok:
            raise
    else:
        record("unlink", path)


def mkdir(path: Path, mode: int = 0o700) -> None:
    """Make a directory."""
    path.mkdir(mode)
    record("mkdir", path)


def rmdir(path: Path) -> None:
    """Remove an empty directory."""
    path.rmdir()
    record("rmdir", path)


def erase(path: Path) -> None:
    """Delete a file, or a directory with everything in it, as far as possible: a crash leaves some of it."""
    if not path.is_dir() or path.is_symlink():
        unlink(path, missing_ok=True)
        return
    if active():
        for parent, directories, files in os.walk(path, topdown=False):
            links = [name for name in directories if Path(parent, name).is_symlink()]
            for name in [*files, *links]:
                record("unlink", Path(parent, name))
            record("rmdir", Path(parent))
    shutil.rmtree(path, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with open(path, "rb") as file:
        _fsync_file(file.fileno(), path)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    if active():
        record("fsync_dir", path, data=listing(path))


def sync_filesystem(path: Path) -> None:
    """Make all of the file system that a directory is on durable: cheaper than one fsync for each of many files. Raises
    OSError, also for what failed to be written in the meantime (syncfs(2), since Linux 5.8)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc().syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)
    if active():
        _record_tree(path)


def temporary_beside(path: Path) -> Path:
    """A fresh name in the same directory."""
    return path.with_name(f"{TEMPORARY}{os.urandom(8).hex()}")


def explained(error: BaseException, path: Path) -> BaseException:
    """The error that says so when the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        full: LimpetError = InsufficientSpace(f"no space left to write {path}", hint="free some space and try again")
        return full
    return error


def _fsync_file(fd: int, path: Path) -> None:
    os.fsync(fd)
    if active():
        record("fsync", path, data=os.pread(fd, os.fstat(fd).st_size, 0))


def _record_tree(path: Path) -> None:
    for parent, _, files in os.walk(path, topdown=False):
        for name in files:
            file = Path(parent, name)
            if file.is_file() and not file.is_symlink():
                record("fsync", file, data=file.read_bytes())
        record("fsync_dir", Path(parent), data=listing(Path(parent)))


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return library
