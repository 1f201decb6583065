"""What QEMU wrote to the host's file of a disk, and in which order, by its driver `blklogwrites`: put below qcow2, so
that replaying a part of it gives the file as it is after the host has lost power.

    log  = superblock, then entries of one sector each (sector, count, flags) with the data that was written behind it

Format: Documentation/admin-guide/device-mapper/log-writes.rst in the kernel's sources.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from limpet.vmm import command
from limpet.vmm.command import Arguments, Descriptors, MachineSpec

_SECTOR = 512
_MAGIC = 0x6A736677736872
_FLUSH, _DISCARD = 1 << 0, 1 << 2


def logged(log: Path, *, flushes: bool = True) -> Logged:
    """In place of `command_line`: the data disk's file is written through the log. `flushes` False: cache=unsafe."""
    log.touch()
    return Logged(log, flushes)


@dataclass(frozen=True)
class Logged:
    """The command line of a machine whose data disk is logged."""

    log: Path
    flushes: bool

    def __call__(self, spec: MachineSpec, inherited: Descriptors) -> Arguments:
        arguments = command.command_line(spec, inherited)
        for index, argument in enumerate(arguments):
            if argument == "-blockdev" and (node := json.loads(arguments[index + 1]))["node-name"] == _data(spec):
                unsafe = {} if self.flushes else {"cache": {"direct": False, "no-flush": True}}
                cache = {"cache": node["file"]["cache"], **unsafe}  # as limpet has it
                node["file"] = {"driver": "blklogwrites", "file": node["file"], **cache, "log-sector-size": 512,
                                "log": {"driver": "file", "filename": str(self.log)}}  # fmt: skip
                arguments[index + 1] = json.dumps({**node, **unsafe})
        return arguments


def _data(spec: MachineSpec) -> str:
    return command.node(spec.data_disk)


@dataclass(frozen=True)
class Entry:
    """`end`: where in the log it ends; `data`: where in the log what was written is."""

    start: int
    length: int
    flags: int
    data: int
    end: int

    @property
    def flush(self) -> bool:
        return bool(self.flags & _FLUSH)


class BlockLog:
    """A log that is not written to any more. A position is a size that its file had at some moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries = list(self._read())

    def _read(self) -> Iterator[Entry]:
        size = self._path.stat().st_size
        with self._path.open("rb") as file:
            magic, _, _, sector = struct.unpack_from("<QQQI", file.read(_SECTOR))
            # the superblock is written at the first flush
            assert (magic, sector) in ((_MAGIC, _SECTOR), (0, 0)), "no log of blklogwrites"
            offset = _SECTOR
            while offset + _SECTOR <= size:
                file.seek(offset)
                start, count, flags, _ = struct.unpack("<QQQQ", file.read(32))
                if (start, count, flags) == (0, 0, 0):  # not written yet when QEMU was killed
                    return
                data, length = offset + _SECTOR, count * _SECTOR
                offset = data + (0 if flags & _DISCARD else length)
                if offset > size:
                    return
                yield Entry(start * _SECTOR, length, flags, data, offset)

    def survivors(self, position: int, choice: random.Random | None = None) -> list[Entry]:
        """What is on the disk when the power went at `position`: everything before the last flush, and of the rest
        nothing, or what chance left of it, in order."""
        known = [entry for entry in self.entries if entry.end <= position]
        last = max((number for number, entry in enumerate(known) if entry.flush), default=-1)
        rest = known[last + 1 :] if choice is not None else []
        return known[: last + 1] + [entry for entry in rest if choice is not None and choice.random() < 0.5]

    def replay(self, base: Path, target: Path, entries: list[Entry]) -> None:
        """Make `target` what `base` becomes by these."""
        shutil.copyfile(base, target)
        with self._path.open("rb") as log, target.open("r+b") as file:
            for entry in entries:
                log.seek(entry.data)
                file.seek(entry.start)
                file.write(bytes(entry.length) if entry.flags & _DISCARD else log.read(entry.length))
