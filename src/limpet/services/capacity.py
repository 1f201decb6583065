"""How many more VMs this host can hold: asked before one is started, and before many are made at once (VM-19)."""

from __future__ import annotations

from pathlib import Path

from limpet import durable
from limpet.errors import FailedPrecondition, InsufficientSpace
from limpet.models import SandboxSpec
from limpet.paths import Paths
from limpet.vmm.command import translation_cache

_MEMINFO = Path("/proc/meminfo")
_BASE = 64 << 20  # bytes of a VM that shares its memory image: QEMU, helpers, first private pages
_SPARE = 512 << 20  # bytes that the host keeps
_DISK = 64 << 20  # bytes of the host's disk that a new VM soon takes
_FLOOR = 512 << 20  # bytes of the host's disk below which nothing is started


def available_memory() -> int:
    """Bytes that can be used without swapping (MemAvailable, proc(5))."""
    return _meminfo("MemAvailable")


def _meminfo(field: str) -> int:
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0


def each(spec: SandboxSpec) -> int:
    """Bytes of memory that a clone of this spec takes soon: its private pages come as it writes them."""
    return _BASE + (translation_cache(spec.memory_mib) << 20)


def admit(paths: Paths, spec: SandboxSpec) -> None:
    """Raise unless one more VM can be started now: InsufficientSpace, or FailedPrecondition for the memory."""
    require_disk(paths)
    needed, available, total = each(spec), available_memory(), _meminfo("MemTotal")
    if spec.memory_mib << 20 > total:
        raise FailedPrecondition(
            f"a sandbox of {spec.memory_mib} MiB does not fit into this host's {total >> 20} MiB of memory",
            hint="ask for less with --memory",
        )
    if needed > available:
        raise FailedPrecondition(
            f"starting a sandbox needs {needed >> 20} MiB of memory, {available >> 20} MiB are available",
            hint="stop or suspend another sandbox first",
        )


def require_disk(paths: Paths) -> None:
    """Raise InsufficientSpace where nothing should be started any more."""
    durable.require_space(paths.layers, _FLOOR, "starting a sandbox")


def fitting(paths: Paths, spec: SandboxSpec) -> int:
    """How many clones of this spec fit now."""
    by_memory = (available_memory() - _SPARE) // each(spec)
    by_disk = durable.free_bytes(paths.data) // _DISK
    return max(min(by_memory, by_disk), 0)


def require(paths: Paths, spec: SandboxSpec, count: int) -> None:
    """Raise unless `count` clones fit: FailedPrecondition for memory, InsufficientSpace for the disk; both say how
    many do."""
    by_disk = durable.free_bytes(paths.data) // _DISK
    if (fit := fitting(paths, spec)) >= count:
        return
    if by_disk < count:
        raise InsufficientSpace(f"no room on the disk for {count} more sandboxes: {fit} fit", hint="free some space")
    raise FailedPrecondition(
        f"not enough memory for {count} more sandboxes: {fit} fit", hint=f"ask for at most {fit}, or stop some first"
    )
