"""Making a checkpoint: a sandbox's disks and memory at one instant, under one id (FRZ-6).

    take the instant ──► seal every file ──► manifest ──► rename (published)

The guest stands still for some ten milliseconds and runs on whatever happens. What is not published is swept away.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.digests import Seal
from limpet.models import CheckpointInfo
from limpet.names import new_id
from limpet.services import instants, manifests
from limpet.services.catalogue import Checkpoint, keep
from limpet.services.host import Host
from limpet.services.machines import MachineFacts
from limpet.services.manifests import Manifest
from limpet.store import SandboxRecord
from limpet.vmm.layers import occupied
from limpet.vmm.memory import MemoryImage

_SYNC_S = 10.0
_HEADROOM = 64 << 20  # bytes beyond the memory that a checkpoint may need
MadeBy = Literal["user", "restore", "exec", "suspend"]


async def make(
    host: Host,
    record: SandboxRecord,
    *,
    label: str | None = None,
    disk_only: bool = False,
    made_by: MadeBy = "user",
) -> Checkpoint:
    """Take a checkpoint; the caller holds the lifecycle lock. One of a sandbox that does not run has no memory."""
    vm = host.live.get(record.id)
    full = vm is not None and not disk_only
    needed = (record.spec.memory_mib << 20 if full else 0) + _HEADROOM
    durable.require_space(host.paths.checkpoints, needed, f"a checkpoint of {record.name}")
    checkpoint_id = new_id("ck")
    staging = durable.staging(host.paths.checkpoints, checkpoint_id)
    memory = MemoryImage(staging) if full else None
    try:
        with host.layers.building():
            facts = None
            if vm is not None and full:
                facts = await instants.machine_facts(vm, record)
                keep(await instants.agent_disk(vm), MemoryImage(staging).agent_disk)
            elif vm is not None:  # without memory, what the guest has not written yet is not in it
                await (await vm.agent()).sync(timeout=_SYNC_S)
            instant = await instants.take(host, record, memory)
            info = CheckpointInfo(
                id=checkpoint_id, sandbox=record.name, sandbox_id=record.id, parent=record.parent, label=label,
                created_at=datetime.now(UTC), kind="full" if full else "disk", made_by=made_by, spec=record.spec,
                workspace=record.workspace, pause_ms=round(instant.pause * 1e3, 1),
            )  # fmt: skip
            published = await asyncio.to_thread(_publish, host, info, instant, facts, staging)
    except BaseException:
        durable.remove_tree(staging)
        raise
    crashpoint("checkpoint.parent.before")
    host.records.update(record.id, parent=checkpoint_id)
    told = {"checkpoint": checkpoint_id, "memory": full, "made_by": made_by, "pause_ms": info.pause_ms}
    host.events.emit("checkpoint.created", sandbox=record, **told)
    return published


def _publish(
    host: Host,
    info: CheckpointInfo,
    instant: instants.Instant,
    facts: MachineFacts | None,
    staging: Path,
) -> Checkpoint:
    """Seal everything and publish; in a thread, because it reads all that is new."""
    files = {file.name: Seal.of(file) for file in sorted(staging.iterdir())}
    chains, image = manifests.chains(host.layers, instant.frozen, host.catalogue.seals)
    disk = host.layers.used(*instant.frozen.values())
    memory = occupied(MemoryImage(staging).ram) + occupied(MemoryImage(staging).state)
    info = info.model_copy(update={"disk_bytes": disk, "memory_bytes": memory})
    manifest = Manifest(info=info, disks=chains, image=image, machine=facts, files=files)
    return host.catalogue.publish(staging, manifest)
