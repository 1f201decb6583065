"""A vault filled by send streams."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from limpet.vault import Generation, Node, Tree, Vault
from limpet.vault.applying import read, receive
from limpet.vault.commands import Snapshot, Subvol
from limpet.vault.sendstream import Limits
from tests.unit import streams_kit as kit

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
VOLUME, MOUNT = "home", b"/home"


def take(vault: Vault, stream: bytes, limits: Limits | None = None) -> Generation:
    """Make a generation of a stream; one with changes changes the newest generation. What fails is abandoned."""
    first = next(read([stream[:4096], b""]))
    assert isinstance(first, Subvol | Snapshot)
    parent = first.parent if isinstance(first, Snapshot) else None
    draft = vault.begin()
    try:
        editor = draft.volume(VOLUME, MOUNT, base=vault.head if parent else None)
        pieces = (stream[at : at + 60_000] for at in range(0, len(stream), 60_000))
        receive(editor, pieces, uuid=first.uuid, parent=parent, limits=limits)
        number = vault.head.number if vault.head else 0
        return draft.commit(NOON + timedelta(minutes=number), {VOLUME: (f"t{number}", first.uuid)})
    except BaseException:
        draft.abandon()
        raise


def vault_of(directory: Path, *streams: bytes) -> Vault:
    """A vault with a generation for each stream."""
    directory.mkdir(exist_ok=True)
    vault = Vault.open(directory / "vault")
    for stream in streams:
        take(vault, stream)
    return vault


def tree_of(directory: Path, *streams: bytes) -> Tree:
    """The tree after these streams."""
    head = vault_of(directory, *streams).head
    assert head is not None
    return head.tree(VOLUME)


def scenario(directory: Path, name: str, upto: int | None = None) -> Tree:
    """The tree after the steps of a recorded scenario."""
    last = kit.steps(name) - 1 if upto is None else upto
    return tree_of(directory, *(kit.stream(name, number) for number in range(last + 1)))


_FORMATS = {
    "file": stat.S_IFREG, "dir": stat.S_IFDIR, "symlink": stat.S_IFLNK, "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK, "char": stat.S_IFCHR, "block": stat.S_IFBLK,
}  # fmt: skip


def facts(tree: Tree) -> dict[bytes, dict[str, Any]]:
    """What a tree holds, as record.py tells it of a file system."""
    return {path: _facts(tree, node) for path, node in tree.walk()}


def _facts(tree: Tree, node: Node) -> dict[str, Any]:
    mode = 0o777 if node.kind == "symlink" else node.mode
    known: dict[str, Any] = {
        "mode": _FORMATS[node.kind] | mode, "uid": node.uid, "gid": node.gid, "mtime_ns": node.mtime_ns,
        "xattrs": {name.decode(): value.decode("latin-1") for name, value in node.xattrs},
    }  # fmt: skip
    if node.kind == "file":
        known |= {"size": node.size, "sha256": digest(node.size, data_of(tree, node))}
        if node.group:
            known["group"] = node.group
    elif node.kind == "symlink":
        known["target"] = node.target.decode("latin-1")
    elif node.kind in ("char", "block"):
        known["rdev"] = node.rdev
    return known


def data_of(tree: Tree, node: Node) -> Iterable[tuple[int, bytes]]:
    """The data of a file as (offset, bytes), without its holes."""
    for offset, length in tree.extents(node):
        for chunk in tree.read(node, offset, length):
            yield offset, chunk
            offset += len(chunk)


def digest(size: int, data: Iterable[tuple[int, bytes]]) -> str:
    """As record.py's: size and non-zero pages. Data begins at whole pages."""
    found = hashlib.sha256(size.to_bytes(8, "big"))
    for offset, chunk in data:
        for at in range(0, len(chunk), 4096):
            page = chunk[at : at + 4096]
            if page.strip(b"\0"):
                found.update((offset + at).to_bytes(8, "big") + page)
    return found.hexdigest()


def grouped(found: dict[bytes, dict[str, Any]]) -> tuple[dict[bytes, dict[str, Any]], set[frozenset[bytes]]]:
    """Facts without the numbers of hard-link groups, and which names belong together."""
    groups: dict[int, set[bytes]] = {}
    for path, known in found.items():
        if "group" in known:
            groups.setdefault(known["group"], set()).add(path)
    plain = {path: {k: v for k, v in known.items() if k != "group"} for path, known in found.items()}
    return plain, {frozenset(names) for names in groups.values() if len(names) > 1}


def on_disk(root: Path) -> dict[bytes, dict[str, Any]]:
    """The same facts of a directory of the host."""
    found: dict[bytes, dict[str, Any]] = {}
    top = os.fsencode(root)
    for directory, names, files in os.walk(top):
        for path in [directory] * (directory == top) + [os.path.join(directory, name) for name in names + files]:
            found[path[len(top) + 1 :]] = _lstat(path)
    return found


def _lstat(path: bytes) -> dict[str, Any]:
    status = os.lstat(path)
    known: dict[str, Any] = {
        "mode": status.st_mode, "uid": status.st_uid, "gid": status.st_gid, "mtime_ns": status.st_mtime_ns,
        "xattrs": {name: os.getxattr(path, name, follow_symlinks=False).decode("latin-1")
                   for name in os.listxattr(path, follow_symlinks=False)},
    }  # fmt: skip
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            known |= {"size": status.st_size, "sha256": digest(status.st_size, _data_in(file.fileno()))}
        if status.st_nlink > 1:
            known["group"] = status.st_ino
    elif stat.S_ISLNK(status.st_mode):
        known["target"] = os.readlink(path).decode("latin-1")
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        known["rdev"] = status.st_rdev
    return known


def _data_in(fd: int) -> Iterable[tuple[int, bytes]]:
    at, size = 0, os.fstat(fd).st_size
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA) // 4096 * 4096
        except OSError:
            return
        yield at, os.pread(fd, 4096, at)
        at += 4096
