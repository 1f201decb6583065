"""The blank data disk: an empty Btrfs with its subvolumes, as a small qcow2 file that every sandbox gets a copy of.

Subvolumes can only be made in a mounted Btrfs, and an ordinary user cannot mount one. So the file system is made where
it is used: in a VM, once, with the kernel that will run it. That boot also proves that the kernel works here.
A copy, not an overlay: a sandbox's data must not depend on anything that can be deleted as a cache.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from limpet import process
from limpet.errors import DeadlineExceeded, Unavailable
from limpet.images import initramfs, keys
from limpet.images.pieces import Pieces

SIZE = 64 << 30  # bytes, virtual; the file takes what is written

_DONE = b"limpet-blank: ok"
_ATTEMPTS = (30.0, 60.0, 120.0)  # seconds; an emulated boot can stall in timer calibration, a slow host needs long
_CMDLINE = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off nokaslr norandmaps cryptomgr.notests"


def key(pieces_key: str) -> str:
    """What the blank disk depends on."""
    text = (initramfs.GUEST / "blank").read_bytes()
    return keys.key_of("data", pieces_key, text, Path(__file__).read_bytes(), Path(initramfs.__file__).read_bytes())


async def build(pieces: Pieces, vmlinux: Path, staging: Path, target: Path) -> None:
    """Make the disk `target` (qcow2). Raises Unavailable with the console's last lines when the VM does not do it."""
    archive = staging / "initramfs"
    archive.write_bytes(initramfs.build_blank(pieces))
    disk = staging / "disk.qcow2"
    console = b""
    for timeout in _ATTEMPTS:
        await process.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), str(SIZE)], timeout=60)
        try:
            console = (await process.run(_command(vmlinux, archive, disk), timeout=timeout, check=False)).stdout
        except DeadlineExceeded:
            continue
        if _DONE in console:
            shutil.move(disk, target)
            return
    tail = "\n  ".join(console.decode(errors="replace").splitlines()[-8:])
    raise Unavailable(
        "the first virtual machine, which makes the blank data disk, did not finish" + (f":\n  {tail}" if tail else ""),
        hint="run `limpet doctor`",
    )


def _command(vmlinux: Path, archive: Path, disk: Path) -> list[str]:
    frequency = _tsc_khz()
    cmdline = _CMDLINE + (f" tsc_early_khz={frequency}" if frequency else "")
    return [
        "qemu-system-x86_64", "-M", "microvm,x-option-roms=off,rtc=on,isa-serial=on", "-accel", "tcg",
        "-cpu", "max,-erms", "-m", "512", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-serial", "stdio", "-global", "virtio-mmio.force-legacy=false",
        "-kernel", str(vmlinux), "-initrd", str(archive), "-append", cmdline, "-device", "virtio-blk-device,drive=data",
        # unsafe: a crash throws the whole file away; it is synced before it is published
        "-drive", f"if=none,id=data,format=qcow2,cache=unsafe,file={str(disk).replace(',', ',,')}",
    ]  # fmt: skip


def _tsc_khz() -> int | None:
    """The host's clock rate where it tells: spares the guest the calibration that can stall under emulation."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return int(float(line.partition(":")[2]) * 1000)
    return None
