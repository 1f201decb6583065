"""Trees that were the host directory: kept for a while for readers that stand in them, then removed.

Whoever still has a file of such a tree open, or stands in it, may write there after it lost its name. That is noticed
before it is removed: what only this tree has is compared with what it was. An edited tree is never removed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from limpet import durable
from limpet.services.payloads.marker import NAME
from limpet.services.payloads.scanning import Scan, Stamp

KEEP_S = 30.0
_LONGEST_STEM = 200  # bytes: a name has at most 255
_LONGEST_S = 900.0  # also for a reader that stands in it


@dataclass
class Replaced:
    """`own`: the stamps of what no later tree shares; `times`: of its directories."""

    path: Path
    own: dict[bytes, Stamp] = field(default_factory=dict)
    times: dict[bytes, int] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, path: Path, seen: Scan, new: Scan, times: dict[bytes, int]) -> Replaced:
        """The tree at `path`, scanned as `seen`, which `new` took the place of."""
        return cls(
            path,
            {
                name: stamp for name, stamp in seen.stamps.items()
                if not stamp.is_directory and new.stamps.get(name) != stamp
            },
            times,
        )  # fmt: skip

    def due(self) -> bool:
        """Whether it was kept long enough and nobody stands in it."""
        age = time.monotonic() - self.since
        return age >= _LONGEST_S or (age >= KEEP_S and not _occupied(self.path))

    def expire(self) -> None:
        """It need not be kept for readers any longer."""
        self.since -= _LONGEST_S

    def edited(self) -> bool:
        """Whether somebody wrote there since it was replaced."""
        root = os.fsencode(self.path)
        try:
            return any(
                os.lstat(os.path.join(root, name)).st_mtime_ns != before for name, before in self.times.items()
            ) or any(_stamp(os.lstat(os.path.join(root, name))) != stamp for name, stamp in self.own.items())
        except FileNotFoundError:
            return self.path.exists()
        except OSError:
            return True


def directory_times(path: Path, seen: Scan) -> dict[bytes, int]:
    """When something last came or went in each directory of a tree; one that is gone is left out."""
    root, times = os.fsencode(path), {}
    for name in (b"", *(name for name, stamp in seen.stamps.items() if stamp.is_directory)):
        with contextlib.suppress(OSError):
            times[name] = os.lstat(os.path.join(root, name)).st_mtime_ns
    return times


def keep_aside(path: Path, directory: Path) -> Path:
    """Give a tree a name that its owner finds, beside the directory that it was; where. It is no payload any more."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    stem, number = os.fsdecode(os.fsencode(directory.name)[:_LONGEST_STEM]), 0
    while os.path.lexists(place := directory.with_name(f"{stem}.saved-{stamp}" + f"-{number}" * (number > 0))):
        number += 1
    durable.unlink(path / NAME, missing_ok=True)
    durable.rename(path, place)
    durable.sync_directory(directory.parent)
    return place


def remove(path: Path) -> None:
    """Delete a tree, also one with directories that nobody may write to."""
    durable.erase(path)
    if os.geteuid() != 0 and path.is_dir() and not path.is_symlink():  # root may anyway, and must not be led astray
        for parent, _, _ in os.walk(path):
            with contextlib.suppress(OSError):
                os.chmod(parent, stat.S_IRWXU)
        durable.erase(path)


def _stamp(found: os.stat_result) -> Stamp:
    return Stamp(found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns)


def _occupied(path: Path) -> bool:
    """Whether the working directory of some process that we may ask is in there."""
    within = f"{path}/"
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{os.readlink(process / 'cwd')}/".startswith(within):
                    return True
    return False
