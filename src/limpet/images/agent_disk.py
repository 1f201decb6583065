"""The agent disk: a read-only squashfs with everything a guest needs that its image may lack.

    bin/            python3, busybox, modprobe
    lib/            loader, libraries, standard library, modules/<release>
    limpet_agent/   the agent, compiled
    boot/           what init runs beside it
    pid1.pyc        the entry

It is mounted at /run/limpet/agent and shared by all sandboxes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from limpet import process
from limpet.images import initramfs, kernel, keys
from limpet.images.pieces import Pieces, compile_python

_MOUNT = "/run/limpet/agent"
_MODULE_TABLES = ("modules.dep", "modules.alias", "modules.symbols", "modules.softdep", "modules.builtin")


def agent_package() -> Path:
    """The directory of the installed agent's sources."""
    import limpet_agent

    return Path(limpet_agent.__file__).parent


def key(pieces_key: str) -> str:
    """What the agent disk depends on: the pieces, the agent's sources, the scripts that go on it."""
    package = agent_package()
    scripts = [(initramfs.GUEST / name).read_bytes() for name in ("start", "background", "pid1")]
    own = Path(__file__).read_bytes()
    return keys.key_of("agent", pieces_key, keys.tree_key(package, keys.sources(package)), *scripts, own)


async def build(pieces: Pieces, staging: Path, target: Path) -> None:
    """Make the disk image `target`; `staging` is an empty directory to work in."""
    tree = staging / "tree"
    shutil.copytree(pieces.runtime, tree, symlinks=True, copy_function=_link)
    (tree / "bin" / "modprobe").symlink_to("busybox")
    _add_modules(pieces, tree / "lib" / "modules" / pieces.kernel_release)
    boot = tree / "boot"
    boot.mkdir()
    shutil.copy(initramfs.GUEST / "start", boot / "start")
    (boot / "background").write_bytes(initramfs.script("background", _module_lists(pieces)))
    package = agent_package()
    for source in keys.sources(package):
        (tree / "limpet_agent" / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / source, tree / "limpet_agent" / source)
    shutil.copy(initramfs.GUEST / "pid1", tree / "limpet_agent" / "pid1.py")
    await compile_python(pieces.runtime, tree / "limpet_agent", f"{_MOUNT}/limpet_agent")
    [entry] = (tree / "limpet_agent" / "__pycache__").glob("pid1.*.pyc")
    entry.rename(tree / "pid1.pyc")
    (tree / "limpet_agent" / "pid1.py").unlink()
    # times and owners are fixed so that equal inputs give equal bytes
    options = ["-comp", "lz4", "-all-root", "-all-time", "0", "-mkfs-time", "0", "-no-xattrs", "-noappend", "-quiet"]
    await process.run(["mksquashfs", str(tree), str(target), *options, "-no-progress"], timeout=300)


def _link(source: str, target: str) -> None:
    os.link(source, target)


def _add_modules(pieces: Pieces, target: Path) -> None:
    shutil.copytree(pieces.modules / "kernel", target / "kernel", copy_function=_link)
    for table in _MODULE_TABLES:
        os.link(pieces.modules / table, target / table)


def _module_lists(pieces: Pieces) -> dict[str, str]:
    def files(names: tuple[str, ...]) -> str:
        return " ".join(map(str, kernel.load_order(pieces.modules, names)))

    booted = set(kernel.load_order(pieces.modules, initramfs.BOOT_MODULES))
    lists = {
        "later": files(initramfs.LATER_MODULES),
        "btrfs": files(initramfs.BTRFS_MODULES),
        "network": files(initramfs.NETWORK_MODULES),
    }
    return {name: " ".join(m for m in value.split() if Path(m) not in booted) for name, value in lists.items()}
