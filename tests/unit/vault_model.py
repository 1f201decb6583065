"""A tree of files as plain Python objects: what an Editor is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from limpet.vault import Generation, Node, Tree, Vault

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(eq=False)
class Thing:
    """An inode: several names may stand for the same one."""

    kind: str
    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    target: bytes = b""
    rdev: int = 0


class Refused(Exception):
    """The model says that this does not fit the tree."""


class Model:
    """As Editor, with everything in a dict from paths to things. The root is not in it."""

    def __init__(self) -> None:
        self.things: dict[bytes, Thing] = {}

    def copy(self) -> Model:
        """One that is as this is now: files are not shared."""
        made: dict[int, Thing] = {}
        other = Model()
        for path, thing in self.things.items():
            if id(thing) not in made:
                made[id(thing)] = Thing(
                    thing.kind, thing.mode, thing.uid, thing.gid, thing.mtime_ns, dict(thing.xattrs),
                    bytearray(thing.data), thing.target, thing.rdev,
                )  # fmt: skip
            other.things[path] = made[id(thing)]
        return other

    def at(self, path: bytes, kind: str | None = None) -> Thing:
        thing = self.things.get(path)
        if thing is None or (kind is not None and thing.kind != kind):
            raise Refused
        return thing

    def make(self, path: bytes, kind: str, mode: int, target: bytes = b"", rdev: int = 0) -> None:
        self.free(path)
        self.things[path] = Thing(kind, mode, target=target, rdev=rdev)

    def free(self, path: bytes) -> None:
        parent = path.rpartition(b"/")[0]
        if path in self.things or (parent and self.at(parent).kind != "dir"):
            raise Refused

    def below(self, path: bytes) -> list[bytes]:
        return [other for other in self.things if other.startswith(path + b"/")]

    def rename(self, source: bytes, target: bytes) -> None:
        thing = self.at(source)
        if source == target:
            return
        parent = target.rpartition(b"/")[0]
        if target.startswith(source + b"/") or (parent and self.at(parent).kind != "dir"):
            raise Refused
        if (there := self.things.get(target)) is not None:
            if there is thing:
                return
            if thing.kind == "dir" and (there.kind != "dir" or self.below(target)):
                raise Refused
            if thing.kind != "dir" and there.kind == "dir":
                raise Refused
        for path in [source, *self.below(source)]:
            self.things[target + path[len(source) :]] = self.things.pop(path)

    def link(self, path: bytes, existing: bytes) -> None:
        thing = self.at(existing)
        if thing.kind == "dir":
            raise Refused
        self.free(path)
        self.things[path] = thing

    def remove(self, path: bytes, directory: bool) -> None:
        if (self.at(path).kind == "dir") != directory or self.below(path):
            raise Refused
        del self.things[path]

    def write(self, path: bytes, offset: int, data: bytes) -> None:
        held = self.at(path, "file").data
        held.extend(bytes(max(0, offset - len(held))))
        held[offset : offset + len(data)] = data

    def truncate(self, path: bytes, size: int) -> None:
        held = self.at(path, "file").data
        held.extend(bytes(max(0, size - len(held))))
        del held[size:]

    def clone(self, path: bytes, offset: int, length: int, source: Thing, start: int) -> None:
        into = self.at(path, "file")
        if start + length > len(source.data) or (into is source and abs(start - offset) < length):
            raise Refused
        self.write(path, offset, bytes(source.data[start : start + length]))


def view(tree: Tree) -> dict[bytes, tuple[object, ...]]:
    """All of a tree that a user could see."""
    found: dict[bytes, tuple[object, ...]] = {}
    names: dict[int, bytes] = {}
    for path, node in tree.walk():
        if path:
            first = names.setdefault(node.group, path) if node.group else path
            data = b"".join(tree.read(node)) if node.kind == "file" else b""
            found[path] = _shown(node.kind, node.mode, node, dict(node.xattrs), data, first)
    return found


def expected(model: Model) -> dict[bytes, tuple[object, ...]]:
    """The same of a model."""
    found: dict[bytes, tuple[object, ...]] = {}
    firsts: dict[int, bytes] = {}
    for path, thing in sorted(model.things.items(), key=lambda item: item[0].split(b"/")):
        first = firsts.setdefault(id(thing), path)
        found[path] = _shown(thing.kind, thing.mode, thing, thing.xattrs, bytes(thing.data), first)
    return found


def _shown(
    kind: str, mode: int, of: Node | Thing, xattrs: dict[bytes, bytes], data: bytes, first: bytes
) -> tuple[object, ...]:
    return kind, mode, of.uid, of.gid, of.mtime_ns, tuple(sorted(xattrs.items())), data, of.target, of.rdev, first


def filled(vault: Vault, files: dict[bytes, bytes], *, at: int | None = None) -> Generation:
    """A generation of one volume `home` with these files over what there was: seconds after EPOCH, or one later than
    the newest. Directories are made as needed; b"" as content removes."""
    head = vault.head
    draft = vault.begin()
    editor = draft.volume("home", b"/home", base=head)
    for path, content in files.items():
        parts = path.split(b"/")[:-1]
        for depth in range(1, len(parts) + 1):
            editor.put(b"/".join(parts[:depth]), Node("dir"))
        if content:
            editor.put(path, Node("file", 0o644), [content])
        else:
            editor.unlink(path)
    seconds = at if at is not None else int((head.time - EPOCH).total_seconds()) + 1 if head else 0
    return draft.commit(EPOCH + timedelta(seconds=seconds), {"home": (f"token-{draft.number}", f"uuid-{draft.number}")})
