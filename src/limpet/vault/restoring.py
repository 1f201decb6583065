"""A generation's files on the host: every byte verified while it is written, nothing shown before all of it is there.

    staging directory beside the target → files, then symlinks, then the directories' modes and times → syncfs
    → rename to the target → fsync of its directory

The tree was made by a guest and is written by a user who may be root. So owners are not given away, set-id bits,
devices, sockets and the attributes that systems trust are left out (and counted), and nothing is created through a
path that a symlink could be part of: each directory is entered before there is any symlink in the staging directory.
A crash leaves a staging directory, which the next restore beside it removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.errors import BadRequest, FailedPrecondition, InsufficientSpace, NotFound
from limpet.vault.nodes import Node
from limpet.vault.packing import pack
from limpet.vault.trees import Tree

__all__ = ["Progress", "Restored", "pack", "restore", "restore_all"]

Progress = Callable[[int, int], None]  # files and bytes so far

_STAGING = ".limpet-restore-"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_REPORT_EVERY = 500  # files


class Restored(NamedTuple):
    """`files`: each name that is no directory. `bytes`: the sizes of files, those of hard links once. `left_out`: how
    many of each kind of thing the host was not given."""

    files: int
    bytes: int
    left_out: dict[str, int]


def restore(tree: Tree, path: bytes, to: Path, *, progress: Progress | None = None) -> Restored:
    """Make the directory `to`, which must be missing or empty, hold what the tree has at `path`: a directory's content,
    or a single file under its own name. It is there as a whole and durable when this returns, or not at all.

    Raises NotFound, BadRequest for a target that will not do, Damaged, InsufficientSpace, FailedPrecondition."""
    return restore_all([(tree, path, b"")], to, progress=progress)


def restore_all(parts: Sequence[tuple[Tree, bytes, bytes]], to: Path, *, progress: Progress | None = None) -> Restored:
    """As `restore`, of several trees at once: (tree, path in it, where below `to`), those around others before them.
    One whose place the trees around it have taken, by a symlink, a file or entries of their own, is left out."""
    to = _checked_target(to)
    done = Restored(0, 0, {})
    with _staged(to.parent) as (staging, root):
        try:
            for tree, path, place in parts:
                done = _restore_part(tree, path, root, place, done, progress or (lambda files, size: None))
            crashpoint("vault.restore.publish.before")
            durable.sync_filesystem(to.parent)  # not of the staging directory: its mode may be that of a closed one
            durable.rename(staging, to)
            crashpoint("vault.restore.publish.after")
            durable.sync_directory(to.parent)
        except OSError as error:
            raise _explained(error, to) from error
    return done


def _restore_part(tree: Tree, path: bytes, root: int, place: bytes, done: Restored, progress: Progress) -> Restored:
    """`done` and what this part adds to it."""
    node = tree.lookup(path)
    if node is None:
        raise NotFound(f"there is no {os.fsdecode(path)!r} in this generation")
    left_out = Counter(done.left_out)
    with _vacant(root, place) as fd:
        if fd is None:
            left_out["volumes whose place is taken"] += 1
            return done._replace(left_out=dict(left_out))
        writer = TreeWriter(tree, fd, node, lambda files, size: progress(done.files + files, done.bytes + size))
        writer.directory(path) if node.kind == "dir" else writer.single(path)
    done = Restored(done.files + writer.files, done.bytes + writer.bytes, dict(left_out + writer.left_out))
    progress(done.files, done.bytes)
    return done


@contextlib.contextmanager
def _vacant(root: int, place: bytes) -> Iterator[int | None]:
    """A descriptor of the empty directory at `place` below `root`, made with those above it where they are missing;
    never through a symlink. None when something else is there."""
    fd = os.dup(root)
    try:
        for name in filter(None, place.split(b"/")):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=fd)
            below = os.open(name, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        with os.scandir(fd) as entries:
            vacant = next(entries, None) is None
        if vacant:
            os.fchmod(fd, 0o700)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            raise
        vacant = False
    try:
        yield fd if vacant else None
    finally:
        os.close(fd)


def _checked_target(to: Path) -> Path:
    """The real path of a target that is missing or an empty directory."""
    to = Path(os.path.realpath(to))
    if not to.parent.is_dir():
        raise BadRequest(f"{to.parent} is no directory", hint=f"make it first: mkdir -p {to.parent}")
    if os.path.lexists(to):
        if not to.is_dir():
            raise BadRequest(f"{to} is there and is no directory", hint="restore into a new directory")
        if any(to.iterdir()):
            raise BadRequest(f"{to} is not empty", hint="restore into a new directory: nothing is ever overwritten")
        if os.path.ismount(to):
            raise BadRequest(f"{to} is a mount point", hint=f"restore into a new directory below it: {to}/restored")
    return to


@contextlib.contextmanager
def _staged(parent: Path) -> Iterator[tuple[Path, int]]:
    """A locked staging directory in `parent` and its descriptor; what is left of it at the end is removed."""
    _sweep(parent)
    try:
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=parent))
    except OSError as error:
        raise _explained(error, parent) from error
    fd = os.open(staging, _DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield staging, fd
    except BaseException:
        if staging.exists():
            _discard(staging, fd)
        raise
    finally:
        os.close(fd)


def _sweep(parent: Path) -> None:
    """Remove what a crash left of this user's restores: staging directories that nobody holds locked."""
    for stray in parent.glob(f"{_STAGING}*"):
        with contextlib.suppress(OSError):
            fd = os.open(stray, _DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_uid == os.geteuid():
                    _discard(stray, fd)
            finally:
                os.close(fd)


def _discard(staging: Path, root: int) -> None:
    """Delete a staging directory as far as possible. Not by recursion: a guest's tree may be 2,000 directories deep.
    And nothing through a directory of another user, who could put a symlink in its place."""
    found, pending = [], [b""]
    with contextlib.suppress(OSError):
        while pending:
            place = pending.pop()
            found.append(place)
            os.chmod(place or b".", 0o700, dir_fd=root)
            with _entered(root, place) as fd, os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(name, dir_fd=fd)
                    elif entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                        pending.append(_join(place, name))
        for place in reversed(found[1:]):
            os.rmdir(place, dir_fd=root)
        staging.rmdir()


class TreeWriter:
    """Writes one tree below one descriptor. Publishing (services/payloads/building.py) shares and owns files besides:
    it overrides `entry`, `make_directory`, `make_symlink`, `added`, `dress` and `mode`."""

    def __init__(self, tree: Tree, root: int, top: Node, progress: Progress) -> None:
        self.files = self.bytes = 0
        self.left_out: Counter[str] = Counter()
        self._tree, self._root, self._progress = tree, root, progress
        self._owner = top.uid, top.gid
        self._linked: dict[int, bytes] = {}  # hard-link group → the name that is there already
        self._symlinks: list[tuple[bytes, Node]] = []

    def single(self, path: bytes) -> None:
        """The entry at `path` under its own name."""
        node = self._tree.lookup(path)
        assert node is not None  # the caller has looked
        name = path.rpartition(b"/")[2]
        self.entry(self._root, name, name, node)
        self._make_symlinks()

    def directory(self, path: bytes) -> None:
        """The content of the directory at `path`."""
        top = self._tree.lookup(path)
        assert top is not None  # the caller has looked
        directories = [(b"", top)]
        for place, directory in directories:  # which grows
            with _entered(self._root, place) as fd:
                for name, node in self._tree.children(directory):
                    below = _join(place, name)
                    if node.kind != "dir":
                        self.entry(fd, name, below, node)
                    elif self.make_directory(fd, name):
                        directories.append((below, node))
        self._make_symlinks()
        self.added()
        for place, node in reversed(directories):  # last, since what comes into them changes their times
            with _entered(self._root, place) as fd:
                self.dress(fd, node)

    def entry(self, parent: int, name: bytes, place: bytes, node: Node) -> None:
        """Anything but a directory. `place` is relative to the root."""
        if node.kind in ("char", "block", "socket"):
            self.left_out["sockets" if node.kind == "socket" else "devices"] += 1
        elif node.kind == "symlink":
            self._symlinks.append((place, node))
        elif self._link(parent, name, place, node):
            self._count(0)
        elif node.kind == "fifo":
            os.mkfifo(name, 0o600, dir_fd=parent)
            os.chmod(name, self.mode(node), dir_fd=parent)
            os.utime(name, ns=(node.mtime_ns, node.mtime_ns), dir_fd=parent, follow_symlinks=False)
            self._lose(node.xattrs)
            self._count(0)
        elif self._file(parent, name, node):
            self._count(node.size)

    def _link(self, parent: int, name: bytes, place: bytes, node: Node) -> bool:
        """Make it one more name of what is there already, if it is and if the file system can; False when not."""
        if not node.group:
            return False
        first = self._linked.setdefault(node.group, place)
        if first is place:
            return False
        try:
            os.link(first, name, src_dir_fd=self._root, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:  # the first one was left out
            return False
        except OSError as error:
            if error.errno not in (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP):
                raise
            self.left_out["hard links"] += 1
            return False
        return True

    def _file(self, parent: int, name: bytes, node: Node) -> bool:
        fd = os.open(name, _CREATE, 0o600, dir_fd=parent)
        try:
            self._fill(fd, node)
            self.dress(fd, node)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            os.unlink(name, dir_fd=parent)
            self.left_out["files too large for this file system"] += 1
            return False
        finally:
            os.close(fd)
        return True

    def _fill(self, fd: int, node: Node) -> None:
        """Data where there is data, holes where there are holes."""
        end = 0
        for offset, length in self._tree.extents(node):
            if offset != end:
                os.lseek(fd, offset, os.SEEK_SET)
            for chunk in self._tree.read(node, offset, length):
                written = os.write(fd, chunk)
                while written < len(chunk):
                    written += os.write(fd, chunk[written:])
            end = offset + length
        if end != node.size:
            os.ftruncate(fd, node.size)

    def _make_symlinks(self) -> None:
        for place, node in self._symlinks:
            parent, _, name = place.rpartition(b"/")
            with _entered(self._root, parent) as fd:
                if not self._link(fd, name, place, node):
                    self.make_symlink(fd, name, place, node)
            self._count(0)

    def make_directory(self, parent: int, name: bytes) -> bool:
        """Make an empty directory; whether it is to be filled."""
        os.mkdir(name, 0o700, dir_fd=parent)
        return True

    def make_symlink(self, parent: int, name: bytes, place: bytes, node: Node) -> None:
        """Make a symlink; there are no files to come. `place` is relative to the root."""
        os.symlink(node.target, name, dir_fd=parent)
        os.utime(name, ns=(node.mtime_ns, node.mtime_ns), dir_fd=parent, follow_symlinks=False)
        self._note_owner(node)
        self._lose(node.xattrs)

    def added(self) -> None:
        """Everything of the tree is there; directories do not have their modes and times yet."""

    def dress(self, fd: int, node: Node) -> None:
        """Attributes, mode and times of an open file or directory."""
        for key, value in node.xattrs:
            try:
                if not key.startswith(b"user."):
                    raise PermissionError
                os.setxattr(fd, key, value)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT) and not _limited_attributes(fd):
                    raise
                self.left_out["attributes"] += 1
        os.fchmod(fd, self.mode(node))
        os.utime(fd, ns=(node.mtime_ns, node.mtime_ns))

    def mode(self, node: Node) -> int:
        self._note_owner(node)
        if node.mode & (stat.S_ISUID | stat.S_ISGID):
            self.left_out["set-id bits"] += 1
        return node.mode & 0o1777

    def _note_owner(self, node: Node) -> None:
        if (node.uid, node.gid) != self._owner:
            self.left_out["owners"] += 1

    def _lose(self, xattrs: tuple[tuple[bytes, bytes], ...]) -> None:
        """Only files and directories can have the attributes of users."""
        if xattrs:
            self.left_out["attributes"] += len(xattrs)

    def _count(self, size: int) -> None:
        self.files += 1
        self.bytes += size
        if self.files % _REPORT_EVERY == 0:
            self._progress(self.files, self.bytes)


@contextlib.contextmanager
def _entered(root: int, place: bytes) -> Iterator[int]:
    """A descriptor of a directory below `root`. `place` has no symlinks in it, or else this fails for its last part."""
    fd = os.open(place or b".", _DIRECTORY, dir_fd=root)
    try:
        yield fd
    finally:
        os.close(fd)


def _join(directory: bytes, name: bytes) -> bytes:
    return b"%b/%b" % (directory, name) if directory and name else directory or name


def _limited_attributes(fd: int) -> bool:
    """Whether there is room on the disk: then it is the file that has no more room for attributes (as ext4 says it)."""
    return os.fstatvfs(fd).f_bavail > 0


def _explained(error: OSError, to: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientSpace(
            f"no space left to restore to {to}", hint="free some space, or restore to another disk"
        )
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return BadRequest(f"{to} is not empty any more", hint="restore into a new directory")
    name = "" if error.filename is None else f" {os.fsdecode(error.filename)!r}"
    return FailedPrecondition(f"cannot restore{name} to {to}: {error.strerror}", hint="restore to another directory")
