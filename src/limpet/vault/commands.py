"""What a send stream can say. What changes a tree has its fields in the order of the arguments of the method of that
name of `editing.Editor`."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from limpet.vault.nodes import Kind


class Subvol(NamedTuple):
    """The first command of a full stream."""

    path: bytes
    uuid: str
    ctransid: int


class Snapshot(NamedTuple):
    """The first command of an incremental stream; `parent` is the UUID of what it starts from."""

    path: bytes
    uuid: str
    ctransid: int
    parent: str


class Mkfile(NamedTuple):
    path: bytes


class Mkdir(NamedTuple):
    path: bytes


class Mknod(NamedTuple):
    """`kind`: char, block, fifo, socket. `rdev` as os.makedev makes it."""

    path: bytes
    kind: Kind
    mode: int
    rdev: int


class Symlink(NamedTuple):
    path: bytes
    target: bytes


class Rename(NamedTuple):
    path: bytes
    to: bytes


class Link(NamedTuple):
    path: bytes
    existing: bytes


class Unlink(NamedTuple):
    path: bytes


class Rmdir(NamedTuple):
    path: bytes


class SetXattr(NamedTuple):
    path: bytes
    name: bytes
    value: bytes


class RemoveXattr(NamedTuple):
    path: bytes
    name: bytes


class Write(NamedTuple):
    path: bytes
    offset: int
    data: bytes


class Clone(NamedTuple):
    """`source` is a path in the subvolume `uuid`: this stream's own as it is by now, or its parent."""

    path: bytes
    offset: int
    length: int
    source: bytes
    source_offset: int
    uuid: str


class Truncate(NamedTuple):
    path: bytes
    size: int


class Chmod(NamedTuple):
    path: bytes
    mode: int


class Chown(NamedTuple):
    path: bytes
    uid: int
    gid: int


class Utimes(NamedTuple):
    path: bytes
    mtime_ns: int


class UpdateExtent(NamedTuple):
    """In place of Write in a stream without data (BTRFS_SEND_FLAG_NO_FILE_DATA)."""

    path: bytes
    offset: int
    size: int


class End(NamedTuple):
    """The last command; the parser keeps it to itself."""


Command: TypeAlias = (
    Subvol | Snapshot | Mkfile | Mkdir | Mknod | Symlink | Rename | Link | Unlink | Rmdir | SetXattr | RemoveXattr
    | Write | Clone | Truncate | Chmod | Chown | Utimes | UpdateExtent
)  # fmt: skip
