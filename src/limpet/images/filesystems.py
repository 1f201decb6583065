"""What a finished disk must begin with: superblocks that say "this file system was left in order"."""

from __future__ import annotations

import struct
from pathlib import Path

# Offsets: include/uapi/linux/btrfs_tree.h and fs/ext4/ext4.h in the kernel's sources
_EXT4_SUPERBLOCK, _EXT4_MAGIC = 1024, 0xEF53
_EXT4_CLEAN, _EXT4_ERRORS, _EXT4_NEEDS_RECOVERY = 1, 2, 4
_BTRFS_SUPERBLOCK, _BTRFS_MAGIC = 0x10000, b"_BHRfS_M"


def problem(path: Path, disk: str) -> str | None:
    """What is wrong with the file system on a raw disk (`root`: ext4, `data`: Btrfs); None when it was unmounted in
    order. Looks at the superblock only, which is data from a guest: nothing here trusts it. Raises OSError."""
    with path.open("rb") as file:
        if disk == "root":
            file.seek(_EXT4_SUPERBLOCK)
            return _ext4(file.read(1024))
        file.seek(_BTRFS_SUPERBLOCK)
        return _btrfs(file.read(4096))


def _ext4(superblock: bytes) -> str | None:
    if len(superblock) < 1024 or struct.unpack_from("<H", superblock, 0x38)[0] != _EXT4_MAGIC:
        return "there is no ext4 file system on it"
    (state,) = struct.unpack_from("<H", superblock, 0x3A)
    (incompatible,) = struct.unpack_from("<I", superblock, 0x60)
    if state & _EXT4_ERRORS:
        return "its ext4 file system is marked as damaged"
    if not state & _EXT4_CLEAN or incompatible & _EXT4_NEEDS_RECOVERY:
        return "its ext4 file system was not unmounted"
    return None


def _btrfs(superblock: bytes) -> str | None:
    if superblock[0x40:0x48] != _BTRFS_MAGIC:
        return "there is no Btrfs file system on it"
    (log,) = struct.unpack_from("<Q", superblock, 0x60)
    return "its Btrfs file system was not unmounted" if log else None
