"""One entry of a tree: its metadata and where its content is, and how that is written into pages.

    kind | what it weighs | mode, owners, time | extended attributes | content

Names of one inode (hard links) have only a number in their directories, the *group*; the node itself is in another map
of the tree, by that number, so that what changes through one name has changed for all.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal, get_args

from limpet.vault.pages import EMPTY, NO_WEIGHT, Root, Weight

Kind = Literal["file", "dir", "symlink", "fifo", "socket", "char", "block"]
BLOCK = 128 << 10  # bytes of a file that one object holds
MAX_SIZE = (1 << 63) - 1

_KINDS: tuple[Kind, ...] = get_args(Kind)
_FILE, _DIR, _SYMLINK = 0, 1, 2
_LINK = 255
_NUMBER = struct.Struct("<BQ")
_TOTALS = struct.Struct("<BQQQ")
_META = struct.Struct("<HIIqII")
_XATTR = struct.Struct("<HI")
_REF = struct.Struct("<II32s")
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Node:
    """`mode`: the permission bits (07777). `size`: of a file, in bytes. `group`: the hard-link group, 0 for none: nodes
    of one tree with the same group are names of one inode. `content`: the blocks of a file or the entries of a
    directory; only trees and editors look into it. `weight`: what is below a directory."""

    kind: Kind
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    size: int = 0
    rdev: int = 0
    target: bytes = b""
    group: int = 0
    content: Root = EMPTY
    weight: Weight = NO_WEIGHT

    def same(self, other: Node) -> bool:
        """Whether all but the content is equal, and how many other names there are."""
        return self._plain() == other._plain()

    def _plain(self) -> tuple[object, ...]:
        return (
            self.kind, self.mode, self.uid, self.gid, self.mtime_ns, self.xattrs, self.size, self.rdev, self.target
        )  # fmt: skip


def encode(node: Node) -> bytes:
    """A node as a value of a map; without its group."""
    kind = _KINDS.index(node.kind)
    content = b""
    if kind == _FILE:
        head, content = _NUMBER.pack(kind, node.size), node.content.encode()
    elif kind == _DIR:
        head, content = _TOTALS.pack(kind, *node.weight), node.content.encode()
    else:
        head, content = _NUMBER.pack(kind, node.rdev), node.target
    seconds, nanoseconds = divmod(node.mtime_ns, _NS)
    meta = _META.pack(node.mode, node.uid, node.gid, seconds, nanoseconds, len(node.xattrs))
    if not node.xattrs:
        return head + meta + content
    xattrs = b"".join(_XATTR.pack(len(name), len(value)) + name + value for name, value in node.xattrs)
    return head + meta + xattrs + content


def decode(value: bytes, group: int = 0) -> Node:
    """The node that `encode` wrote."""
    kind, number, weight, position = value[0], 0, Weight(), _NUMBER.size
    if kind == _DIR:
        weight, position = Weight(*_TOTALS.unpack_from(value)[1:]), _TOTALS.size
    else:
        number = _NUMBER.unpack_from(value)[1]
    mode, uid, gid, seconds, nanoseconds, count = _META.unpack_from(value, position)
    position += _META.size
    xattrs = []
    for _ in range(count):
        name, length = _XATTR.unpack_from(value, position)
        middle = position + _XATTR.size + name
        xattrs.append((value[position + _XATTR.size : middle], value[middle : middle + length]))
        position = middle + length
    return Node(
        _KINDS[kind], mode, uid, gid, seconds * _NS + nanoseconds, tuple(xattrs),
        size=number if kind == _FILE else 0,
        rdev=number if kind > _SYMLINK else 0,
        target=value[position:] if kind == _SYMLINK else b"",
        group=group,
        content=Root.decode(value[position:]) if kind <= _DIR else Root(),
        weight=weight,
    )  # fmt: skip


def encode_link(group: int) -> bytes:
    """An entry that is one name of a group."""
    return _NUMBER.pack(_LINK, group)


def link_group(value: bytes) -> int | None:
    """The group that an entry is a name of; None for a node."""
    return int(_NUMBER.unpack(value)[1]) if value[0] == _LINK else None


def weigh(value: bytes) -> Weight:
    """What an entry of a directory counts."""
    kind = value[0]
    if kind == _FILE:
        return Weight(1, _NUMBER.unpack_from(value)[1])
    if kind == _DIR:
        return Weight(*_TOTALS.unpack_from(value)[1:])
    return Weight(1, 0, int(kind == _LINK))


def encode_group(names: int, node: Node) -> bytes:
    """The node of a hard-link group, and how many names it has."""
    return struct.pack("<I", names) + encode(node)


def decode_group(value: bytes, group: int) -> tuple[int, Node]:
    """What `encode_group` wrote."""
    return struct.unpack_from("<I", value)[0], decode(value[4:], group)


def weigh_group(value: bytes) -> Weight:
    """What a group counts: the sizes that its names do not."""
    return Weight(0, weigh(value[4:]).bytes)


def number_key(number: int) -> bytes:
    """The key of a group or of a file's block: as bytes they are in the order of the numbers."""
    return number.to_bytes(8, "big")


def encode_block(ref: tuple[int, int, bytes]) -> bytes:
    """The address of a block as a value of a file's map."""
    return _REF.pack(*ref)


def decode_block(value: bytes) -> tuple[int, int, bytes]:
    """What `encode_block` wrote."""
    pack, ordinal, digest = _REF.unpack(value)
    return pack, ordinal, digest
