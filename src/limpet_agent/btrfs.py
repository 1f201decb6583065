"""Btrfs as ioctls (linux/btrfs.h). No ctypes: its import costs 90 ms under emulation.

Arguments are bytearrays: for those, and only those, `fcntl.ioctl` lets other threads run meanwhile.
"""

from __future__ import annotations

import fcntl
import os
from struct import pack, pack_into, unpack_from

NO_FILE_DATA = 1  # of `send`: what changed, without the bytes (BTRFS_SEND_FLAG_NO_FILE_DATA)

_SUBVOL_CREATE, _SNAP_DESTROY, _SNAP_CREATE_V2 = 0x5000940E, 0x5000940F, 0x50009417
_GET_SUBVOL_INFO, _SEND = 0x81F8943C, 0x40489426
_ARGS_SIZE = 4096  # struct btrfs_ioctl_vol_args, and _v2
_INFO_SIZE, _INFO_UUID, _INFO_CTRANSID = 504, 296, 344  # struct btrfs_ioctl_get_subvol_info_args
_READ_ONLY = 1 << 1
_ROOT_INODE = 256  # of every subvolume


class Subvolume:
    """What the kernel knows of a subvolume."""

    __slots__ = ("ctransid", "ident", "uuid")

    def __init__(self, fd: int) -> None:
        answer = _info(fd)
        self.ident: int = unpack_from("=Q", answer)[0]
        self.ctransid: int = unpack_from("=Q", answer, _INFO_CTRANSID)[0]
        digits = answer[_INFO_UUID : _INFO_UUID + 16].hex()
        self.uuid = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def ctransid(fd: int) -> int:
    """The transaction that changed a subvolume last, on the disk already or not; data in the page cache, written to a
    file that was there before, counts from its writeback on. Raises OSError."""
    newest: int = unpack_from("=Q", _info(fd), _INFO_CTRANSID)[0]
    return newest


def _info(fd: int) -> bytearray:
    answer = bytearray(_INFO_SIZE)
    fcntl.ioctl(fd, _GET_SUBVOL_INFO, answer)
    return answer


def open_directory(path: str) -> int:
    """A descriptor of a directory that is no symbolic link. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def look(path: str) -> Subvolume:
    """The subvolume at `path`. Raises OSError."""
    fd = open_directory(path)
    try:
        return Subvolume(fd)
    finally:
        os.close(fd)


def subvolumes(directory: str) -> list[str]:
    """The names of the subvolumes right in `directory`, sorted."""
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if _is_subvolume(entry))


def _is_subvolume(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_ino == _ROOT_INODE


def create(directory: int, name: str) -> None:
    """Make an empty subvolume; it is on the disk when this returns. Raises OSError."""
    fcntl.ioctl(directory, _SUBVOL_CREATE, _args(pack("=q", 0), name))


def snapshot(source: int, directory: int, name: str) -> None:
    """Make a read-only snapshot of the subvolume `source`; it is on the disk when this returns. Raises OSError."""
    fcntl.ioctl(directory, _SNAP_CREATE_V2, _args(pack("=qQQ32x", source, 0, _READ_ONLY), name))


def destroy(directory: int, name: str) -> None:
    """Delete a subvolume or snapshot; its space comes back later. Raises OSError: EPERM while it is being sent,
    ENOTEMPTY while there are subvolumes in it."""
    fcntl.ioctl(directory, _SNAP_DESTROY, _args(pack("=q", 0), name))


def send(source: int, parent: int, pipe: int, flags: int) -> None:
    """Write how the read-only snapshot `source` comes about, from nothing or from the snapshot with the id `parent`,
    into a pipe. Blocks; ends with EPIPE when nobody will read it. Raises OSError."""
    from array import array

    # What the parent holds may be referred to (reflinks of its files are not sent as data).
    sources = array("Q", [parent] if parent else [])
    request = bytearray(72)  # struct btrfs_ioctl_send_args
    pack_into("=qQQQQ", request, 0, pipe, len(sources), sources.buffer_info()[0] if sources else 0, parent, flags)
    fcntl.ioctl(source, _SEND, request)


def _args(head: bytes, name: str) -> bytearray:
    return bytearray((head + os.fsencode(name)).ljust(_ARGS_SIZE, b"\0"))
