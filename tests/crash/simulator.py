"""What a power loss may leave of a directory: every legal state of the disk after any of its recorded effects.

What was not fsynced may be there, gone, cut off where a write ended, or there in length only, as zeroes. Of the changes
of names since a directory's last fsync any may be missing, but none that builds on a missing one: no rename of a file
whose creation was lost. One change is there or not: a rename over a name leaves the old or the new one, a symlink never
comes without its text. This is less than any file system in use promises, so that what survives it survives them.

    Disk ──apply(op)──► Disk ──states()──► State ──materialize()──► a directory that the real code opens (`proving`)

Effects that were not recorded (a tool wrote, a library made a directory) are learned when they are fsynced, which is
when somebody begins to rely on them; `Disk.learned` names them.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from limpet.durable import Op

_FEW = 8  # pending changes of names up to which all subsets are looked at


@dataclass(eq=False)
class File:
    """`durable`: what a crash cannot take. `writes`: those since then, in order."""

    durable: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def content(self) -> bytes:
        return _written(self.durable, self.writes)

    def variants(self) -> list[bytes]:
        """What it may hold after a crash; the first is all of it."""
        cut = [_written(self.durable, self.writes[:count]) for count in range(len(self.writes), -1, -1)]
        zeroed = [(offset, bytes(len(data))) for offset, data in self.writes]
        return list(dict.fromkeys([*cut, _written(self.durable, zeroed)]))


@dataclass(eq=False)
class Link:
    """A symlink."""

    text: str


@dataclass(eq=False)
class Directory:
    """`entries`: those that a crash cannot take. What is pending is the business of `Disk`."""

    entries: dict[str, Node] = field(default_factory=dict)


Node = File | Link | Directory
Slot = tuple[Directory, str]


@dataclass(eq=False)
class Change:
    """One change of names, which happens as a whole: `puts` nodes under names, `takes` nodes away from names where they
    are. `needs`: the changes that it builds on."""

    puts: list[tuple[Slot, Node]]
    takes: list[tuple[Slot, Node]]
    needs: list[Change]

    def touches(self, directory: Directory) -> bool:
        """Whether an fsync of this directory makes it durable."""
        return any(where is directory for (where, _), _ in self.puts or self.takes)


@dataclass(frozen=True)
class State:
    """The disk after a crash that came after so many effects. `files`: the content, and the identity of the file."""

    after: int
    directories: frozenset[str]
    links: frozenset[tuple[str, str]]
    files: frozenset[tuple[str, bytes, int]]

    @property
    def key(self) -> object:
        """Equal for what looks alike."""
        return self.directories, self.links, self.files

    def materialize(self, directory: Path) -> None:
        """Make `directory`, which must not be there, look like this."""
        directory.mkdir()
        for name in sorted(self.directories):
            (directory / name).mkdir()
        known: dict[int, Path] = {}
        for name, content, identity in self.files:
            if identity in known:
                os.link(known[identity], directory / name)
            else:
                (directory / name).write_bytes(content)
                known[identity] = directory / name
        for name, text in self.links:
            (directory / name).symlink_to(text)

    def __str__(self) -> str:
        names = [f"{name} ({len(content)} B)" for name, content, _ in sorted(self.files)]
        names += [f"{name} → {text}" for name, text in sorted(self.links)]
        return f"after {self.after} effects: {', '.join(names) or 'nothing'}"


class Disk:
    """A directory and everything below it, as the kernel has it and as the disk may have it."""

    def __init__(self, root: Path) -> None:
        self._path = root.absolute()
        self._root = _load(root, {})
        self._pending: list[Change] = []
        self.learned: list[str] = []  # what was done behind the recorder's back

    # ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, op: Op) -> None:
        """Do what was recorded; what is elsewhere is nothing to this disk."""
        if op.path.is_relative_to(self._path):
            getattr(self, f"_{op.kind}")(op)

    def _create(self, op: Op) -> None:
        self._put(op.path, File())

    def _mkdir(self, op: Op) -> None:
        self._put(op.path, Directory())

    def _symlink(self, op: Op) -> None:
        self._put(op.path, Link(str(op.target)))

    def _write(self, op: Op) -> None:
        assert op.data is not None
        self._file(op.path).writes.append((op.offset, op.data))

    def _fsync(self, op: Op) -> None:
        file = self._file(op.path)
        if op.data is not None and op.data != file.content:
            self.learned.append(f"content of {op.path}")
            file.durable = op.data
        else:
            file.durable = file.content
        file.writes = []

    def _link(self, op: Op) -> None:
        source = self._slot(op.path)
        self._change([(self._slot(_path(op)), self._known(source, op))], [], [source])

    def _rename(self, op: Op) -> None:
        source = self._slot(op.path)
        node = self._known(source, op)
        self._change([(self._slot(_path(op)), node)], [(source, node)], [source])

    def _exchange(self, op: Op) -> None:
        a, b = self._slot(op.path), self._slot(_path(op))
        self._change([(a, self._known(b, op)), (b, self._known(a, op))], [], [a, b])

    def _unlink(self, op: Op) -> None:
        slot = self._slot(op.path)
        if (node := self._at(slot)) is not None:
            self._change([], [(slot, node)], [])

    _rmdir = _unlink

    def _fsync_dir(self, op: Op) -> None:
        directory = self._directory(op.path)
        if op.data is not None:
            self._learn(directory, op.path, json.loads(op.data))
        safe: set[Change] = set()
        for change in self._pending:
            if change.touches(directory):
                safe |= _closure(change)
        _perform([change for change in self._pending if change in safe], None)
        self._pending = [change for change in self._pending if change not in safe]

    def _learn(self, directory: Directory, path: Path, listing: dict[str, str]) -> None:
        """Take over what is in a directory without anybody having said so."""
        known = self._entries(directory)
        for name in known.keys() - listing.keys():
            self.learned.append(f"removal of {path / name}")
            self._change([], [((directory, name), known[name])], [])
        for name, kind in listing.items():
            node = known.get(name)
            found = "link:" + node.text if isinstance(node, Link) else "dir" if isinstance(node, Directory) else "file"
            if node is None or (found != kind and kind != "other"):
                self.learned.append(f"{kind} {path / name}")
                self._change([((directory, name), _new(kind))], [], [])

    # ── names, as the kernel has them ────────────────────────────────────────────────────────────────────────────

    def _put(self, path: Path, node: Node) -> None:
        self._change([(self._slot(path), node)], [], [])

    def _change(self, puts: list[tuple[Slot, Node]], takes: list[tuple[Slot, Node]], uses: list[Slot]) -> None:
        needs = [change for slot in uses if (change := self._last(slot)) is not None]
        self._pending.append(Change(puts, takes, needs))

    def _last(self, slot: Slot) -> Change | None:
        """The pending change that put what is at a name there."""
        return next((c for c in reversed(self._pending) if any(where == slot for where, _ in c.puts)), None)

    def _entries(self, directory: Directory) -> dict[str, Node]:
        names = dict(directory.entries)
        _perform(self._pending, {directory: names})
        return names

    def _at(self, slot: Slot) -> Node | None:
        return self._entries(slot[0]).get(slot[1])

    def _known(self, slot: Slot, op: Op) -> Node:
        node = self._at(slot)
        if node is None:  # somebody made it without a word
            self.learned.append(f"{slot[1]}, at {op.kind}")
            node = File() if Path(_path(op)).is_file() else Directory()
        return node

    def _slot(self, path: Path) -> Slot:
        return self._directory(path.parent), path.name

    def _directory(self, path: Path) -> Directory:
        if path == self._path:
            return self._root
        parent = self._directory(path.parent)
        node = self._at((parent, path.name))
        if not isinstance(node, Directory):
            self.learned.append(f"dir {path}")
            node = Directory()
            self._change([((parent, path.name), node)], [], [])
        return node

    def _file(self, path: Path) -> File:
        slot = self._slot(path)
        node = self._at(slot)
        if not isinstance(node, File):
            self.learned.append(f"file {path}")
            node = File()
            self._change([(slot, node)], [], [])
        return node

    # ── states ───────────────────────────────────────────────────────────────────────────────────────────────────

    def states(self, after: int, limit: int, choice: random.Random) -> Iterator[State]:
        """What a crash now may leave; when that is more than `limit` states, a choice of about so many with the
        extremes among them."""
        subsets = list(self._subsets(limit, choice))
        for subset in subsets:
            tree = _tree(self._root, subset)
            dirty = [node for node in dict.fromkeys(tree.values()) if isinstance(node, File) and node.writes]
            contents = [file.variants() for file in dirty]
            for values in _some(contents, max(2, limit // len(subsets)), choice):
                yield _state(after, tree, dict(zip(dirty, values, strict=True)))

    def _subsets(self, limit: int, choice: random.Random) -> Iterator[list[Change]]:
        """Of the pending changes those that reached the disk."""
        pending = self._pending
        if len(pending) <= _FEW and 2 ** len(pending) <= limit * 4:
            masks: Iterable[tuple[bool, ...]] = itertools.product([True, False], repeat=len(pending))
        else:
            masks = _masks(len(pending), limit, choice)
        seen = set()
        for mask in masks:
            subset = {change for change, there in zip(pending, mask, strict=True) if there}
            whole = [change for change in pending if _closure(change) <= subset]
            if (key := tuple(map(id, whole))) not in seen:
                seen.add(key)
                yield whole


def _path(op: Op) -> Path:
    assert isinstance(op.target, Path)
    return op.target


def _written(content: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    if not writes:
        return content
    end = max(len(content), *(offset + len(data) for offset, data in writes))
    whole = bytearray(content.ljust(end, b"\0"))
    for offset, data in writes:
        whole[offset : offset + len(data)] = data
    return bytes(whole)


def _closure(change: Change) -> set[Change]:
    return {change}.union(*(_closure(needed) for needed in change.needs))


def _perform(changes: list[Change], names: dict[Directory, dict[str, Node]] | None) -> None:
    """Change the durable entries, or those copies of entries that are given."""
    for change in changes:
        for (directory, name), node in change.takes:
            entries = directory.entries if names is None else names.get(directory, {})
            if entries.get(name) is node:
                del entries[name]
        for (directory, name), node in change.puts:
            entries = directory.entries if names is None else names.get(directory, {})
            entries[name] = node


def _tree(root: Directory, changes: list[Change]) -> dict[str, Node]:
    """Every path below the root with what is there when these pending changes happened."""
    names: dict[Directory, dict[str, Node]] = {root: dict(root.entries)}
    for change in changes:
        for (directory, _), _ in [*change.puts, *change.takes]:
            names.setdefault(directory, dict(directory.entries))
    _perform(changes, names)
    found: dict[str, Node] = {}
    queue = [("", root)]
    while queue:
        prefix, directory = queue.pop()
        for name, node in names.get(directory, directory.entries).items():
            found[prefix + name] = node
            if isinstance(node, Directory):
                queue.append((f"{prefix}{name}/", node))
    return found


def _state(after: int, tree: dict[str, Node], contents: dict[File, bytes]) -> State:
    return State(
        after,
        frozenset(path for path, node in tree.items() if isinstance(node, Directory)),
        frozenset((path, node.text) for path, node in tree.items() if isinstance(node, Link)),
        frozenset(
            (path, contents.get(node, node.durable), id(node)) for path, node in tree.items() if isinstance(node, File)
        ),
    )


def _some(contents: list[list[bytes]], limit: int, choice: random.Random) -> Iterator[tuple[bytes, ...]]:
    total = 1
    for variants in contents:
        total *= len(variants)
    if total <= limit:
        yield from itertools.product(*contents)
        return
    yield tuple(variants[0] for variants in contents)
    yield tuple(variants[-1] for variants in contents)
    for _ in range(limit - 2):
        yield tuple(choice.choice(variants) for variants in contents)


def _masks(count: int, limit: int, choice: random.Random) -> Iterator[tuple[bool, ...]]:
    """All, none, all but one, only one, every beginning, and others by chance: `limit` of them at most."""
    special = [(True,) * count, (False,) * count]
    special += [tuple(n < end for n in range(count)) for end in range(1, count)]
    special += [tuple((n == one) == there for n in range(count)) for one in range(count) for there in (False, True)]
    yield from special[:2]
    yield from choice.sample(special[2:], min(limit // 2, len(special) - 2))
    for _ in range(limit // 2):
        yield tuple(choice.random() < 0.5 for _ in range(count))


def _new(kind: str) -> Node:
    if kind.startswith("link:"):
        return Link(kind.removeprefix("link:"))
    return Directory() if kind == "dir" else File()


def _load(path: Path, known: dict[int, File]) -> Directory:
    """A directory of the real disk; a file with several names is one."""
    directory = Directory()
    for entry in os.scandir(path):
        if entry.is_symlink():
            directory.entries[entry.name] = Link(os.readlink(entry.path))
        elif entry.is_dir():
            directory.entries[entry.name] = _load(Path(entry.path), known)
        elif entry.is_file():
            file = known.setdefault(entry.inode(), File())
            file.durable = Path(entry.path).read_bytes()
            directory.entries[entry.name] = file
    return directory
