"""Btrfs send streams, version 1, as commands. Pure: bytes in, commands out.

    "btrfs-stream\\0" u32 version            format: linux/fs/btrfs/send.h; all numbers little endian
    command*:  u32 length  u16 number  u32 crc32c (of the command with this field zero, seed 0, not inverted)
               attribute*:  u16 number  u16 length  value

The stream comes out of a guest, whose kernel may be anybody's: nothing in it is believed. Sizes are compared before
memory is taken, every path is relative, without `..`, and of the lengths that Linux allows, and `Limits` bound what a
stream can make its reader hold or store. Whatever is wrong raises BadStream, which names the byte.
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google_crc32c import extend

from limpet.vault.commands import (
    Chmod,
    Chown,
    Clone,
    Command,
    End,
    Link,
    Mkdir,
    Mkfile,
    Mknod,
    RemoveXattr,
    Rename,
    Rmdir,
    SetXattr,
    Snapshot,
    Subvol,
    Symlink,
    Truncate,
    Unlink,
    UpdateExtent,
    Utimes,
    Write,
)
from limpet.vault.errors import BadStream
from limpet.vault.nodes import Kind

MAGIC = b"btrfs-stream\0"
VERSION = 1
LARGEST_COMMAND = 1 << 16  # bytes, with its header: BTRFS_SEND_BUF_SIZE_V1
LARGEST_OFFSET = (1 << 63) - 1  # what loff_t can say

_MAGIC = struct.Struct("<13sI")
_COMMAND = struct.Struct("<IHI")
_ATTRIBUTE = struct.Struct("<HH")
_U64 = struct.Struct("<Q")
_TIME = struct.Struct("<qI")


@dataclass(frozen=True)
class Limits:
    """What one stream may ask for. The defaults are far above what a data disk of a sandbox can hold, and below what
    hurts a host."""

    stream: int = 1 << 40  # bytes on the wire
    entries: int = 4_000_000  # names that it makes
    tree: int = 16_000_000  # names that are there in the end (minded by `applying.receive`, which knows the tree)
    attributes: int = 256 << 20  # bytes of extended attributes and symlink targets: what is held in memory
    writes: int = 16_000_000  # pieces of data
    cloned: int = 1 << 40  # bytes that become part of another file without being sent


class Parser:
    """Takes a stream in pieces of any size. What it holds between two pieces is less than one command (64 KiB)."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._pending = bytearray()  # less than a command
        self._needed = _MAGIC.size  # bytes, before anything can be done
        self._offset = 0  # in the stream, of `_pending`
        self._versioned = self._begun = self._ended = False
        self._spent = dict.fromkeys(("entries", "attributes", "writes", "cloned"), 0)

    def feed(self, data: bytes) -> list[Command]:
        """The commands that these bytes complete. Raises BadStream; the parser is of no use after that."""
        self._pending += data
        if len(self._pending) < self._needed:
            return []
        if self._offset + len(self._pending) > self._limits.stream:
            raise self._too_much(f"more than {self._limits.stream} bytes")
        buffer = bytes(self._pending)
        commands: list[Command] = []
        at = 0 if self._versioned else self._version(buffer)
        while (end := self._end_of_command(buffer, at)) <= len(buffer):
            command = self._command(buffer[at:end])
            if command is not None:
                commands.append(command)
            self._offset += end - at
            at = end
        self._needed = end - at
        self._pending = bytearray(buffer[at:])
        return commands

    def finish(self) -> None:
        """To be called when nothing more comes. Raises BadStream unless the stream came to its end."""
        if not self._ended:
            raise self._broken("it ends in the middle")
        if self._pending:
            raise self._broken("it goes on after its end")

    def _version(self, buffer: bytes) -> int:
        magic, version = _MAGIC.unpack_from(buffer)
        if magic != MAGIC:
            raise self._broken("it is no send stream")
        if version != VERSION:
            raise self._broken(f"it is of version {version}, not {VERSION}")
        self._versioned = True
        self._offset = _MAGIC.size
        return _MAGIC.size

    def _end_of_command(self, buffer: bytes, at: int) -> int:
        """Where the command at `at` ends, or how far one must see to know that."""
        if self._ended and len(buffer) > at:
            raise self._broken("it goes on after its end")
        if len(buffer) - at < _COMMAND.size:
            return at + _COMMAND.size
        size: int = _COMMAND.unpack_from(buffer, at)[0] + _COMMAND.size
        if size > LARGEST_COMMAND:
            raise self._broken(f"a command of {size} bytes")
        return at + size

    def _command(self, raw: bytes) -> Command | None:
        """`raw` is one whole command."""
        _, number, crc = _COMMAND.unpack_from(raw)
        payload = raw[_COMMAND.size :]
        if extend(extend(0xFFFFFFFF, raw[:6] + b"\0\0\0\0"), payload) ^ 0xFFFFFFFF != crc:
            raise self._broken("a command whose checksum is wrong")
        form = _FORMS.get(number)
        if form is None:
            raise self._broken(f"an unknown command, number {number}")
        if form.begins == self._begun:
            raise self._broken("a second beginning" if self._begun else "it does not begin with its subvolume")
        self._begun = True
        if number == _END:
            self._ended = True
            return None
        try:
            found = _attributes(payload)
            command: Command = form.make(*[decode(found[number]) for number, decode in form.attributes])
        except KeyError as missing:
            raise self._broken(f"{form.name} without attribute {missing}") from None
        except _Nonsense as nonsense:
            raise self._broken(f"{form.name} with {nonsense}") from None
        if form.makes_entry:
            self._spend("entries", 1)
        if form.cost is not None:
            self._spend(*form.cost(command))
        return command

    def _spend(self, what: str, amount: int) -> None:
        spent = self._spent[what] = self._spent[what] + amount
        limit: int = getattr(self._limits, what)
        if spent > limit:
            raise self._too_much(f"more than {limit} {_UNITS[what]}")

    def _broken(self, what: str) -> BadStream:
        return BadStream(f"the send stream is broken at byte {self._offset}: {what}")

    def _too_much(self, what: str) -> BadStream:
        return BadStream(f"the send stream asks for too much: {what}")


