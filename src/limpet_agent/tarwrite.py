"""A directory as a pax tar stream (POSIX.1-2001), in constant memory: owners, modes, nanosecond times, extended
attributes, symbolic and hard links, devices, and sparse files in GNU's pax format 1.0.

`tarfile` would do, slowly: under emulation it needs 10 ms a file.
"""

from __future__ import annotations

import errno
import os
import stat
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Send = Callable[[bytes | memoryview], None]

BLOCK = 512
_HEADER = Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s167s")  # ustar, POSIX.1-1988
_CHUNK = 256 << 10
_OCTAL_SIZE = 8 << 30  # sizes from here on need a pax record
_OCTAL_ID = 0o7777777
_TYPES = {
    stat.S_IFREG: b"0", stat.S_IFLNK: b"2", stat.S_IFCHR: b"3", stat.S_IFBLK: b"4", stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}  # fmt: skip


def pack(path: str, exclude: frozenset[str], send: Send) -> None:
    """Send `path`: a directory with names relative to it ("." is itself), anything else under its own name.
    Files that vanish meanwhile are left out; one that shrinks is filled up with zeros."""
    writer = _Writer(send)
    root = os.fsencode(path)
    found = os.lstat(root)
    if stat.S_ISDIR(found.st_mode):
        writer.add(root, b".", found)
        writer.tree(root, b"", frozenset(os.fsencode(one) for one in exclude))
    else:
        writer.add(root, os.path.basename(root), found)
    writer.finish()


class _Writer:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._buffer = bytearray()
        self._links: dict[tuple[int, int], bytes] = {}

    def tree(self, directory: bytes, prefix: bytes, exclude: frozenset[bytes]) -> None:
        """Everything below `directory`, sorted; an explicit stack, for trees may be deep."""
        stack = [(directory, prefix)]
        while stack:
            directory, prefix = stack.pop()
            try:
                with os.scandir(directory) as scan:
                    entries = sorted(scan, key=lambda entry: entry.name)
            except OSError:
                continue
            below = []
            for entry in entries:
                name = prefix + entry.name
                if name in exclude:
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                self.add(entry.path, name, found)
                if stat.S_ISDIR(found.st_mode):
                    below.append((entry.path, name + b"/"))
            stack += reversed(below)

    def add(self, path: bytes, name: bytes, found: os.stat_result) -> None:
        """One entry with its content."""
        kind = _TYPES.get(stat.S_IFMT(found.st_mode))
        if kind is None:  # a socket: means nothing elsewhere
            return
        pax: dict[bytes, bytes] = {}
        target = b""
        if found.st_nlink > 1 and kind != b"5":
            first = self._links.setdefault((found.st_dev, found.st_ino), name)
            if first != name:
                kind, target = b"1", first
        try:
            if kind == b"2":
                target = os.readlink(path)
            pax |= _attributes(path)
            if kind == b"0" and found.st_size:
                self._file(path, name, found, pax)
                return
        except FileNotFoundError:
            return
        self._entry(name, kind, found, 0, target, pax)

    def finish(self) -> None:
        """The end of the archive."""
        self._buffer += bytes(2 * BLOCK)
        self._flush()

    def _file(self, path: bytes, name: bytes, found: os.stat_result, pax: dict[bytes, bytes]) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = found.st_size
            extents = _extents(fd, size) if found.st_blocks * 512 < size else [(0, size)]
            if extents == [(0, size)]:
                self._entry(name, b"0", found, size, b"", pax)
            else:
                table = "".join(f"{number}\n" for number in [len(extents), *(n for pair in extents for n in pair)])
                table_block = table.encode() + bytes(-len(table) % BLOCK)
                directory, _, base = name.rpartition(b"/")
                pax |= {
                    b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": name,
                    b"GNU.sparse.realsize": b"%d" % size,
                }  # fmt: skip
                size = len(table_block) + sum(length for _, length in extents)
                self._entry(directory + b"/GNUSparseFile.0/" + base, b"0", found, size, b"", pax)
                self._put(table_block)
            for offset, length in extents:
                self._content(fd, offset, length)
            self._put(bytes(-size % BLOCK))
        finally:
            os.close(fd)

    def _content(self, fd: int, offset: int, length: int) -> None:
        while length:
            data = os.pread(fd, min(length, _CHUNK), offset)
            if not data:  # it shrank: keep the announced size
                data = bytes(min(length, _CHUNK))
            self._put(data)
            offset += len(data)
            length -= len(data)

    def _entry(
        self, name: bytes, kind: bytes, found: os.stat_result, size: int, target: bytes, pax: dict[bytes, bytes]
    ) -> None:
        seconds, fraction = divmod(found.st_mtime_ns, 1_000_000_000)
        if fraction or seconds < 0:
            pax[b"mtime"] = _decimal(found.st_mtime_ns)
        for key, value, most in ((b"path", name, 100), (b"linkpath", target, 100)):
            if len(value) > most or not value.isascii():
                pax[key] = value
        if size >= _OCTAL_SIZE:
            pax[b"size"] = b"%d" % size
        for key, ident in ((b"uid", found.st_uid), (b"gid", found.st_gid)):
            if ident > _OCTAL_ID:
                pax[key] = b"%d" % ident
        if pax:
            records = b"".join(_record(key, value) for key, value in pax.items())
            self._header(b"pax/" + name[-90:], b"x", found, len(records), b"")
            self._put(records + bytes(-len(records) % BLOCK))
        self._header(name, kind, found, size, target)

    def _header(self, name: bytes, kind: bytes, found: os.stat_result, size: int, target: bytes) -> None:
        block = _HEADER.pack(
            name[:100], b"%07o" % stat.S_IMODE(found.st_mode), b"%07o" % min(found.st_uid, _OCTAL_ID),
            b"%07o" % min(found.st_gid, _OCTAL_ID), b"%011o" % (size % _OCTAL_SIZE),
            b"%011o" % (max(found.st_mtime_ns, 0) // 1_000_000_000 % _OCTAL_SIZE), b" " * 8, kind, target[:100],
            b"ustar", b"00", b"", b"", b"%07o" % os.major(found.st_rdev), b"%07o" % os.minor(found.st_rdev), b"",
        )  # fmt: skip
        self._buffer += block[:148] + b"%06o\0 " % sum(block) + block[156:]
        if len(self._buffer) >= _CHUNK:
            self._flush()

    def _put(self, data: bytes) -> None:
        if len(data) >= _CHUNK // 2:
            self._flush()
            self._send(data)
            return
        self._buffer += data
        if len(self._buffer) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            self._send(bytes(self._buffer))
            self._buffer.clear()


def _record(key: bytes, value: bytes) -> bytes:
    """`length key=value\\n`, where the length counts its own digits."""
    rest = b" %b=%b\n" % (key, value)
    length = len(rest) + len(str(len(rest)))
    if len(str(length)) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def _decimal(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    return sign + b"%d.%09d" % divmod(abs(nanoseconds), 1_000_000_000)


def _attributes(path: bytes) -> dict[bytes, bytes]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
        return {
            b"SCHILY.xattr." + os.fsencode(name): os.getxattr(path, name, follow_symlinks=False)
            for name in names if "=" not in name
        }  # fmt: skip
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise
        return {}


def _extents(fd: int, size: int) -> list[tuple[int, int]]:
    """(offset, length) of what is not a hole; ends with an empty extent at `size` when the file ends in a hole."""
    found = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            break
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        found.append((start, end - start))
        at = end
    if not found or sum(found[-1]) < size:
        found.append((size, 0))
    return found
