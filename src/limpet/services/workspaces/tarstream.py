"""Files as a pax tar stream (pax(1)), read in a thread, in constant memory; what changes meanwhile is an error."""

from __future__ import annotations

import asyncio
import os
import stat
import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from limpet.errors import FailedPrecondition
from limpet.services.workspaces.tree import Entry

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One member of the stream: where it goes, and where its content comes from."""

    name: bytes
    source: bytes
    entry: Entry | None = None  # what it must still be
    mode: int | None = None  # permissions there, when not those here


async def chunked(blocks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """`blocks`, read in a thread and gathered into chunks of about 1 MiB."""
    while chunk := await asyncio.to_thread(_gather, blocks):
        yield chunk


def _gather(blocks: Iterator[bytes]) -> bytes:
    gathered, size = [], 0
    for block in blocks:
        gathered.append(block)
        size += len(block)
        if size >= _CHUNK:
            break
    return b"".join(gathered)


def tar(members: Iterator[Member], *, end: bool = False) -> Iterator[bytes]:
    """The pax stream (pax(1)) of these members, with its end marker when `end`."""
    for member in members:
        try:
            yield from _tar_member(member)
        except (FileNotFoundError, NotADirectoryError):
            raise changed(member.name) from None
        except PermissionError:
            shown = member.name.decode(errors="backslashreplace").removeprefix("tree/")
            raise FailedPrecondition(
                f"permission denied: cannot read {shown}", hint="make it readable, or list it in .gitignore"
            ) from None
    if end:
        yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _tar_member(member: Member) -> Iterator[bytes]:
    found = os.lstat(member.source)
    if member.entry is not None and stat.S_IFMT(found.st_mode) != stat.S_IFMT(member.entry.mode):
        raise changed(member.name)
    if stat.S_ISREG(found.st_mode):
        yield from _tar_file(member)
    elif stat.S_ISLNK(found.st_mode):
        header = _header(member, found, tarfile.SYMTYPE, 0)
        header.linkname = str(Path(os.fsdecode(member.source)).readlink())
        yield _packed(header)
    else:
        header = _header(member, found, tarfile.DIRTYPE, 0)
        header.mode |= 0o700  # the guest's user must be able to work in it
        yield _packed(header)


def _tar_file(member: Member) -> Iterator[bytes]:
    fd = os.open(member.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb", buffering=0) as file:
        found = os.fstat(fd)
        planned = member.entry
        if planned is not None and (found.st_size, found.st_mtime_ns) != (planned.size, planned.mtime_ns):
            raise changed(member.name)
        yield _packed(_header(member, found, tarfile.REGTYPE, found.st_size))
        left = found.st_size
        while left:
            block = file.read(min(left, _CHUNK))
            if not block:
                raise changed(member.name)
            left -= len(block)
            yield block
        yield b"\0" * (-found.st_size % tarfile.BLOCKSIZE)


def _header(member: Member, found: os.stat_result, kind: bytes, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(os.fsdecode(member.name))
    header.type, header.size, header.mode = kind, size, stat.S_IMODE(found.st_mode) & 0o777
    if member.mode is not None:
        header.mode = member.mode
    header.mtime = int(found.st_mtime)  # whole seconds: what git compares there (core.checkStat=minimal)
    return header


def _packed(header: tarfile.TarInfo) -> bytes:
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def changed(name: bytes) -> FailedPrecondition:
    """The error for a file that is not what the plan saw."""
    shown = name.decode(errors="backslashreplace").removeprefix("tree/")
    return FailedPrecondition(
        f"{shown} changed while it was being read", hint="stop what writes to it, or list it in .gitignore"
    )