_UNITS = {
    "entries": "new names",
    "attributes": "bytes of extended attributes and symlink targets",
    "writes": "pieces of data",
    "cloned": "bytes that are cloned",
}


class _Nonsense(Exception):
    """An attribute that cannot be what its command says it is."""


def _attributes(payload: bytes) -> dict[int, bytes]:
    """Attribute number → value, sizes checked."""
    found: dict[int, bytes] = {}
    at, end = 0, len(payload)
    while at < end:
        if end - at < 4:
            raise _Nonsense("a cut-off attribute")
        number, length = _ATTRIBUTE.unpack_from(payload, at)
        at += 4 + length
        size = _SIZES.get(number)
        if size is None:
            raise _Nonsense(f"an unknown attribute, number {number}")
        if at > end or (size >= 0 and size != length):
            raise _Nonsense(f"attribute {number} of {length} bytes")
        if number in found:
            raise _Nonsense(f"attribute {number} twice")
        found[number] = payload[at - length : at]
    return found


# --- decoders, one a meaning

_PART = rb"(?!\.{1,2}(?:/|\Z))[^/\0]{1,255}"
_is_path = re.compile(rb"%b(?:/%b)*" % (_PART, _PART), re.DOTALL).fullmatch
_LONGEST_PATH = 4095  # PATH_MAX without its NUL


def _path(raw: bytes) -> bytes:
    if len(raw) > _LONGEST_PATH or not _is_path(raw):
        raise _Nonsense(f"a path that no entry can have: {_shown(raw)}")
    return raw


