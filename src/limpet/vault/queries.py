"""What the vault can tell: the history of a path, the difference between two generations, what one of them holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Literal

from limpet.errors import BadRequest, NotFound
from limpet.models import GenerationInfo, PathChange, PathVersion, VaultEntry
from limpet.vault.generations import Generation
from limpet.vault.nodes import Node
from limpet.vault.trees import Tree
from limpet.vault.vault import Vault

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def history(vault: Vault) -> list[GenerationInfo]:
    """The kept generations, ascending."""
    return [generation.info for generation in vault.generations()]


def versions(vault: Vault, path: bytes) -> list[PathVersion]:
    """The states that an absolute guest path was in, ascending: one for each generation in which it, or something below
    it, is not as it was before. Raises NotFound when it never was."""
    found: list[PathVersion] = []
    before: _Spot | None = None
    for generation in vault.generations():
        spot = _Spot.of(generation, path)
        if change := _change(before, spot):
            found.append(_version(generation, change, spot))
        before = spot
    if not found:
        raise NotFound(f"{os.fsdecode(path)} is in no generation", hint="see which there are: limpet history NAME")
    return found


def diff(before: Generation, after: Generation) -> Iterator[PathChange]:
    """The paths that differ between two generations, volume by volume."""
    for name in sorted({*before.volumes, *after.volumes}):
        mount = (after.volumes.get(name) or before.volumes[name]).mount
        for path, old, new in _differences(before, after, name):
            yield PathChange(
                change=_kind_of_change(old, new), path=_below(mount, path), before=_size(old), after=_size(new)
            )


def entries(generation: Generation, path: bytes) -> Iterator[VaultEntry]:
    """What a directory holds, by name; anything else: itself. Raises NotFound."""
    tree, relative, node = find(generation, path)
    if node.kind != "dir":
        yield entry(path, node)
        return
    for name, below in tree.entries(relative):
        yield entry(path.rstrip(b"/") + b"/" + name, below)


def content(generation: Generation, path: bytes) -> tuple[Node, Iterator[bytes]]:
    """A file's record and its bytes. Raises NotFound, BadRequest for what has no content."""
    tree, _, node = find(generation, path)
    if node.kind != "file":
        hint = f"it leads to {os.fsdecode(node.target)}" if node.kind == "symlink" else "name a file"
        raise BadRequest(f"{os.fsdecode(path)} is no file but a {node.kind}", hint=hint)
    return node, tree.read(node)


def find(generation: Generation, path: bytes) -> tuple[Tree, bytes, Node]:
    """The tree that has an absolute guest path, the path in it, and its record. Raises NotFound."""
    volume, relative = generation.locate(path)
    tree = generation.tree(volume)
    node = tree.lookup(relative)
    if node is None:
        raise NotFound(
            f"there is no {os.fsdecode(path)} in generation {generation.number}",
            hint=f"see in which it is: limpet history NAME {os.fsdecode(path)}",
        )
    return tree, relative, node


def entry(path: bytes, node: Node) -> VaultEntry:
    """A record as the API shows it."""
    return VaultEntry(
        path=os.fsdecode(path),
        kind=node.kind,
        mode=node.mode,
        uid=node.uid,
        gid=node.gid,
        size=node.size,
        modified=_time(node),
        target=os.fsdecode(node.target) if node.kind == "symlink" else None,
    )


class _Spot:
    """Where one generation has a path."""

    def __init__(self, volume: str, tree: Tree, relative: bytes, node: Node) -> None:
        self.volume, self.tree, self.relative, self.node = volume, tree, relative, node

    @classmethod
    def of(cls, generation: Generation, path: bytes) -> _Spot | None:
        """None where it is not."""
        try:
            tree, relative, node = find(generation, path)
        except NotFound:
            return None
        return cls(generation.locate(path)[0], tree, relative, node)

    def same_as(self, other: _Spot) -> bool:
        """Whether it and everything below it is as it is there."""
        if (self.volume, self.relative) != (other.volume, other.relative):
            return False
        return next(self.tree.compare(other.tree, self.relative), None) is None


_Change = Literal["added", "changed", "removed"]


def _change(before: _Spot | None, after: _Spot | None) -> _Change | None:
    if before is None or after is None:
        return "added" if after else "removed" if before else None
    return None if before.same_as(after) else "changed"


def _version(generation: Generation, change: _Change, spot: _Spot | None) -> PathVersion:
    if spot is None:
        return PathVersion(generation=generation.number, time=generation.time, change=change, files=0, bytes=0)
    files, size = spot.tree.totals(spot.relative)
    return PathVersion(
        generation=generation.number,
        time=generation.time,
        change=change,
        files=files,
        bytes=size,
        mode=spot.node.mode,
        modified=_time(spot.node),
    )


def _differences(
    before: Generation, after: Generation, volume: str
) -> Iterator[tuple[bytes, Node | None, Node | None]]:
    """As Tree.compare; all of a volume that only one of them has."""
    if volume not in after.volumes:
        yield from ((path, node, None) for path, node in before.tree(volume).walk())
    elif volume not in before.volumes:
        yield from ((path, None, node) for path, node in after.tree(volume).walk())
    else:
        yield from before.tree(volume).compare(after.tree(volume))


def _kind_of_change(old: Node | None, new: Node | None) -> _Change:
    return "added" if old is None else "removed" if new is None else "changed"


def _size(node: Node | None) -> int | None:
    return node.size if node is not None and node.kind == "file" else None


def _below(mount: bytes, path: bytes) -> str:
    return os.fsdecode(mount.rstrip(b"/") + b"/" + path if path else mount)


def _time(node: Node) -> datetime:
    return _EPOCH + timedelta(microseconds=node.mtime_ns // 1000)
