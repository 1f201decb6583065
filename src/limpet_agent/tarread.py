"""Unpack a tar stream (ustar, pax, GNU long names, GNU pax sparse 0.1 and 1.0) below a directory, in constant memory.

Nothing gets out: names are relative and without "..", directories are entered one by one without following symbolic
links (also those that the archive itself or a process in the guest puts there), hard links lead to names inside.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict

from limpet_agent.faults import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from limpet_agent.users import User

    Receive = Callable[[], bytes | memoryview | None]

BLOCK = 512
_LARGEST_RECORDS = 1 << 20  # of one pax header
_OPEN_DIRECTORIES = 64
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def unpack(receive: Receive, directory: str, owner: User | None) -> tuple[int, int]:
    """Unpack all that `receive` yields; (entries, bytes of content). Raises Fault for an archive that is broken or
    wants to get out, OSError when the disk refuses; what was unpacked until then stays."""
    source = _Source(receive)
    target = _Target(directory, owner)
    try:
        while (entry := _next_entry(source)) is not None:
            target.add(entry, source)
        target.finish()
        source.drain()
    finally:
        target.close()
    return target.files, target.bytes


class Entry:
    """One member of the archive."""

    __slots__ = ("gid", "kind", "link", "mode", "mtime_ns", "name", "pax", "rdev", "size", "uid")

    def __init__(self, block: memoryview, pax: dict[bytes, bytes]) -> None:
        raw = bytes(block)
        if raw[257:262] != b"ustar" and not _checksum_fits(raw):
            raise _broken("a header without magic")
        self.pax = pax
        self.kind = raw[156:157]
        name = raw[:100].partition(b"\0")[0]
        prefix = raw[345:500].partition(b"\0")[0] if raw[257:263] == b"ustar\0" else b""
        self.name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or (prefix + b"/" + name if prefix else name)
        self.link = pax.get(b"linkpath") or raw[157:257].partition(b"\0")[0]
        self.mode = _octal(raw[100:108]) & 0o7777
        self.uid = int(pax[b"uid"]) if b"uid" in pax else _octal(raw[108:116])
        self.gid = int(pax[b"gid"]) if b"gid" in pax else _octal(raw[116:124])
        self.size = int(pax[b"size"]) if b"size" in pax else _octal(raw[124:136])
        self.mtime_ns = _nanoseconds(pax[b"mtime"]) if b"mtime" in pax else _octal(raw[136:148]) * 1_000_000_000
        self.rdev = os.makedev(_octal(raw[329:337]), _octal(raw[337:345])) if self.kind in (b"3", b"4") else 0


class _Source:
    """Reads exact amounts from a stream of pieces."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._piece = memoryview(b"")

    def exactly(self, size: int) -> memoryview:
        """The next `size` bytes (small amounts). Raises Fault at the end."""
        piece = self._piece
        if len(piece) >= size:
            self._piece = piece[size:]
            return piece[:size]
        joined = bytearray(piece)
        while len(joined) < size:
            self._piece = self._more()
            take = size - len(joined)
            joined += self._piece[:take]
            self._piece = self._piece[take:]
        return memoryview(joined)

    def some(self, most: int) -> memoryview:
        """Between 1 and `most` bytes. Raises Fault at the end."""
        if not self._piece:
            self._piece = self._more()
        piece = self._piece[:most]
        self._piece = self._piece[most:]
        return piece

    def skip(self, size: int) -> None:
        """Drop bytes."""
        while size:
            size -= len(self.some(size))

    def drain(self) -> None:
        """Drop what follows the archive's end (padding)."""
        self._piece = memoryview(b"")
        while self._receive() is not None:
            pass

    def _more(self) -> memoryview:
        piece = self._receive()
        while piece is not None and not len(piece):
            piece = self._receive()
        if piece is None:
            raise _broken("it ends in the middle")
        return memoryview(piece)


def _next_entry(source: _Source) -> Entry | None:
    """The next member, with the extended headers before it taken in; None at the end."""
    pax: dict[bytes, bytes] = {}
    while True:
        block = source.exactly(BLOCK)
        if not block[0] and not any(block):
            return None
        try:
            entry = Entry(block, pax)
        except (ValueError, KeyError):
            raise _broken("a header that makes no sense") from None
        if entry.kind in (b"x", b"g", b"L", b"K"):
            if entry.size > _LARGEST_RECORDS:
                raise _broken("an extended header that is too long")
            data = bytes(source.exactly(entry.size))
            source.skip(-entry.size % BLOCK)
            if entry.kind == b"x":
                pax = {**pax, **_records(data)}
            elif entry.kind != b"g":
                pax[b"path" if entry.kind == b"L" else b"linkpath"] = data.rstrip(b"\0")
            continue
        return entry