def _path_or_root(raw: bytes) -> bytes:
    return _path(raw) if raw else raw


def _target(raw: bytes) -> bytes:
    if not 1 <= len(raw) <= _LONGEST_PATH or b"\0" in raw:
        raise _Nonsense(f"a target that no symlink can have: {_shown(raw)}")
    return raw


def _xattr_name(raw: bytes) -> bytes:
    if not 1 <= len(raw) <= 255 or b"\0" in raw:
        raise _Nonsense(f"a name that no extended attribute can have: {_shown(raw)}")
    return raw


def _as_it_is(raw: bytes) -> bytes:
    return raw


def _u64(raw: bytes) -> int:
    value: int = _U64.unpack(raw)[0]
    return value


def _offset(raw: bytes) -> int:
    if (value := _u64(raw)) > LARGEST_OFFSET:
        raise _Nonsense(f"the offset or size {value}")
    return value


def _id(raw: bytes) -> int:
    if (value := _u64(raw)) >= 0xFFFFFFFF:  # (uid_t) -1 is nobody's
        raise _Nonsense(f"the owner {value}")
    return value


def _mode(raw: bytes) -> int:
    if (value := _u64(raw)) > 0o177777:
        raise _Nonsense(f"the mode {value:o}")
    return value & 0o7777


def _device(raw: bytes) -> int:
    if (value := _u64(raw)) > 0xFFFFFFFF:
        raise _Nonsense(f"the device {value}")
    return value


def _nanoseconds(raw: bytes) -> int:
    """Since 1970; what a signed 64-bit number of nanoseconds cannot hold (before 1677, after 2262) is its limit."""
    seconds, fraction = _TIME.unpack(raw)
    if fraction >= 1_000_000_000:
        raise _Nonsense(f"{fraction} nanoseconds in a second")
    found: int = seconds * 1_000_000_000 + fraction
    return max(-(1 << 63), min(found, (1 << 63) - 1))


def _uuid(raw: bytes) -> str:
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _shown(raw: bytes) -> str:
    return repr(raw if len(raw) <= 80 else raw[:40] + b"..." + raw[-37:])


# --- what each command is made of

_UUID, _CTRANSID, _SIZE, _MODE, _UID, _GID, _RDEV = 1, 2, 4, 5, 6, 7, 8
_MTIME, _XATTR_NAME, _XATTR_DATA, _PATH, _PATH_TO, _PATH_LINK = 10, 13, 14, 15, 16, 17
_FILE_OFFSET, _DATA, _CLONE_UUID, _CLONE_PATH, _CLONE_OFFSET, _CLONE_LENGTH = 18, 19, 20, 22, 23, 24
_SIZES = {
    **dict.fromkeys((_CTRANSID, 3, _SIZE, _MODE, _UID, _GID, _RDEV, _FILE_OFFSET, 21, _CLONE_OFFSET, _CLONE_LENGTH), 8),
    **dict.fromkeys((_UUID, _CLONE_UUID), 16),
    **dict.fromkeys((9, _MTIME, 11, 12), 12),
    **dict.fromkeys((_XATTR_NAME, _XATTR_DATA, _PATH, _PATH_TO, _PATH_LINK, _DATA, _CLONE_PATH), -1),
}  # -1: any; 3 is an inode number, 9, 11 and 12 are other times, 21 is a ctransid: nobody needs them


@dataclass(frozen=True, slots=True)
class _Form:
    """What makes a command out of which attributes, and what of the limits it takes."""

    name: str
    make: Callable[..., Any]
    attributes: tuple[tuple[int, Callable[[bytes], object]], ...] = ()
    makes_entry: bool = False
    cost: Callable[[Any], tuple[str, int]] | None = None
    begins: bool = False


def _node(kind: Kind) -> Callable[[bytes, int, int], Mknod]:
    return lambda path, mode, rdev: Mknod(path, kind, mode, rdev)


