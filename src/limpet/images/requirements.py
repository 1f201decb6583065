"""What setup needs of the host, and the command that brings what is missing."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

from limpet import durable, process
from limpet.errors import FailedPrecondition, Unavailable
from limpet.paths import Paths

TOOLS = ("mmdebstrap", "lz4", "depmod", "mksquashfs", "mke2fs", "qemu-system-x86_64", "qemu-img", "unshare", "tar")
USER_TOOLS = ("newuidmap", "newgidmap")  # an ordinary user's namespaces need them too

_CACHE_SPACE = 2 << 30  # bytes: packages, their tree and the results, at the most at once
_TEMPORARY_SPACE = 1 << 30  # bytes in the temporary directory, where mmdebstrap works


def missing_tools() -> list[tuple[str, str]]:
    """(tool, Debian package) for every tool that setup needs and that is not installed."""
    wanted = TOOLS if os.geteuid() == 0 else TOOLS + USER_TOOLS
    return [(tool, process.package(tool)) for tool in wanted if process.find(tool) is None]


async def check(paths: Paths) -> None:
    """Raise Unavailable, FailedPrecondition or InsufficientSpace, each with its remedy, unless setup can work here."""
    if missing := missing_tools():
        packages = sorted({package for _, package in missing})
        raise Unavailable(
            f"not installed: {', '.join(tool for tool, _ in missing)}",
            hint=f"sudo apt-get install {' '.join(packages)}",
        )
    if (problem := await namespace_problem()) is not None:
        raise FailedPrecondition(problem[0], hint=problem[1])
    durable.require_space(paths.cache, _CACHE_SPACE, "limpet setup")
    durable.require_space(Path(os.environ.get("TMPDIR", "/tmp")), _TEMPORARY_SPACE, "limpet setup")


async def namespace_problem() -> tuple[str, str] | None:
    """(what is wrong, remedy) when this user cannot make a user namespace with a range of ids; None when all is well.
    Root needs none."""
    if os.geteuid() == 0:
        return None
    probe = await process.run(["unshare", "--map-root-user", "--map-auto", "true"], timeout=30, check=False)
    if probe.returncode == 0:
        return None
    user = getpass.getuser()
    for file in (Path("/etc/subuid"), Path("/etc/subgid")):
        if not _has_range(file, user):
            return (
                f"{file} gives {user} no range of ids",
                f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
            )
    reason = probe.stderr.decode(errors="replace").strip()
    return (
        f"this user may not make user namespaces ({reason})",
        "sudo sysctl -e -w kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0",
    )


def _has_range(file: Path, user: str) -> bool:
    try:
        owners = [line.partition(":")[0] for line in file.read_text().splitlines()]
    except OSError:
        return False
    return user in owners or str(os.getuid()) in owners
