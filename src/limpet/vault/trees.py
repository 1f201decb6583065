"""A read-only tree of files as one generation has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from limpet.errors import FailedPrecondition, NotFound
from limpet.vault import pages
from limpet.vault.errors import Damaged
from limpet.vault.nodes import (
    BLOCK,
    Node,
    decode,
    decode_block,
    decode_group,
    link_group,
    number_key,
)
from limpet.vault.objectfile import Ref
from limpet.vault.objects import Objects
from limpet.vault.pages import EMPTY, Root, Weight


@dataclass(frozen=True)
class TreeRoot:
    """What a manifest has of a tree. `links`: its hard-link groups; `next_group`: no number from here on is taken."""

    node: Node
    links: Root = EMPTY
    next_group: int = 1


class Tree:
    """Pages are loaded as they are needed, each object's digest is verified. Paths are relative bytes, b"" is the root.
    Every method raises Damaged for what is not as it was written."""

    def __init__(self, objects: Objects, root: TreeRoot) -> None:
        self._objects = objects
        self._load = objects.page
        self.root = root

    def lookup(self, path: bytes) -> Node | None:
        """The node at `path`, or None."""
        node: Node | None = self.root.node
        for name in path.split(b"/") if path else ():
            if node is None or node.kind != "dir":
                return None
            value = pages.get(self._load, node.content, name)
            node = None if value is None else self._node(value)
        return node

    def entries(self, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
        """The names in a directory with their nodes, in byte order. Raises NotFound; FailedPrecondition for what is no
        directory."""
        node = self._existing(path)
        if node.kind != "dir":
            raise FailedPrecondition(f"{_shown(path)} is no directory")
        return self.children(node)

    def children(self, node: Node) -> Iterator[tuple[bytes, Node]]:
        """As `entries`, of a directory's node."""
        return ((name, self._node(value)) for name, value in pages.items(self._load, node.content))

    def walk(self, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
        """`path` itself, then everything below, parents before children, names in byte order."""
        node = self._existing(path)
        yield path, node
        yield from self._below(path, node)

    def read(self, node: Node, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """A file's bytes, holes as zeroes, in chunks of at most 128 KiB."""
        end = node.size if length is None else min(node.size, offset + length)
        for index, ref in self.blocks(node, offset // BLOCK):
            start = index * BLOCK
            if start >= end:
                break
            yield from _zeroes(offset, start)
            offset, stop = max(offset, start), min(start + BLOCK, end)
            block = self._objects.read(ref)[offset - start : stop - start]
            yield block + bytes(stop - offset - len(block))  # zeroes at a block's end are not stored
            offset = stop
        yield from _zeroes(offset, end)

    def extents(self, node: Node) -> Iterator[tuple[int, int]]:
        """The parts of a file that are data as (offset, length), ascending; the rest are holes."""
        begin = end = 0
        for index, _ in self.blocks(node):
            if index * BLOCK != end:
                if end > begin:
                    yield begin, end - begin
                begin = index * BLOCK
            end = (index + 1) * BLOCK
        if end > begin:
            yield begin, min(end, node.size) - begin

    def blocks(self, node: Node, first: int = 0) -> Iterator[tuple[int, Ref]]:
        """The blocks of a file that hold data as (number, address)."""
        if node.kind != "file":
            return
        for key, value in pages.items(self._load, node.content, number_key(first)):
            yield int.from_bytes(key, "big"), Ref(*decode_block(value))

    def block(self, node: Node, index: int) -> Ref | None:
        """The address of one block; None: a hole."""
        value = pages.get(self._load, node.content, number_key(index))
        return None if value is None else Ref(*decode_block(value))

    def child(self, parent: Node, name: bytes) -> Node | None:
        """What a name in a directory stands for."""
        value = pages.get(self._load, parent.content, name)
        return None if value is None else self._node(value)

    def totals(self, path: bytes = b"") -> tuple[int, int]:
        """(files, bytes) of what is at and below `path`: each name that is no directory, and the sizes of files, those
        of hard links once."""
        node = self._existing(path)
        if node.kind != "dir":
            return 1, node.size
        if not path:
            return node.weight.files, node.weight.bytes + self._links_weight().bytes
        linked = {found.group: found.size for _, found in self._linked(node)} if node.weight.links else {}
        return node.weight.files, node.weight.bytes + sum(linked.values())

    def compare(self, other: Tree, path: bytes = b"") -> Iterator[tuple[bytes, Node | None, Node | None]]:
        """(path, node here, node in `other`) of whatever differs at and below `path`, parents before children; equal
        subtrees cost nothing. A directory differs when its own metadata does."""
        groups = {
            int.from_bytes(key, "big") for key, _, _ in pages.differences(self._load, self.root.links, other.root.links)
        }
        stack = [iter([(path, self.lookup(path), other.lookup(path))])]
        while stack:
            if (found := next(stack[-1], None)) is None:
                stack.pop()
                continue
            name, before, after = found
            if before is None or after is None or before.kind != after.kind or not self._equal(before, after):
                yield name, before, after
            stack.append(self._differing(other, name, before, after, groups))

    def _differing(
        self, other: Tree, path: bytes, before: Node | None, after: Node | None, groups: set[int]
    ) -> Iterator[tuple[bytes, Node | None, Node | None]]:
        """What may differ directly below two nodes."""
        ours = before.content if before and before.kind == "dir" else Root()
        theirs = after.content if after and after.kind == "dir" else Root()
        for name, left, right in pages.differences(self._load, ours, theirs, linked=bool(groups)):
            if left == right and not self._may_differ(left, groups):
                continue
            yield (
                _join(path, name),
                None if left is None else self._node(left),
                None if right is None else other._node(right),
            )

    def _may_differ(self, value: bytes | None, groups: set[int]) -> bool:
        """Whether equal entries stand for what differs, through a hard link."""
        if value is None:
            return False
        if (group := link_group(value)) is not None:
            return group in groups
        return decode(value).weight.links > 0

    def _equal(self, before: Node, after: Node) -> bool:
        if not before.same(after):
            return False
        if before.kind != "file" or before.content == after.content:
            return True
        for _, left, right in pages.differences(self._load, before.content, after.content):
            if left is None or right is None or decode_block(left)[2] != decode_block(right)[2]:
                return False
        return True

    def _below(self, path: bytes, node: Node) -> Iterator[tuple[bytes, Node]]:
        if node.kind != "dir":
            return
        stack = [(path, pages.items(self._load, node.content))]
        while stack:
            parent, rest = stack[-1]
            if (found := next(rest, None)) is None:
                stack.pop()
                continue
            name, node = _join(parent, found[0]), self._node(found[1])
            yield name, node
            if node.kind == "dir":
                stack.append((name, pages.items(self._load, node.content)))

    def _linked(self, top: Node) -> Iterator[tuple[int, Node]]:
        """The hard links below a directory; subtrees without any are not looked into."""
        stack = [top]
        while stack:
            for _, value in pages.items(self._load, stack.pop().content):
                if (group := link_group(value)) is not None:
                    yield group, self._node(value)
                elif (node := decode(value)).weight.links:
                    stack.append(node)

    def _links_weight(self) -> Weight:
        links = self.root.links
        return links.child.weight if links.child is not None else Weight()

    def _node(self, value: bytes) -> Node:
        if (group := link_group(value)) is None:
            return decode(value)
        if (found := pages.get(self._load, self.root.links, number_key(group))) is None:
            raise Damaged(f"hard link group {group} is not in its tree")
        return decode_group(found, group)[1]

    def _existing(self, path: bytes) -> Node:
        if (node := self.lookup(path)) is None:
            raise NotFound(f"there is no {_shown(path)}")
        return node


def _join(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent else name


def _shown(path: bytes) -> str:
    return repr(path.decode(errors="backslashreplace"))


def _zeroes(start: int, end: int) -> Iterator[bytes]:
    while start < end:
        length = min(BLOCK, end - start)
        yield bytes(length)
        start += length