def _device_node(path: bytes, raw_mode: int, rdev: int) -> Mknod:
    kinds: dict[int, Kind] = {stat.S_IFCHR: "char", stat.S_IFBLK: "block"}
    kind = kinds.get(stat.S_IFMT(raw_mode))
    if kind is None:
        raise _Nonsense(f"the mode {raw_mode:o}, which is no device's")
    return Mknod(path, kind, stat.S_IMODE(raw_mode), rdev)


def _write(path: bytes, offset: int, data: bytes) -> Write:
    _reaches(offset, len(data))
    return Write(path, offset, data)


def _clone(path: bytes, offset: int, length: int, source: bytes, source_offset: int, uuid: str) -> Clone:
    _reaches(max(offset, source_offset), length)
    return Clone(path, offset, length, source, source_offset, uuid)


def _reaches(offset: int, length: int) -> None:
    if offset + length > LARGEST_OFFSET:
        raise _Nonsense(f"{length} bytes at offset {offset}")


_AT = (_PATH, _path)
_AT_ANY = (_PATH, _path_or_root)  # what the root has too
_TO = (_FILE_OFFSET, _offset)
_FROM = ((_CLONE_LENGTH, _offset), (_CLONE_PATH, _path), (_CLONE_OFFSET, _offset), (_CLONE_UUID, _uuid))
_NODE = (_AT, (_MODE, _mode), (_RDEV, _device))
_XATTR = (_XATTR_NAME, _xattr_name)
_BEGINNING = (_AT, (_UUID, _uuid), (_CTRANSID, _u64))
_END = 21
_FORMS = {
    1: _Form("subvol", Subvol, _BEGINNING, begins=True),
    2: _Form("snapshot", Snapshot, (*_BEGINNING, (_CLONE_UUID, _uuid)), begins=True),
    3: _Form("mkfile", Mkfile, (_AT,), makes_entry=True),
    4: _Form("mkdir", Mkdir, (_AT,), makes_entry=True),
    5: _Form("mknod", _device_node, (_AT, (_MODE, _u64), (_RDEV, _device)), makes_entry=True),
    6: _Form("mkfifo", _node("fifo"), _NODE, makes_entry=True),
    7: _Form("mksock", _node("socket"), _NODE, makes_entry=True),
    8: _Form("symlink", Symlink, (_AT, (_PATH_LINK, _target)), True, lambda it: ("attributes", len(it.target))),
    9: _Form("rename", Rename, (_AT, (_PATH_TO, _path))),
    10: _Form("link", Link, (_AT, (_PATH_LINK, _path)), makes_entry=True),
    11: _Form("unlink", Unlink, (_AT,)),
    12: _Form("rmdir", Rmdir, (_AT,)),
    13: _Form(
        "set_xattr", SetXattr, (_AT_ANY, _XATTR, (_XATTR_DATA, _as_it_is)),
        cost=lambda it: ("attributes", len(it.name) + len(it.value)),
    ),
    14: _Form("remove_xattr", RemoveXattr, (_AT_ANY, _XATTR)),
    15: _Form("write", _write, (_AT, _TO, (_DATA, _as_it_is)), cost=lambda it: ("writes", 1)),
    16: _Form("clone", _clone, (_AT, _TO, *_FROM), cost=lambda it: ("cloned", it.length)),
    17: _Form("truncate", Truncate, (_AT, (_SIZE, _offset))),
    18: _Form("chmod", Chmod, (_AT_ANY, (_MODE, _mode))),
    19: _Form("chown", Chown, (_AT_ANY, (_UID, _id), (_GID, _id))),
    20: _Form("utimes", Utimes, (_AT_ANY, (_MTIME, _nanoseconds))),
    _END: _Form("end", End),
    22: _Form("update_extent", UpdateExtent, (_AT, _TO, (_SIZE, _offset)), cost=lambda it: ("writes", 1)),
}  # fmt: skip
