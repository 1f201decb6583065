"""A data disk that is not limpet's is refused, and nothing is written to it (RUN-4)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limpet import Client, errors, process
from limpet.client import Sandbox
from limpet.images import initramfs, oneoff, pieces, plan
from limpet.models import State
from limpet.paths import discover
from tests.vm.kit import chain, shell

pytestmark = pytest.mark.vm

_SIZE = 256 << 20  # bytes
_SUPERBLOCK, _LABEL = 64 << 10, 0x12B


@pytest.fixture(scope="module")
def owner(home: Path) -> Iterator[Sandbox]:
    """A stopped sandbox with something on its data disk."""
    with Client(home=home) as client:
        box = client.sandboxes.create("foreign", memory_mib=256, network="none")
        shell(box, "echo mine > /home/user/mine")
        box.stop()
        yield box
        box.remove(force=True, purge=True)


@pytest.fixture
def disk(home: Path, owner: Sandbox) -> Path:
    """The file of its data disk."""
    return chain(home, owner, "data")[0]


@contextlib.contextmanager
def exchanged(disk: Path, raw: Path, *, unreadable: bool = False) -> Iterator[None]:
    """Another content for a disk as long as the block lasts; `unreadable`: its second 64 KiB give an I/O error."""
    aside = disk.with_suffix(".aside")
    disk.rename(aside)
    try:
        to_qcow2(raw, disk, unreadable=unreadable)
        yield
    finally:
        aside.replace(disk)


def to_qcow2(raw: Path, disk: Path, *, unreadable: bool = False) -> None:
    compressed = ["-c"] if unreadable else []
    process.run_sync(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *compressed, str(raw), str(disk)], timeout=60)
    if not unreadable:
        return
    with disk.open("r+b") as file:  # a compressed cluster that is no deflate stream: docs/interop/qcow2.txt in QEMU

        def entry(table: int, index: int) -> int:
            file.seek(table + 8 * index)
            return int(struct.unpack(">Q", file.read(8))[0])

        l1_table = entry(40, 0)
        cluster = entry(entry(l1_table, 0) & 0x00FFFFFFFFFFFE00, _SUPERBLOCK >> 16)
        assert cluster >> 62 == 1  # compressed
        file.seek(cluster & ((1 << 54) - 1))
        file.write(b"\xff" * 16)


def digest(raw: Path) -> str:
    return hashlib.sha256(raw.read_bytes()).hexdigest()


def digest_of(disk: Path, work: Path) -> str:
    """Of what a guest reads from a qcow2 file."""
    process.run_sync(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(work)], timeout=60)
    return digest(work)


def ext4(raw: Path) -> None:
    process.run_sync(["mke2fs", "-q", "-F", "-t", "ext4", "-L", "LIMPET-DATA", str(raw)], timeout=60)


def btrfs(raw: Path, label: bytes = b"PHOTOS") -> None:
    """As much of a Btrfs as tells whose it is."""
    superblock = bytearray(4096)
    superblock[0x40:0x48] = b"_BHRfS_M"
    superblock[_LABEL : _LABEL + len(label)] = label
    with raw.open("r+b") as file:
        file.seek(_SUPERBLOCK)
        file.write(superblock)


def noise(raw: Path) -> None:
    with raw.open("r+b") as file:
        file.write(os.urandom(8 << 20))


def zeroes(raw: Path) -> None:
    """A blank disk in the place of one with data: a lost file system, not one to be made."""


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "foreign.raw"
    path.touch()
    os.truncate(path, _SIZE)
    return path


def refused(box: Sandbox, reason: str) -> None:
    with pytest.raises(errors.FailedPrecondition, match=f"could not be mounted: {reason}"):
        box.start()
    assert box.refresh().state is State.STOPPED


_NONE = "there is no Btrfs file system on it; nothing was written"


@pytest.mark.parametrize(
    ("make", "reason"),
    [(ext4, _NONE), (btrfs, "its Btrfs file system is not limpet's"), (noise, _NONE), (zeroes, _NONE)],
)
def test_disk_with_foreign_content_is_refused_and_not_touched(
    owner: Sandbox, disk: Path, raw: Path, tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    """RUN-4: its SHA-256 is as before."""
    make(raw)
    with exchanged(disk, raw):
        refused(owner, reason)
        assert digest_of(disk, tmp_path / "after.raw") == digest(raw)


def test_disk_that_cannot_be_read_is_an_error_and_then_starts_as_it_was(owner: Sandbox, disk: Path, raw: Path) -> None:
    """RUN-4: an I/O error is not "blank", nor is it the end: once the disk reads again, everything is there."""
    btrfs(raw, b"LIMPET-DATA")
    with exchanged(disk, raw, unreadable=True):
        before = digest(disk)
        refused(owner, "its superblock cannot be read: .*Input/output error")
        assert digest(disk) == before
    owner.start()
    assert shell(owner, "cat /home/user/mine") == "mine\n"


@pytest.mark.parametrize(
    ("make", "unreadable", "reason"),
    [(ext4, False, "not blank"), (noise, False, "not blank"), (btrfs, True, "cannot read the disk")],
)
def test_disk_that_is_not_provably_blank_is_not_formatted(
    home: Path, raw: Path, tmp_path: Path, make: Callable[[Path], None], unreadable: bool, reason: str
) -> None:
    """RUN-4: the machine that makes the blank data disk, given something else."""
    make(raw)
    found = plan.Plan.make(discover(home))
    archive, disk = tmp_path / "initramfs", tmp_path / "disk.qcow2"
    archive.write_bytes(initramfs.build_blank(pieces.load(found.pieces)))
    to_qcow2(raw, disk, unreadable=unreadable)
    before = digest(disk)

    async def same() -> oneoff.Disks:
        return {"data": disk}

    with pytest.raises(errors.Unavailable, match=f"limpet-blank: failed: .*{reason}"):
        asyncio.run(oneoff.run("blank", "it", kernel=found.kernel, initramfs=archive, disks=same))
    assert digest(disk) == before
