"""The image `base`: Debian 12 with what a coding agent expects to find, made from Debian packages.

packages (mmdebstrap) → tar → tree in a tmpfs of a private namespace → ext4 (mke2fs -d) → digest → publish
"""

from __future__ import annotations

from pathlib import Path

from limpet import process
from limpet.images import bootstrap, initramfs, keys

NAME = "base"
SIZE = 16 << 30  # bytes, virtual; sparse

PACKAGES = (
    "bash", "ca-certificates", "curl", "git", "iproute2", "less", "make", "ncurses-bin", "passwd", "procps",
    "python-is-python3", "python3", "sudo", "unzip", "xz-utils", "zstd",
)  # fmt: skip

_DPKG = (
    "force-unsafe-io",  # the result is synced once, at the end
    "path-exclude=/usr/share/man/*", "path-exclude=/usr/share/info/*", "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/doc/*", "path-include=/usr/share/doc/*/copyright",
)  # fmt: skip

# $2 disk, $3 tree
MAKE_EXT4 = f"""\
truncate -s {SIZE} "$2"
mke2fs -q -F -t ext4 -L limpet-root -m 1 -J size=32 \
    -E lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0 -d "$3" "$2"
"""

# $1 tar, $2 disk, $3 mount point. A tmpfs: nothing is left behind however this ends, and no file has a strange owner.
_TO_EXT4 = f"""
mount -t tmpfs -o mode=0755,size=4g tree "$3"
tar -C "$3" -xpf "$1" --numeric-owner --xattrs --xattrs-include='*' --exclude='./dev/*'
{MAKE_EXT4}"""


def key() -> str:
    """The recipe's key. The image itself is named by its content."""
    hook = (initramfs.GUEST / "customize.sh").read_bytes()
    return keys.key_of("base", bootstrap.SUITE, *PACKAGES, *_DPKG, _TO_EXT4, hook)


async def build(staging: Path, report: bootstrap.Report, mirror: str | None) -> None:
    """Make root.raw in the empty directory `staging`."""
    archive = staging / "packages.tar"
    hook = (initramfs.GUEST / "customize.sh").read_text()
    extra = [f"--dpkgopt={option}" for option in _DPKG]
    # the hook's text, not its path: the namespace's user may not be able to read the file
    extra.append(f"--customize-hook={hook}")
    await bootstrap.mmdebstrap(archive, variant="apt", include=PACKAGES, report=report, mirror=mirror, extra=extra)
    report(0.93, "writing the file system")
    await to_ext4(archive, staging / "root.raw")
    archive.unlink()


async def to_ext4(archive: Path, disk: Path) -> None:
    """Write the tree in a tar to a new ext4 disk image; owners, modes, capabilities and xattrs are kept."""
    mount_point = disk.with_name("tree")
    mount_point.mkdir(exist_ok=True)
    command = bootstrap.in_namespace(_TO_EXT4, str(archive), str(disk), str(mount_point))
    await process.run(command, timeout=600)
    mount_point.rmdir()
