"""The blocks of files that are being changed. Those being written to are held in memory, the others are in the vault.

A block is stored without the zeroes at its end, and one of nothing else not at all: what a file's blocks are depends on
its bytes only, not on how they came to be there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from limpet.vault import growing, pages
from limpet.vault.errors import unless_damaged
from limpet.vault.nodes import BLOCK, Node, decode_block, encode_block, number_key
from limpet.vault.objectfile import Ref
from limpet.vault.objects import Objects, Sink
from limpet.vault.pages import Root
from limpet.vault.trees import Tree

INLINE = 4  # blocks of a file that are told in its node
_HELD = 16 << 20  # bytes of blocks that are being written to
_BLOCKS = 1024  # such blocks


class Earlier:
    """What an earlier generation has at the same path, if that is a file: what is equal is not stored again."""

    def __init__(self, tree: Tree, path: bytes) -> None:
        self._tree = tree
        node = unless_damaged(lambda: tree.lookup(path))
        self._node = node if node is not None and node.kind == "file" else Node("file")

    @property
    def content(self) -> Root:
        return self._node.content

    def block(self, index: int) -> Ref | None:
        """Where a block of it is."""
        return unless_damaged(lambda: self._tree.block(self._node, index))


class File:
    """The content of one file: the first `kept` blocks of `content`, which has `count`, under those in `stored`."""

    __slots__ = ("content", "count", "earlier", "kept", "size", "stored")

    def __init__(self, content: Root = Root(), size: int = 0) -> None:
        self.content = content
        self.size = size
        self.kept = self.count = _count(size)
        self.stored: dict[int, Ref | None] = {}  # None: a hole
        self.earlier: Earlier | None = None


class Blocks:
    """Reads and writes files. `stored`: how many blocks were stored since the last `flush`."""

    def __init__(self, objects: Objects, sink: Sink) -> None:
        self._objects = objects
        self._sink = sink
        self._open: OrderedDict[tuple[File, int], bytearray] = OrderedDict()
        self._held = 0
        self.stored = 0

    def write(self, file: File, offset: int, data: bytes | memoryview) -> None:
        """Write; the file grows when that is beyond its end."""
        view, done = memoryview(data), 0
        while done < len(view):
            index, start = divmod(offset + done, BLOCK)
            part = view[done : done + BLOCK - start]
            self._write_block(file, index, start, part)
            done += len(part)
        file.size = max(file.size, offset + len(view))

    def read(self, file: File, offset: int, length: int) -> Iterator[bytes]:
        """The bytes of a range within the file, block by block."""
        end = offset + length
        while offset < end:
            index, start = divmod(offset, BLOCK)
            stop = min(BLOCK, start + end - offset)
            block = bytes(self._content(file, index)[start:stop])
            yield block + bytes(stop - start - len(block))
            offset += stop - start

    def resize(self, file: File, size: int) -> None:
        """Cut the file off, or have it grow by a hole."""
        if size < file.size:
            count = _count(size)
            if size % BLOCK and (block := self._content(file, count - 1)):
                self._hold(file, count - 1, bytearray(block[: size % BLOCK]))
            if count < _count(file.size):
                file.kept = min(file.kept, count)
                for index in [index for index in file.stored if index >= count]:
                    del file.stored[index]
                for key in [key for key in self._open if key[0] is file and key[1] >= count]:
                    self._held -= len(self._open.pop(key))
        file.size = size

    def share(self, file: File, index: int, ref: Ref | None) -> None:
        """Have a whole block be one that is in the vault; None: a hole."""
        if (block := self._open.pop((file, index), None)) is not None:
            self._held -= len(block)
        file.stored[index] = ref
        self.stored += 1

    def numbers(self, file: File, first: int, last: int) -> list[int]:
        """The blocks from `first` to `last` that may not be holes."""
        found = {index for index, ref in file.stored.items() if ref is not None and first <= index <= last}
        found |= {index for other, index in self._open if other is file and first <= index <= last}
        for key, _ in pages.items(self._objects.page, file.content, number_key(first)):
            index = int.from_bytes(key, "big")
            if index > last or index >= file.kept:
                break
            if index not in file.stored:
                found.add(index)
        return sorted(found)

    def address(self, file: File, index: int) -> Ref | None:
        """Where a block is in the vault; None: it is a hole."""
        if (file, index) in self._open:
            self._store(file, index)
        if index in file.stored:
            return file.stored[index]
        if index >= file.kept:
            return None
        value = pages.get(self._objects.page, file.content, number_key(index))
        return None if value is None else Ref(*decode_block(value))

    def flush(self) -> None:
        """Store all blocks."""
        for file, index in list(self._open):
            self._store(file, index)
        self.stored = 0

    def finished(self, file: File) -> Root:
        """The content of a file whose blocks are all stored."""
        if not file.stored and file.kept == file.count:
            return file.content
        changes: dict[int, Ref | None] = dict(file.stored)
        for key, _ in pages.items(self._objects.page, file.content, number_key(file.kept)):
            changes.setdefault(int.from_bytes(key, "big"), None)
        encoded = [
            (number_key(index), None if ref is None else encode_block(ref)) for index, ref in sorted(changes.items())
        ]
        if (earlier := file.earlier) is not None:
            unless_damaged(lambda: growing.know(self._objects, self._sink, earlier.content))
        return growing.changed(self._objects, self._sink, file.content, encoded, inline=INLINE)

    def _write_block(self, file: File, index: int, start: int, part: memoryview) -> None:
        block = self._open.get((file, index))
        if block is None:
            whole = start == 0 and (len(part) == BLOCK or index * BLOCK + len(part) >= file.size)
            block = bytearray() if whole else bytearray(self._content(file, index))
            self._hold(file, index, block)
        before = len(block)
        if start > before:
            block += bytes(start - before)
        block[start : start + len(part)] = part
        self._held += len(block) - before
        if start + len(part) == BLOCK:
            self._store(file, index)  # most are written from beginning to end
        self._make_room()

    def _content(self, file: File, index: int) -> bytes | bytearray:
        if (block := self._open.get((file, index))) is not None:
            return block
        ref = self.address(file, index)
        return b"" if ref is None else self._objects.read(ref)

    def _hold(self, file: File, index: int, block: bytearray) -> None:
        self._held += len(block) - len(self._open.get((file, index), b""))
        self._open[file, index] = block
        self._make_room()

    def _make_room(self) -> None:
        while self._held > _HELD or len(self._open) > _BLOCKS:
            file, index = next(iter(self._open))
            self._store(file, index)

    def _store(self, file: File, index: int) -> None:
        block = self._open.pop((file, index))
        self._held -= len(block)
        content = bytes(block).rstrip(b"\0")
        if content and file.earlier is not None and (known := file.earlier.block(index)) is not None:
            self._sink.know(known)
        file.stored[index] = self._sink.store(content) if content else None
        self.stored += 1


def _count(size: int) -> int:
    """How many blocks a file of this size has."""
    return -(-size // BLOCK)
