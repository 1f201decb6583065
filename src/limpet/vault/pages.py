"""Sorted maps of any size from keys to values, as trees of pages: directories, the blocks of files, hard links.

A page has entries in the order of their keys; in pages above the lowest level an entry is the last key of a page below,
and where that page is. A page ends behind a key whose hash says so, or when it is too long: where the cuts are depends
on nothing but the content, so that equal maps are equal pages, and a change rewrites one page of each level.
Limits on both sides keep a guest that chooses its names well from making pages, or their number, larger than that.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from limpet.vault.errors import Damaged
from limpet.vault.objectfile import Ref

_FEWEST, _MOST, _BITS = 8, 128, 5  # entries of a page, and 2^5 more than the fewest on average
_LONGEST = 256 << 10  # bytes of values, beyond which a page ends whatever its entries
_HEAD = struct.Struct("<BI")
_CHILD = struct.Struct("<II32sQQQ")
_MAX = (1 << 64) - 1

Loader = Callable[[Ref], "Page"]


class Weight(NamedTuple):
    """What a map sums up over its entries: (files, bytes, hard links) in directories."""

    files: int = 0
    bytes: int = 0
    links: int = 0

    @classmethod
    def total(cls, weights: Iterable[Weight]) -> Weight:
        """Their sum. It stays at what 64 bits can hold: a guest may have many files of 2^63 bytes."""
        files, size, links = map(sum, zip(*weights, strict=True))
        return cls(min(_MAX, files), min(_MAX, size), min(_MAX, links))


NO_WEIGHT = Weight()


class Child(NamedTuple):
    """A page below another one."""

    ref: Ref
    weight: Weight

    def encode(self) -> bytes:
        return _CHILD.pack(*self.ref, *self.weight)

    @classmethod
    def decode(cls, value: bytes) -> Child:
        pack, ordinal, digest, *weight = _CHILD.unpack(value)
        return cls(Ref(pack, ordinal, digest), Weight(*weight))


class Page:
    """Entries in order. `height`: 0 for the lowest level."""

    __slots__ = ("height", "keys", "values")

    def __init__(self, height: int, keys: list[bytes], values: list[bytes]) -> None:
        self.height, self.keys, self.values = height, keys, values

    @property
    def weight(self) -> int:
        """About how much memory it takes."""
        return sum(map(len, self.values)) + 150 * len(self.keys)

    def encode(self) -> bytes:
        count = len(self.keys)
        return b"".join(
            (
                _HEAD.pack(self.height, count),
                struct.pack(f"<{count}H{count}I", *map(len, self.keys), *map(len, self.values)),
                *self.keys,
                *self.values,
            )
        )

    @classmethod
    def decode(cls, raw: bytes) -> Page:
        try:
            height, count = _HEAD.unpack_from(raw)
            lengths = struct.unpack_from(f"<{count}H{count}I", raw, _HEAD.size)
        except struct.error:
            raise Damaged("an object of the vault is no page") from None
        position, parts = _HEAD.size + 6 * count, []
        for length in lengths:
            parts.append(raw[position : position + length])
            position += length
        return cls(height, parts[:count], parts[count:])

    def ends(self) -> bool:
        """Whether a page ends here, behind its last entry."""
        count = len(self.keys)
        if count < _FEWEST:
            return False
        shift = _BITS * (self.height % 6)
        if not (zlib.crc32(self.keys[-1]) >> shift) & ((1 << _BITS) - 1) or count >= _MOST:
            return True
        return sum(map(len, self.values)) >= _LONGEST

    def child(self, place: int) -> Child:
        return Child.decode(self.values[place])


@dataclass(frozen=True, slots=True)
class Root:
    """A whole map: nothing, a page within the entry that has the map (`inline`), or a page in an object (`child`)."""

    inline: bytes = b""
    child: Child | None = None
    height: int = 0

    def encode(self) -> bytes:
        if self.child is not None:
            return b"\x01" + bytes([self.height]) + self.child.encode()
        return b"\x00" + self.inline

    @classmethod
    def decode(cls, raw: bytes) -> Root:
        if raw[:1] == b"\x01":
            return cls(child=Child.decode(raw[2:]), height=raw[1])
        return cls(inline=raw[1:])

    @property
    def empty(self) -> bool:
        return self.child is None and not self.inline

    def page(self, load: Loader) -> Page:
        """The topmost page."""
        if self.child is not None:
            return load(self.child.ref)
        return Page.decode(self.inline) if self.inline else Page(0, [], [])


EMPTY = Root()


def get(load: Loader, root: Root, key: bytes) -> bytes | None:
    """The value of a key, or None."""
    page = root.page(load)
    while True:
        place = bisect_left(page.keys, key)
        if place == len(page.keys):
            return None
        if page.height == 0:
            return page.values[place] if page.keys[place] == key else None
        page = load(page.child(place).ref)


def items(load: Loader, root: Root, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Entries from a key on, in order."""
    page = root.page(load)
    stack = [(page, bisect_left(page.keys, start))]
    while stack:
        page, place = stack.pop()
        if page.height == 0:
            yield from zip(page.keys[place:], page.values[place:], strict=True)
        elif place < len(page.keys):
            stack.append((page, place + 1))
            below = load(page.child(place).ref)
            stack.append((below, bisect_left(below.keys, start)))


def differences(
    load: Loader, before: Root, after: Root, *, linked: bool = False
) -> Iterator[tuple[bytes, bytes | None, bytes | None]]:
    """Keys with their values in two maps where these are not the same; equal pages are not looked into. `linked`: but
    those with hard links are, and equal values in them told too."""
    left, right = _Cursor(load, before), _Cursor(load, after)
    while left.stack or right.stack:
        if left.child is not None and left.child == right.child and not (linked and left.child.weight.links):
            left.pass_by()
            right.pass_by()
        elif left.child is not None and left.height >= right.height:
            left.enter()
        elif right.child is not None:
            right.enter()
        else:
            key = min(cursor.key for cursor in (left, right) if cursor.stack)
            ours, theirs = left.take(key), right.take(key)
            if linked or ours != theirs:
                yield key, ours, theirs


class _Cursor:
    """Walks through a map so that whole pages can be passed by."""

    def __init__(self, load: Loader, root: Root) -> None:
        self._load = load
        self.stack: list[tuple[int, bytes, bytes]] = []  # height of the page (-1: an entry), key, value; reversed
        if root.child is not None:
            self.stack.append((root.height, b"", root.child.encode()))
        else:
            self._push(root.page(load))

    @property
    def height(self) -> int:
        return self.stack[-1][0] if self.stack else -1

    @property
    def child(self) -> Child | None:
        return Child.decode(self.stack[-1][2]) if self.height >= 0 else None

    @property
    def key(self) -> bytes:
        return self.stack[-1][1]

    def pass_by(self) -> None:
        self.stack.pop()

    def enter(self) -> None:
        child = self.child
        assert child is not None
        self.stack.pop()
        self._push(self._load(child.ref))

    def take(self, key: bytes) -> bytes | None:
        return self.stack.pop()[2] if self.stack and self.key == key else None

    def _push(self, page: Page) -> None:
        self.stack += [(page.height - 1, key, value) for key, value in zip(page.keys, page.values, strict=True)][::-1]
