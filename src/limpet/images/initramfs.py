"""The initramfs: busybox, a handful of modules and the init script, as one uncompressed cpio archive.

Uncompressed because the kernel under emulation unpacks slower than QEMU reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from limpet.images import kernel
from limpet.images.cpio import Archive
from limpet.images.pieces import LOADER, Pieces

GUEST = Path(__file__).parent / "guest"  # the scripts that run in the guest

BOOT_MODULES = ("virtio_mmio", "virtio_blk", "virtio_console", "squashfs")
EARLY_MODULE = "raid6_pq"  # see guest/init
LATER_MODULES = ("virtio-rng",)
BTRFS_MODULES = ("crc32c-intel", "xor", "btrfs")  # crc32c first: btrfs takes the fastest that is there
NETWORK_MODULES = ("virtio_net",)

_APPLETS = (
    "chroot", "mkdir", "modprobe", "mount", "poweroff", "reboot", "sleep", "switch_root", "sync", "umount",
)  # fmt: skip
_DIRECTORIES = ("bin", "boot", "dev", "lib", "proc", "root", "run", "sys")
_EARLY = """\
proc /proc proc nosuid,nodev,noexec 0 0
sysfs /sys sysfs nosuid,nodev,noexec 0 0
dev /dev devtmpfs nosuid,mode=0755 0 0
run /run tmpfs nosuid,nodev,mode=0755 0 0
"""
_MOVE = "".join(f"/{name} /root/{name} none move 0 0\n" for name in ("run", "proc", "sys", "dev"))


def script(name: str, substitutes: Mapping[str, str]) -> bytes:
    """A script for the guest with its `@placeholders@` filled in."""
    text = (GUEST / name).read_text()
    for placeholder, value in substitutes.items():
        text = text.replace(f"@{placeholder}@", value)
    return text.encode()


def build(pieces: Pieces) -> bytes:
    """The initramfs that every sandbox boots with."""
    archive = _archive(pieces, (*BOOT_MODULES, EARLY_MODULE))
    archive.file("init", script("init", {"modules": " ".join(BOOT_MODULES)}), 0o755)
    return archive.to_bytes()


def build_blank(pieces: Pieces) -> bytes:
    """The initramfs of the one boot that makes the blank data disk."""
    modules = ("virtio_mmio", "virtio_blk", *BTRFS_MODULES)
    archive = _archive(pieces, modules)
    _add_tools(archive, pieces)
    archive.file("init", script("blank", {"modules": " ".join(modules)}), 0o755)
    return archive.to_bytes()


def build_tidy(pieces: Pieces) -> bytes:
    """The initramfs of the boot that brings the disks of a new image in order."""
    modules = ("virtio_mmio", "virtio_blk", *BTRFS_MODULES)
    archive = _archive(pieces, modules)
    _add_tools(archive, pieces)
    archive.file("init", script("tidy", {"modules": " ".join(modules)}), 0o755)
    return archive.to_bytes()


def _archive(pieces: Pieces, modules: Sequence[str]) -> Archive:
    archive = Archive()
    for name in _DIRECTORIES:
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3, 0o666)
    archive.file("bin/busybox", pieces.busybox.read_bytes(), 0o755)
    for applet in _APPLETS:
        archive.symlink(f"bin/{applet}", "busybox")
    archive.file("boot/early", _EARLY.encode())
    archive.file("boot/move", _MOVE.encode())
    _add_modules(archive, pieces, modules)
    return archive


def _add_tools(archive: Archive, pieces: Pieces) -> None:
    """The Btrfs tools with their libraries."""
    for program in sorted((pieces.tools / "bin").iterdir()):
        archive.file(f"bin/{program.name}", program.read_bytes(), 0o755)
    archive.directory("lib64")
    for library in sorted((pieces.tools / "lib").iterdir()):
        # the loader has its fixed place and looks for the others in /lib
        place = "lib64" if library.name == LOADER else "lib"
        archive.file(f"{place}/{library.name}", library.read_bytes(), 0o755)


def _add_modules(archive: Archive, pieces: Pieces, names: Sequence[str]) -> None:
    order = kernel.load_order(pieces.modules, names)
    base = f"lib/modules/{pieces.kernel_release}"
    archive.directory("lib/modules")
    archive.directory(base)
    lines = []
    for path in order:
        archive.file(f"{base}/{path.name}", (pieces.modules / path).read_bytes())
        needs = [other.name for other in reversed(kernel.load_order(pieces.modules, [path.stem])) if other != path]
        lines.append(f"{path.name}: {' '.join(needs)}\n")
    archive.file(f"{base}/modules.dep", "".join(lines).encode())
