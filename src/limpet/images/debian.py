"""A root disk out of Debian packages.

packages (mmdebstrap, hooks) → tar → tree in a tmpfs of a private namespace → ext4 (mke2fs -d)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from limpet import process
from limpet.images import bootstrap

SIZE = 16 << 30  # bytes, virtual; sparse

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

KEY_PARTS = (*_DPKG, _TO_EXT4)  # what every disk made here depends on


async def build(
    staging: Path, packages: Sequence[str], hooks: Sequence[str], report: bootstrap.Report, mirror: str | None
) -> None:
    """Make root.raw in the empty directory `staging`. The hooks are shell scripts; they run when the packages are
    installed, in this order, each with the new root directory as $1."""
    archive = staging / "packages.tar"
    extra = [f"--dpkgopt={option}" for option in _DPKG]
    # the hooks' texts, not their paths: the namespace's user may not be able to read the files
    extra += [f"--customize-hook={hook}" for hook in hooks]
    await bootstrap.mmdebstrap(archive, variant="apt", include=packages, report=report, mirror=mirror, extra=extra)
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
