"""A generation's tree as a directory on the host, beside the one that it is to replace.

Files that did not change are hard links of the published ones; the others are written from the vault, which verifies
every byte. Files belong to whoever the published directory belongs to; what is published can always be listed. Set-id
bits, devices, sockets and pipes of the guest are left out and counted; those of the host, which were never seeded, stay
where they are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from limpet import durable
from limpet.errors import FailedPrecondition, InsufficientSpace
from limpet.services.payloads.marker import NAME, is_ours
from limpet.services.payloads.scanning import Scan, Stamp
from limpet.vault.nodes import Node
from limpet.vault.restoring import TreeWriter
from limpet.vault.trees import Tree

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_UNFIT = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EOPNOTSUPP, errno.EFBIG)


@dataclass
class Built:
    """What building took: files that were taken over, by path; how many the tree has; what was left out of it."""

    files: int = 0
    linked: Mapping[bytes, Stamp] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def build(tree: Tree, base: Tree | None, published: Path, seen: Scan, target: Path) -> Built:
    """Build `tree` in the empty directory `target`. `published` is the directory that `seen` is the scan of, and `base`
    the tree that it was published from: without it files are taken over only when every byte is equal.

    Raises InsufficientSpace, FailedPrecondition for what this file system cannot hold, Damaged, OSError."""
    top = tree.lookup(b"")
    assert top is not None  # every tree has a root
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        builder = _Builder(tree, base, published, seen, target, fd, top)
        builder.directory(b"")
        builder.own_top()
    except OSError as error:
        raise _explained(error, published) from error
    finally:
        os.close(fd)
    return Built(builder.files, builder.linked, builder.left_out)


class _Builder(TreeWriter):
    def __init__(
        self, tree: Tree, base: Tree | None, published: Path, seen: Scan, target: Path, root: int, top: Node
    ) -> None:
        super().__init__(tree, root, top, lambda files, size: None)
        self.linked: dict[bytes, Stamp] = {}
        self._base_changes = None if base is None else {path for path, _, _ in base.compare(tree)}
        self._published, self._source, self._seen, self._target = published, os.fsencode(published), seen, target
        self._was = published.stat()

    def entry(self, parent: int, name: bytes, place: bytes, node: Node) -> None:
        if is_ours(name):
            return
        if node.kind == "fifo":
            self.left_out["pipes"] += 1
        elif node.kind != "file":
            super().entry(parent, name, place, node)
        elif self._link(parent, name, place, node):
            self._count(0)
        elif self._take_over(parent, name, place, node):
            self._count(node.size)
        else:
            super().entry(parent, name, place, node)

    def make_directory(self, parent: int, name: bytes) -> bool:
        return not is_ours(name) and super().make_directory(parent, name)

    def make_symlink(self, parent: int, name: bytes, place: bytes, node: Node) -> None:
        if not self._take_over(parent, name, place, node):
            super().make_symlink(parent, name, place, node)
            if os.geteuid() == 0:
                os.chown(name, self._was.st_uid, self._was.st_gid, dir_fd=parent, follow_symlinks=False)

    def added(self) -> None:
        """The marker, and what is the host's own."""
        durable.link(self._published / NAME, self._target / NAME)
        for path, stamp in self._seen.stamps.items():
            if not (stamp.is_plain or stamp.is_directory) and self._leads_nowhere_else(path):
                with contextlib.suppress(FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError):
                    self._share(path, self._root, path)
                    self.linked[path] = stamp

    def _leads_nowhere_else(self, path: bytes) -> bool:
        """Whether what contains a path is a directory of the tree, not by way of a symlink that the guest made."""
        parent = self._tree.lookup(path.rpartition(b"/")[0])
        return parent is not None and parent.kind == "dir"

    def dress(self, fd: int, node: Node) -> None:
        if os.geteuid() == 0:
            os.fchown(fd, self._was.st_uid, self._was.st_gid)
        super().dress(fd, node)

    def mode(self, node: Node) -> int:
        return super().mode(node) | (0o700 if node.kind == "dir" else 0)

    def own_top(self) -> None:
        """The directory itself is as its owner has it."""
        os.fchmod(self._root, stat.S_IMODE(self._was.st_mode))

    def _take_over(self, parent: int, name: bytes, place: bytes, node: Node) -> bool:
        """Link what is published already, if it is this."""
        stamp = self._seen.stamps.get(place)
        if stamp is None or stat.S_IFMT(stamp.mode) != (stat.S_IFREG if node.kind == "file" else stat.S_IFLNK):
            return False
        if place in self._base_changes if self._base_changes is not None else not self._equal(place, node, stamp):
            return False
        try:
            self._share(place, parent, name)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EMLINK):
                return False  # another user's, or linked too often
            raise
        self.linked[place] = stamp
        return True

    def _share(self, place: bytes, parent: int, name: bytes) -> None:
        os.link(os.path.join(self._source, place), name, dst_dir_fd=parent, follow_symlinks=False)

    def _equal(self, place: bytes, node: Node, stamp: Stamp) -> bool:
        """Whether the published file is the tree's in everything that is published."""
        source = os.path.join(self._source, place)
        if node.kind == "symlink":
            return os.readlink(source) == node.target
        known = (stamp.size, stamp.mtime_ns, stamp.mode & 0o777)
        if known != (node.size, node.mtime_ns, node.mode & 0o777):
            return False
        if sum(length for _, length in self._tree.extents(node)) < node.size:
            return False  # holes cost nothing to write, and may take for ever to read
        try:
            fd = os.open(source, _READ)
        except PermissionError:  # the guest's mode, which is its owner's here, too
            return False
        with open(fd, "rb") as file:
            return all(file.read(len(piece)) == piece for piece in self._tree.read(node)) and not file.read(1)


def _explained(error: OSError, published: Path) -> Exception:
    where = os.fsdecode(error.filename) if isinstance(error.filename, (bytes, str)) else str(published)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientSpace(f"no space left to publish to {published}", hint="free some space; it is tried again")
    if error.errno in _UNFIT:
        return FailedPrecondition(f"this host's file system cannot hold {where}: {error.strerror}")
    return error
