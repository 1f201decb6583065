"""A generation's files as a tar stream, for unpacking inside of a guest (limpet_agent/tarread.py), in constant memory.

Format: ustar blocks with extended headers (pax(1)) for what they cannot hold: times in nanoseconds, long names,
extended attributes (SCHILY.xattr.*), and files with holes (GNU sparse 1.0: the map precedes the data).
"""

from __future__ import annotations

from collections.abc import Iterator

from limpet.errors import FailedPrecondition, NotFound
from limpet.vault.nodes import Node
from limpet.vault.trees import Tree

_BLOCK = 512
_MOST_EXTENTS = 1_000_000  # of one file: what its map in the archive may hold
_TYPES = {"file": b"0", "symlink": b"2", "char": b"3", "block": b"4", "dir": b"5", "fifo": b"6"}
_LARGEST_OCTAL = {7: 0o7777777, 11: 0o77777777777}


def pack(tree: Tree, path: bytes = b"") -> Iterator[bytes]:
    """What is at `path`: a directory's contents below ".", anything else under its own name. Hard links stay what they
    are; sockets are left out: a tar cannot say them. Raises NotFound, Damaged."""
    top = tree.lookup(path)
    if top is None:
        raise NotFound(f"there is no {path!r} in this generation")
    linked: dict[int, bytes] = {}
    for place, node in tree.walk(path):
        if top.kind != "dir":
            name = path.rpartition(b"/")[2]
        else:
            name = b"/".join(part for part in (b".", place[len(path) :].lstrip(b"/")) if part)
        if node.kind == "socket":
            continue
        if node.group and node.group in linked:
            yield _header(name, node, b"1", 0, {b"linkpath": linked[node.group]})
            continue
        if node.group:
            linked[node.group] = name
        yield from _file(tree, name, node) if node.kind == "file" else _other(name, node)
    yield b"\0" * (2 * _BLOCK)


def _other(name: bytes, node: Node) -> Iterator[bytes]:
    records = {b"linkpath": node.target} if node.kind == "symlink" else {}
    yield _header(name, node, _TYPES[node.kind], 0, records)


def _file(tree: Tree, name: bytes, node: Node) -> Iterator[bytes]:
    extents = list(_bounded(tree.extents(node), name))
    stored = sum(length for _, length in extents)
    if stored == node.size:
        yield _header(name, node, b"0", stored, {})
    else:
        numbers = [len(extents), *(number for extent in extents for number in extent)]
        layout = _filled(b"".join(b"%d\n" % number for number in numbers))
        stored += len(layout)
        yield _header(
            b"GNUSparseFile.0", node, b"0", stored,
            {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": name,
             b"GNU.sparse.realsize": b"%d" % node.size},
        )  # fmt: skip
        yield layout
    for offset, length in extents:
        yield from tree.read(node, offset, length)
    yield b"\0" * (-stored % _BLOCK)


def _bounded(extents: Iterator[tuple[int, int]], name: bytes) -> Iterator[tuple[int, int]]:
    for count, extent in enumerate(extents):
        if count == _MOST_EXTENTS:
            raise FailedPrecondition(f"{name!r} has too many holes for an archive", hint="restore it with --to DIR")
        yield extent


def _header(name: bytes, node: Node, kind: bytes, size: int, records: dict[bytes, bytes]) -> bytes:
    """A member's block, with an extended header before it for what does not fit in."""
    pax = {b"mtime": _decimal(node.mtime_ns), **records}
    if len(name) > 100:
        pax[b"path"] = name
    for key, value, width in ((b"size", size, 11), (b"uid", node.uid, 7), (b"gid", node.gid, 7)):
        if value > _LARGEST_OCTAL[width]:
            pax[key] = b"%d" % value
    for key, content in node.xattrs:
        pax[b"SCHILY.xattr." + key] = content
    data = b"".join(_record(key, value) for key, value in pax.items())
    return _block(b"././@PaxHeader", b"x", len(data)) + _filled(data) + _block(name, kind, size, node)


def _block(name: bytes, kind: bytes, size: int, node: Node | None = None) -> bytes:
    """A ustar header. What is too large for its field stands in the extended header."""
    rdev = node.rdev if node is not None and kind in b"34" else 0
    fields = b"".join((
        name[:100].ljust(100, b"\0"),
        _octal(node.mode if node else 0o600, 7),
        _octal(node.uid if node else 0, 7),
        _octal(node.gid if node else 0, 7),
        _octal(size, 11),
        _octal(max(0, node.mtime_ns) // 1_000_000_000 if node else 0, 11),
        b" " * 8,  # the checksum, counted as blanks
        kind,
        b"\0" * 100,
        b"ustar\x0000",
        b"\0" * 64,
        _octal((rdev >> 8) & 0xFFF, 7),
        _octal((rdev & 0xFF) | ((rdev >> 12) & 0xFFF00), 7),
    )).ljust(_BLOCK, b"\0")  # fmt: skip
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def _octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width, value if value <= _LARGEST_OCTAL[width] else 0)


def _record(key: bytes, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE\\n`, where LENGTH counts itself too."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def _decimal(nanoseconds: int) -> bytes:
    """Seconds since 1970, as pax has them: -1.5 is one and a half before."""
    seconds, fraction = divmod(abs(nanoseconds), 1_000_000_000)
    return b"%b%d.%09d" % (b"-" if nanoseconds < 0 else b"", seconds, fraction)


def _filled(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _BLOCK)
