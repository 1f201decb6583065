"""What a host directory holds, as its inodes tell: enough to notice that somebody else wrote there (PAY-6).

A stamp is (mode, inode, size, mtime). An edit keeps all four only when it is made in place and its time is set back on
purpose. Directories have no size and time here: what comes and goes in them is seen by itself.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from limpet.errors import FailedPrecondition
from limpet.services.payloads.marker import NAME, is_ours


class Stamp(NamedTuple):
    """`mode` with the file's type. Of directories `size` and `mtime_ns` are 0."""

    mode: int
    inode: int
    size: int
    mtime_ns: int

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_plain(self) -> bool:
        """Whether it is a file or a symbolic link."""
        return stat.S_ISREG(self.mode) or stat.S_ISLNK(self.mode)


@dataclass
class Scan:
    """Everything below a directory by relative path, limpet's own files left out. `nested`: directories in it that
    have a marker."""

    device: int
    inode: int
    stamps: dict[bytes, Stamp] = field(default_factory=dict)
    nested: list[bytes] = field(default_factory=list)

    def digest(self) -> str:
        """Equal for equal scans of one directory, and of no others."""
        total = hashlib.sha256(b"%d %d\n" % (self.device, self.inode))
        for path in sorted(self.stamps):
            total.update(b"%d %d %d %d " % self.stamps[path] + path + b"\0")
        return total.hexdigest()

    def difference(self, later: Scan) -> str:
        """The first few paths that differ in a later scan, in words."""
        paths = self.stamps.keys() | later.stamps.keys()
        changed = sorted(path for path in paths if self.stamps.get(path) != later.stamps.get(path))
        names = ", ".join(path.decode(errors="backslashreplace") for path in changed[:3])
        return names + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def scan(directory: Path) -> Scan:
    """Look at everything below a directory. Raises FailedPrecondition for what cannot be looked at."""
    root = os.fsencode(directory)
    try:
        top = os.lstat(root)
        found = Scan(top.st_dev, top.st_ino)
        pending = [b""]
        while pending:
            _scan_one(root, pending.pop(), found, pending)
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename or directory
        raise FailedPrecondition(f"cannot read {where}: {error.strerror}", hint="chmod -R u+rwX on it") from None
    return found


def _scan_one(root: bytes, path: bytes, found: Scan, pending: list[bytes]) -> None:
    prefix = path + b"/" if path else b""
    try:
        entries = os.scandir(os.path.join(root, path))
    except FileNotFoundError:
        return  # gone since: the difference is seen
    with entries:
        for entry in entries:
            if is_ours(entry.name):
                if path and entry.name == NAME.encode():
                    found.nested.append(path)
                continue
            try:
                seen = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(seen.st_mode):
                found.stamps[prefix + entry.name] = Stamp(seen.st_mode, seen.st_ino, 0, 0)
                pending.append(prefix + entry.name)
            else:
                found.stamps[prefix + entry.name] = Stamp(seen.st_mode, seen.st_ino, seen.st_size, seen.st_mtime_ns)
