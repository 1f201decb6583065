"""Directories as tar streams, in constant memory.

Packing yields the archive piece by piece. Unpacking trusts nothing: the archive comes out of a guest. Nothing is
written outside of the target directory, not through `..`, not through an absolute name and not through a symbolic
link, be it one of the archive or one that lies there; devices are left out, ownership and setuid bits are dropped.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from limpet.errors import BadRequest

_CHUNK = 1 << 20
_BLOCK = tarfile.BLOCKSIZE


def pack(source: Path, name: str) -> Iterator[bytes]:
    """The tree at `source` as a pax tar whose top entry is called `name` ('.' for the directory's contents).
    Sockets and devices are left out. Raises BadRequest when it cannot be read."""
    hard_links: dict[tuple[int, int], str] = {}
    for path, entry in _walk(source, name):
        try:
            yield from _member(path, entry, hard_links)
        except OSError as error:
            raise BadRequest(f"cannot read {path}: {error.strerror}") from None
    yield b"\0" * (2 * _BLOCK)


def _walk(path: Path, entry: str) -> Iterator[tuple[Path, str]]:
    yield path, entry
    if path.is_dir() and not path.is_symlink():
        try:
            names = sorted(entry.name for entry in path.iterdir())
        except OSError as error:
            raise BadRequest(f"cannot read {path}: {error.strerror}") from None
        for name in names:
            yield from _walk(path / name, f"{entry}/{name}")


def _member(path: Path, entry: str, hard_links: dict[tuple[int, int], str]) -> Iterator[bytes]:
    found = path.lstat()
    member = tarfile.TarInfo(entry)
    member.mode, member.mtime = stat.S_IMODE(found.st_mode), int(found.st_mtime)
    member.pax_headers = {"mtime": f"{found.st_mtime_ns // 10**9}.{found.st_mtime_ns % 10**9:09d}"}
    key = (found.st_dev, found.st_ino)
    if stat.S_ISDIR(found.st_mode):
        member.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(found.st_mode):
        member.type, member.linkname = tarfile.SYMTYPE, os.fspath(path.readlink())
    elif stat.S_ISFIFO(found.st_mode):
        member.type = tarfile.FIFOTYPE
    elif not stat.S_ISREG(found.st_mode):
        return
    elif found.st_nlink > 1 and key in hard_links:
        member.type, member.linkname = tarfile.LNKTYPE, hard_links[key]
    else:
        hard_links[key] = entry
        member.size = found.st_size
    header = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    if not member.isreg():
        yield header
        return
    with path.open("rb") as file:
        yield header
        yield from _content(file, member.size)


def _content(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Exactly `size` bytes, whatever the file does meanwhile, filled up to a whole block."""
    left = size
    while left and (data := file.read(min(_CHUNK, left))):
        left -= len(data)
        yield data
    while left:
        yield b"\0" * min(_CHUNK, left)
        left -= min(_CHUNK, left)
    if size % _BLOCK:
        yield b"\0" * (_BLOCK - size % _BLOCK)


def unpack(archive: BinaryIO, target: Path, rename: str | None = None) -> int:
    """Unpack a tar stream into the directory `target` and return the number of entries. `rename` replaces the first
    component of every name, or is put in front of names that are relative to the tree. Raises BadRequest for an
    archive that wants out of `target` or is damaged."""
    count = 0
    directories: list[tuple[Path, tarfile.TarInfo]] = []
    try:
        with tarfile.open(fileobj=archive, mode="r|*", errors="surrogateescape") as tar:
            for member in tar:
                if count == 0 and rename is not None and member.name in (".", "./"):
                    target, rename = target / rename, None
                place = _place(target, member.name, rename)
                _extract(tar, member, place, target, rename)
                if member.isdir():
                    directories.append((place, member))
                count += 1
    except tarfile.TarError as error:
        raise BadRequest(f"the archive is damaged: {error}") from None
    for place, member in reversed(directories):  # last, since each entry below changes the time and needs the mode
        if not place.is_symlink():
            place.chmod(member.mode & 0o777)
            os.utime(place, (member.mtime, member.mtime))
    return count


def _place(target: Path, name: str, rename: str | None) -> Path:
    """Where an entry goes. Every directory on the way must be a real one."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise BadRequest(f"the archive wants to write outside of its directory: {name!r}")
    if rename is not None:
        parts[:1] = [rename]
    place = target
    for part in parts[:-1]:
        place = place / part
        if place.is_symlink():
            raise BadRequest(f"refusing to write through the symbolic link {place}")
    return place / parts[-1] if parts else target


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, place: Path, target: Path, rename: str | None) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        if place.is_symlink() and place != target:
            place.unlink()
        place.mkdir(exist_ok=True)
        place.chmod(member.mode & 0o777 | 0o700)
        return
    if place.is_dir() and not place.is_symlink():
        raise BadRequest(f"{place} is a directory, the archive has a file of that name")
    place.unlink(missing_ok=True)
    if member.issym():
        place.symlink_to(member.linkname)
    elif member.islnk():
        os.link(_place(target, member.linkname, rename), place, follow_symlinks=False)
    elif member.isfile() and (content := tar.extractfile(member)) is not None:
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            while data := content.read(_CHUNK):
                file.write(data)
            file.flush()  # or else the time is changed again when the file is closed
            os.fchmod(file.fileno(), member.mode & 0o777)
            os.utime(file.fileno(), (member.mtime, member.mtime))
