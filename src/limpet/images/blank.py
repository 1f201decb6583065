"""The blank data disk: an empty Btrfs with its subvolumes, as a small qcow2 file that every sandbox gets a copy of.

Subvolumes can only be made in a mounted Btrfs, and an ordinary user cannot mount one. So the file system is made where
it is used: in a VM, once, with the kernel that will run it. That boot also proves that the kernel works here.
A copy, not an overlay: a sandbox's data must not depend on anything that can be deleted as a cache.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from limpet import process
from limpet.images import initramfs, keys, oneoff
from limpet.images.pieces import Pieces

SIZE = 64 << 30  # bytes, virtual; the file takes what is written


def key(pieces_key: str) -> str:
    """What the blank disk depends on."""
    text = (initramfs.GUEST / "blank").read_bytes()
    sources = [Path(source).read_bytes() for source in (__file__, initramfs.__file__, oneoff.__file__)]
    return keys.key_of("data", pieces_key, text, *sources)


async def build(pieces: Pieces, vmlinux: Path, staging: Path, target: Path) -> None:
    """Make the disk `target` (qcow2). Raises Unavailable with the console's last lines when the VM does not do it."""
    archive = staging / "initramfs"
    archive.write_bytes(initramfs.build_blank(pieces))
    disk = staging / "disk.qcow2"

    async def fresh() -> oneoff.Disks:
        await process.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), str(SIZE)], timeout=60)
        return {"data": disk}

    what = "the first virtual machine, which makes the blank data disk,"
    await oneoff.run("blank", what, kernel=vmlinux, initramfs=archive, disks=fresh)
    shutil.move(disk, target)
