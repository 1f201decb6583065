"""What a start can go on from: a checkpoint's memory, once it is known to be whole and of a machine like ours."""

from __future__ import annotations

import asyncio

from limpet.errors import BadRequest, FailedPrecondition
from limpet.models import SandboxSpec
from limpet.services import machines
from limpet.services.catalogue import Checkpoint
from limpet.services.host import Host
from limpet.vmm.memory import MemoryImage


async def of(host: Host, checkpoint: Checkpoint, *, disk_only: bool = False) -> MemoryImage | None:
    """The memory to go on from, None for disks only; all that is used was found to be whole. Raises BadRequest naming
    what is damaged, FailedPrecondition when this host's machines are others."""
    manifest = checkpoint.manifest
    problems = await asyncio.to_thread(manifest.problems, checkpoint.directory, host.layers, disk_only=disk_only)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise BadRequest(
            f"{checkpoint.info.id} is not as it was written: {problems[0]}{more}",
            hint="nothing was started from it; others are in: limpet checkpoint ls",
        )
    if manifest.machine is None or disk_only:
        return None
    memory = MemoryImage(checkpoint.directory)
    here = await machines.here(host.paths, spec(checkpoint, memory))
    if (difference := here.difference(manifest.machine)) is not None:
        raise FailedPrecondition(
            f"the memory in {checkpoint.info.id} is of another machine: {difference}",
            hint="--disk-only boots its disks",
        )
    return memory


def spec(checkpoint: Checkpoint, memory: MemoryImage | None) -> SandboxSpec:
    """The spec as it was; with the memory come its vCPUs and its size."""
    facts = checkpoint.manifest.machine
    if memory is None or facts is None:
        return checkpoint.info.spec
    return facts.applied_to(checkpoint.info.spec)
