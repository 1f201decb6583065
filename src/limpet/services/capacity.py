"""How many more VMs this host can hold: asked before many are made at once."""

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


def available_memory() -> int:
    """Bytes that can be used without swapping (MemAvailable, proc(5))."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def each(spec: SandboxSpec) -> int:
    """Bytes of memory that a clone of this spec takes soon: its private pages come as it writes them."""
    return _BASE + (translation_cache(spec.memory_mib) << 20)


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
