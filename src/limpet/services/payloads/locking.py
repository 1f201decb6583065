"""At most one running VM for a host directory (PAY-3).

The lock is flock(2) on the marker. The daemon takes it before a VM is launched and hands the descriptor to QEMU: the
lock belongs to the open file, so the kernel releases it when QEMU ends, however that happens, and a marker without a
lock is a leftover that the next may take over. Parents and children have markers of their own: they are looked for
under every name that the directory has.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.errors import Busy, FailedPrecondition, LimpetError
from limpet.services.payloads import marker, places
from limpet.services.payloads.marker import NAME, Marker
from limpet.vmm.lock import try_lock

_PATIENCE = 0.2  # seconds: somebody may look whether it is free just now
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Lock:
    """A host directory that is locked by a descriptor of this process."""

    def __init__(self, fd: int, mark: Marker) -> None:
        self.fd, self.marker = fd, mark

    @property
    def directory(self) -> Path:
        return Path(self.marker.path)

    def close(self) -> None:
        """Let go of our descriptor: whoever was given another one still holds the lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def take(mark: Marker) -> Lock:
    """Lock the directory `mark.path` and write `mark` there. Raises Busy naming the owner, FailedPrecondition for a
    foreign marker or a directory that cannot be written to; then nothing is left."""
    directory = Path(mark.path)
    crashpoint("payload.lock.before")
    fd, made = _open_locked(directory)
    try:
        if not made:
            _require_leftover(directory)
        crashpoint("payload.marker.before")
        content = mark.to_bytes()
        os.ftruncate(fd, 0)
        os.pwrite(fd, content, 0)
        os.fchmod(fd, 0o644)  # others have to see whose it is
        durable.sync_file(directory / NAME)
        durable.sync_directory(directory)
        crashpoint("payload.marker.after")
        refuse_ancestors(directory)
    except BaseException as error:
        if made or marker_is(directory, mark.nonce):
            with contextlib.suppress(OSError):
                durable.unlink(directory / NAME, missing_ok=True)
        os.close(fd)
        if isinstance(error, OSError):
            raise _unwritable(directory, error) from error
        raise
    return Lock(fd, mark)


def peek(directory: Path) -> None:
    """Raise what `take` would raise just now, without leaving anything."""
    if locked(directory):
        raise owned(directory)
    if (directory / NAME).is_symlink() or (directory / NAME).exists():
        _require_leftover(directory)
    refuse_ancestors(directory)


def release(directory: Path, nonce: str) -> bool:
    """Take the marker with this nonce away; whether it was there and nobody holds it."""
    try:
        fd = os.open(directory / NAME, os.O_RDONLY | _FLAGS)
    except OSError:
        return False
    try:
        if not _patiently(fd) or not marker_is(directory, nonce):
            return False
        crashpoint("payload.release.before")
        durable.unlink(directory / NAME)
        durable.sync_directory(directory)
        crashpoint("payload.release.after")
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def retake(directory: Path, nonce: str) -> int | None:
    """A locked descriptor of the marker with this nonce; None when somebody holds it already. Raises
    FailedPrecondition when the marker is not there or another one."""
    marker.require(directory, nonce)
    fd = os.open(directory / NAME, os.O_RDWR | _FLAGS)
    if try_lock(fd, fcntl.LOCK_EX):
        return fd
    os.close(fd)
    return None


def locked(directory: Path) -> bool:
    """Whether a VM runs with this directory."""
    try:
        fd = os.open(directory / NAME, os.O_RDONLY | _FLAGS)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and not try_lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def refuse_ancestors(directory: Path) -> None:
    """Raise Busy when a directory that contains this one is locked, under whatever name."""
    for parent in places.ancestors(directory):
        if locked(parent):
            raise owned(parent, directory)
    for alias in places.aliases(directory):
        if alias != directory and not places.overlap(alias, directory) and locked(alias):
            raise owned(alias, directory)


def refuse_nested(directory: Path, nested: Iterable[bytes]) -> None:
    """Raise Busy when one of these directories, relative to `directory`, is locked."""
    for path in nested:
        child = directory / os.fsdecode(path)
        if locked(child):
            raise owned(child, directory)


def owned(directory: Path, wanted: Path | None = None) -> Busy:
    """The error that says who has it and how to get it."""
    try:
        found = marker.read(directory)
    except LimpetError:
        found = None
    about = f"{wanted} overlaps with {directory}, which" if wanted not in (None, directory) else f"{directory}"
    if found is None:
        return Busy(f"{about} is just being taken by another sandbox", hint="try again, or give another directory")
    return Busy(
        f"{about} is in use by {found.whose()}",
        hint=f"limpet stop {found.sandbox}, or limpet payload rm {found.sandbox} {found.payload}",
    )


def marker_is(directory: Path, nonce: str) -> bool:
    """Whether the directory's marker has this nonce."""
    try:
        found = marker.read(directory)
    except LimpetError:
        return False
    return found is not None and found.nonce == nonce


def _open_locked(directory: Path) -> tuple[int, bool]:
    """The marker's file, locked, and whether it was made."""
    path = directory / NAME
    while True:
        try:
            fd, made = _open(path)
        except OSError as error:
            if path.is_symlink() or path.exists():
                raise marker.foreign(path, error.strerror or str(error)) from None
            raise _unwritable(directory, error) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise marker.foreign(path, "it is not a regular file")
        if not _patiently(fd):
            os.close(fd)
            raise owned(directory)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), path.lstat()):
                return fd, made
        os.close(fd)  # it was released and removed in between


def _open(path: Path) -> tuple[int, bool]:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o644), True
    except FileExistsError:
        return os.open(path, os.O_RDWR | _FLAGS), False


def _patiently(fd: int) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not try_lock(fd, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _require_leftover(directory: Path) -> None:
    """Raise FailedPrecondition unless the marker, which nobody holds, is what a VM that ended here has left."""
    found = marker.read(directory)
    path = directory / NAME
    if found is None:
        return  # cut off before it was written
    if found.host != os.uname().nodename:
        raise marker.foreign(path, f"it is of {found.whose()}, and whether that runs cannot be told from here")
    if found.path != str(directory):
        raise marker.foreign(path, f"it was written for {found.path}, by {found.whose()}")


def _unwritable(directory: Path, error: OSError) -> LimpetError:
    return FailedPrecondition(f"cannot write to {directory}: {error.strerror}", hint=f"chmod u+rwx {directory}")