def _records(data: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    while data:
        digits, _, _rest = data.partition(b" ")
        if not digits.isdigit() or int(digits) > len(data) or int(digits) < len(digits) + 3:
            raise _broken("a pax record of a wrong length")
        length = int(digits)
        key, separator, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not separator:
            raise _broken("a pax record without '='")
        found[key] = value
        data = data[length:]
    return found


class _Target:
    """Creates entries below one directory."""

    def __init__(self, directory: str, owner: User | None) -> None:
        self.files = self.bytes = 0
        self._owner = owner
        self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open: OrderedDict[bytes, int] = OrderedDict()
        self._late: list[tuple[bytes, int, int]] = []  # directories: their times change with what comes into them
        self._privileged = os.geteuid() == 0

    def add(self, entry: Entry, source: _Source) -> None:
        """Create one entry."""
        parts = _parts(entry.name)
        self.files += 1
        if not parts:  # the root itself
            if entry.kind == b"5":
                self._dress(self._root, entry)
                self._late.append((b"", entry.mode, entry.mtime_ns))
            return
        parent = self._directory(parts[:-1])
        name = parts[-1]
        if entry.kind in (b"0", b"\0", b"7"):
            self._file(parent, name, entry, source)
        elif entry.kind == b"5":
            self._make_directory(parent, name, entry, b"/".join(parts))
            source.skip(entry.size)
        elif entry.kind == b"1":
            self._hard_link(parent, name, entry)
        elif entry.kind in (b"2", b"3", b"4", b"6"):
            self._special(parent, name, entry)
        else:
            raise Fault("unimplemented", f"the archive has an entry of type {entry.kind!r}: {os.fsdecode(entry.name)}")

    def finish(self) -> None:
        """Set what the creation of other entries would have changed."""
        for path, mode, mtime_ns in reversed(self._late):
            fd = self._directory(path.split(b"/")) if path else self._root
            os.fchmod(fd, mode)
            os.utime(fd, ns=(mtime_ns, mtime_ns))

    def close(self) -> None:
        """Close what is open."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
        os.close(self._root)

    def _directory(self, parts: list[bytes]) -> int:
        """A descriptor of a directory below the root, made when it is missing; never through a symbolic link."""
        if not parts:
            return self._root
        path = b"/".join(parts)
        fd = self._open.get(path)
        if fd is not None:
            self._open.move_to_end(path)
            return fd
        parent = self._directory(parts[:-1])
        fd = self._enter(parent, parts[-1], path)
        if len(self._open) >= _OPEN_DIRECTORIES:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = fd
        return fd

    def _enter(self, parent: int, name: bytes, path: bytes) -> int:
        try:
            return os.open(name, _DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            os.mkdir(name, 0o755, dir_fd=parent)
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
            if self._owner is not None and self._privileged:
                os.fchown(fd, self._owner.uid, self._owner.gid)
            return fd
        except (NotADirectoryError, OSError) as error:
            where = os.fsdecode(path)
            raise Fault("failed_precondition", f"{where} in the way of the archive: {error.strerror}") from None

    def _create(self, parent: int, name: bytes, mode: int) -> int:
        try:
            return os.open(name, _CREATE, mode, dir_fd=parent)
        except FileExistsError:
            _clear(parent, name)
            return os.open(name, _CREATE, mode, dir_fd=parent)

    def _file(self, parent: int, name: bytes, entry: Entry, source: _Source) -> None:
        fd = self._create(parent, name, 0o600)
        try:
            if b"GNU.sparse.major" in entry.pax or b"GNU.sparse.map" in entry.pax:
                self._sparse(fd, entry, source)
            else:
                self.bytes += entry.size
                _pour(source, fd, entry.size)
            source.skip(-entry.size % BLOCK)
            self._dress(fd, entry)
            os.fchmod(fd, entry.mode)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _sparse(self, fd: int, entry: Entry, source: _Source) -> None:
        size, extents, used = _sparse_map(entry, source)
        for offset, length in extents:
            if offset + length > size or used + length > entry.size:
                raise _broken("a sparse map that makes no sense")
            os.lseek(fd, offset, os.SEEK_SET)
            _pour(source, fd, length)
            used += length
        source.skip(entry.size - used)
        os.ftruncate(fd, size)
        self.bytes += size

    def _make_directory(self, parent: int, name: bytes, entry: Entry, path: bytes) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=parent)
                os.mkdir(name, 0o700, dir_fd=parent)
        self._dress(self._directory(path.split(b"/")), entry)
        self._late.append((path, entry.mode, entry.mtime_ns))

    def _hard_link(self, parent: int, name: bytes, entry: Entry) -> None:
        target = _parts(entry.link)
        if not target:
            raise _broken("a hard link to nothing")
        source = self._directory(target[:-1])
        try:
            os.link(target[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            _clear(parent, name)
            os.link(target[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)

    def _special(self, parent: int, name: bytes, entry: Entry) -> None:
        try:
            self._make_special(parent, name, entry)
        except FileExistsError:
            _clear(parent, name)
            self._make_special(parent, name, entry)
        uid, gid = self._ids(entry)
        if self._privileged:
            os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
        if entry.kind != b"2":
            os.chmod(name, entry.mode, dir_fd=parent)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _make_special(self, parent: int, name: bytes, entry: Entry) -> None:
        if entry.kind == b"2":
            os.symlink(entry.link, name, dir_fd=parent)
        else:
            kind = {b"3": stat.S_IFCHR, b"4": stat.S_IFBLK, b"6": stat.S_IFIFO}[entry.kind]
            os.mknod(name, kind | 0o600, entry.rdev, dir_fd=parent)

    def _ids(self, entry: Entry) -> tuple[int, int]:
        if self._owner is not None:
            return self._owner.uid, self._owner.gid
        return entry.uid, entry.gid

    def _dress(self, fd: int, entry: Entry) -> None:
        uid, gid = self._ids(entry)
        if self._privileged and (uid, gid) != (0, 0):
            os.fchown(fd, uid, gid)
        if entry.pax:
            for key, value in entry.pax.items():
                if key.startswith(b"SCHILY.xattr."):
                    _set_attribute(fd, key[13:], value)


def _set_attribute(fd: int, name: bytes, value: bytes) -> None:
    try:
        os.setxattr(fd, name, value)
    except OSError:  # a file system or a kernel that has no such attributes: the file matters more
        pass


def _sparse_map(entry: Entry, source: _Source) -> tuple[int, list[tuple[int, int]], int]:
    """(size, extents, bytes of the member taken by the map)."""
    pax = entry.pax
    try:
        if b"GNU.sparse.map" in pax:
            numbers = [int(word) for word in pax[b"GNU.sparse.map"].split(b",") if word]
            return int(pax[b"GNU.sparse.size"]), list(zip(numbers[::2], numbers[1::2], strict=True)), 0
        text, used = b"", 0
        numbers = []
        while not numbers or len(numbers) < 1 + 2 * numbers[0]:
            if used >= min(entry.size, 64 << 20):
                raise ValueError
            text += source.exactly(BLOCK)
            used += BLOCK
            *lines, text = text.split(b"\n")
            numbers += [int(line) for line in lines]
        count = numbers[0]
        pairs = numbers[1 : 1 + 2 * count]
        return int(pax[b"GNU.sparse.realsize"]), list(zip(pairs[::2], pairs[1::2], strict=True)), used
    except (ValueError, KeyError):
        raise _broken("a sparse map that makes no sense") from None


def _pour(source: _Source, fd: int, size: int) -> None:
    while size:
        piece = source.some(size)
        size -= len(piece)
        while piece:
            piece = piece[os.write(fd, piece) :]


def _clear(parent: int, name: bytes) -> None:
    """Make room for an entry; a directory with content stays and is an error."""
    if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.rmdir(name, dir_fd=parent)
    else:
        os.unlink(name, dir_fd=parent)


def _parts(name: bytes) -> list[bytes]:
    """The components of a relative name; none for the root. Raises Fault for a name that leads out."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if name.startswith(b"/") or b".." in parts or b"\0" in name:
        raise Fault("bad_request", f"the archive has a path that leads out: {os.fsdecode(name)!r}")
    return parts


def _octal(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's base 256
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _nanoseconds(text: bytes) -> int:
    whole, _, fraction = text.partition(b".")
    nanoseconds = int(fraction[:9].ljust(9, b"0") or b"0")
    return int(whole) * 1_000_000_000 + (-nanoseconds if whole.startswith(b"-") else nanoseconds)


def _checksum_fits(raw: bytes) -> bool:
    try:
        return sum(raw) - sum(raw[148:156]) + 8 * 32 == _octal(raw[148:156])
    except ValueError:
        return False


def _broken(what: str) -> Fault:
    return Fault("bad_request", f"the archive is broken: {what}")
