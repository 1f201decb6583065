"""A generation as its guest saw it: one tree of absolute paths, put together of volumes at their mount points."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from datetime import datetime

from limpet import moments
from limpet.errors import BadRequest, NotFound
from limpet.models import VaultEntry, VaultListing
from limpet.vault import Generation, Tree, Vault, queries


@dataclass(frozen=True)
class Part:
    """What one volume has of a path: `path` in `tree` belongs at `place` below what was asked for; `mount` is where it
    is in the guest."""

    tree: Tree
    path: bytes
    place: bytes
    mount: bytes


def guest_path(text: str) -> bytes:
    """An absolute guest path in its plainest form. Raises BadRequest."""
    if not text.startswith("/") or "\0" in text or ".." in text.split("/"):
        raise BadRequest(f"{text!r} is no absolute path in the guest", hint="for example /home/user/notes.txt")
    return os.fsencode(posixpath.normpath("/" + text.lstrip("/")))


def generation_at(vault: Vault, name: str, at: str | None) -> Generation:
    """The newest generation, or the one that a number or a time means. Raises NotFound, BadRequest, Damaged."""
    if at is not None:
        meant = moments.parse(at, datetime.now().astimezone())
        return vault.generation(meant) if isinstance(meant, int) else vault.at(meant)
    if vault.head is None:
        raise NotFound(f"{name} has no generation yet", hint=f"limpet status {name}")
    return vault.head


def parts(generation: Generation, path: bytes) -> list[Part]:
    """The volumes that have something of a path, outer ones first. Raises NotFound when none has."""
    found = list[Part]()
    above = _volume_of(generation, path)
    if above is not None:
        tree, relative, _ = queries.find(generation, path)
        found.append(Part(tree, relative, b"", path))
    for name, volume in sorted(generation.volumes.items(), key=lambda item: item[1].mount):
        if _below(volume.mount, path):
            place = volume.mount[len(path.rstrip(b"/")) + 1 :]
            found.append(Part(generation.tree(name), b"", place, volume.mount))
    if not found:
        mounts = ", ".join(sorted(os.fsdecode(volume.mount) for volume in generation.volumes.values()))
        raise NotFound(f"{os.fsdecode(path)} is not kept", hint=f"what is kept: {mounts or 'nothing yet'}")
    return found


def listing(generation: Generation, path: bytes) -> VaultListing:
    """What a path is and what it holds; above the volumes there are only the directories that lead to them."""
    if _volume_of(generation, path) is not None:
        _, _, node = queries.find(generation, path)
        entry = queries.entry(path, node)
        entries = list(queries.entries(generation, path)) if node.kind == "dir" else []
    else:
        below = [part.mount for part in parts(generation, path)]
        depth = len(path.rstrip(b"/").split(b"/"))
        names = sorted({b"/".join(mount.split(b"/")[: depth + 1]) for mount in below})
        entry = _directory(path, generation.time)
        entries = [_directory(name, generation.time) for name in names]
    return VaultListing(generation=generation.number, time=generation.time, entry=entry, entries=entries)


def _volume_of(generation: Generation, path: bytes) -> str | None:
    """The volume that a path is in, or None above them all."""
    within = [
        (volume.mount, name)
        for name, volume in generation.volumes.items()
        if path == volume.mount or _below(path, volume.mount)
    ]
    return max(within)[1] if within else None


def _below(path: bytes, directory: bytes) -> bool:
    return path != directory and path.startswith(directory.rstrip(b"/") + b"/")


def _directory(path: bytes, time: datetime) -> VaultEntry:
    return VaultEntry(path=os.fsdecode(path), kind="dir", mode=0o755, uid=0, gid=0, size=0, modified=time)
