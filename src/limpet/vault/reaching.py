"""Which objects a generation needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from limpet.vault.errors import Damaged
from limpet.vault.generations import Generation
from limpet.vault.nodes import Node, decode, decode_block, decode_group, link_group
from limpet.vault.objectfile import Ref
from limpet.vault.objects import Objects
from limpet.vault.pages import Page, Root

What = Literal["names", "groups", "blocks", "data"]  # of which map an object is a page; or the bytes of a file
Needed = tuple[Ref, What]


class Live:
    """A set of addresses, one byte for each."""

    def __init__(self) -> None:
        self._flags: dict[int, bytearray] = {}

    def add(self, ref: Ref) -> bool:
        """Whether it is new."""
        flags = self._flags.setdefault(ref.pack, bytearray())
        if ref.ordinal >= len(flags):
            flags += bytes(ref.ordinal + 1024 - len(flags))
        new = not flags[ref.ordinal]
        flags[ref.ordinal] = 1
        return new

    def has(self, pack: int, ordinal: int) -> bool:
        flags = self._flags.get(pack, b"")
        return ordinal < len(flags) and flags[ordinal] == 1


def mark(objects: Objects, generations: Iterable[Generation]) -> Live:
    """Everything that these generations need. Each page is read once. Raises Damaged."""
    live = Live()
    for generation in generations:
        stack = list(_tops(generation))
        while stack:
            ref, what = stack.pop()
            if live.add(ref) and what != "data":
                stack += _below(objects.page(ref), what)
    return live


class Soundness:
    """Finds generations that need what is not there. `has`: whether an object is as it was written."""

    def __init__(self, objects: Objects, has: Callable[[Ref], bool]) -> None:
        self._objects = objects
        self._has = has
        self._sound: set[Ref] = set()  # pages
        self._unsound: set[Ref] = set()

    def problem(self, generation: Generation) -> str | None:
        """What is missing first. What was found out about a page holds for all generations that have it."""
        seen: set[Ref] = set()
        path: list[Ref] = []
        stack: list[Iterator[Needed]] = []
        needed = list(_tops(generation))
        while True:
            lost = next((ref for ref, _ in needed if ref in self._unsound or not self._has(ref)), None)
            if lost is not None:
                self._unsound.update(path)
                return f"object {lost.pack}.{lost.ordinal}"
            stack.append(iter(needed))
            found = self._next_page(stack, path, seen)
            if found is None:
                self._sound |= seen
                return None
            ref, what = found
            seen.add(ref)
            path.append(ref)
            try:
                needed = list(_below(self._objects.page(ref), what))
            except Damaged:
                needed = [(ref, "data")]
                self._unsound.add(ref)

    def _next_page(self, stack: list[Iterator[Needed]], path: list[Ref], seen: set[Ref]) -> Needed | None:
        while stack:
            for ref, what in stack[-1]:
                if what != "data" and ref not in seen and ref not in self._sound:
                    return ref, what
            stack.pop()
            if path:
                path.pop()
        return None


def _tops(generation: Generation) -> Iterator[Needed]:
    for volume in generation.volumes.values():
        yield from _of_node(volume.root.node)
        yield from _of_root(volume.root.links, "groups")


def _below(page: Page, what: What) -> Iterator[Needed]:
    if page.height > 0:
        yield from ((page.child(place).ref, what) for place in range(len(page.keys)))
    elif what == "blocks":
        yield from ((Ref(*decode_block(value)), "data") for value in page.values)
    elif what == "groups":
        for value in page.values:
            yield from _of_node(decode_group(value, 0)[1])
    else:
        for value in page.values:
            if link_group(value) is None:
                yield from _of_node(decode(value))


def _of_node(node: Node) -> Iterator[Needed]:
    if node.kind in ("dir", "file"):
        yield from _of_root(node.content, "names" if node.kind == "dir" else "blocks")


def _of_root(root: Root, what: What) -> Iterator[Needed]:
    if root.child is not None:
        yield root.child.ref, what
    elif root.inline:
        yield from _below(Page.decode(root.inline), what)
