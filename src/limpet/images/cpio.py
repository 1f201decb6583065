"""Writer of cpio archives in the "newc" format, as the Linux kernel unpacks them into its first root file system.

Format: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's sources. An archive is a function of
its entries alone (no times, no owners, no inode numbers of the host), so equal inputs give equal bytes.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

_MAGIC = "070701"
_TRAILER = "TRAILER!!!"


@dataclass
class Archive:
    """Entries in the order in which they were added; a directory must come before what is in it."""

    _parts: list[bytes] = field(default_factory=list)
    _count: int = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._add(path, stat.S_IFDIR | mode)

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        self._add(path, stat.S_IFREG | mode, content)

    def symlink(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A device node; writing one into an archive needs no privilege."""
        self._add(path, stat.S_IFCHR | mode, device=(major, minor))

    def to_bytes(self) -> bytes:
        """The whole archive with its trailer."""
        return b"".join((*self._parts, _entry(0, _TRAILER, 0, b"", (0, 0))))

    def _add(self, path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._count += 1
        self._parts.append(_entry(self._count, path.strip("/"), mode, content, device))


def _entry(inode: int, name: str, mode: int, content: bytes, device: tuple[int, int]) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(encoded), 0)
    header = (_MAGIC + "".join(f"{value:08x}" for value in fields)).encode() + encoded
    return _padded(header) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
