"""A new sandbox out of frozen layers, and of a memory image where there is one: restore --as, fork, trying out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from limpet.models import PortMapping, SandboxSpec, State, WorkspaceInfo
from limpet.names import new_id
from limpet.services import disks
from limpet.services.boot import Start
from limpet.services.disks import Disks
from limpet.services.host import Host
from limpet.services.operations import Stages
from limpet.services.records import hidden
from limpet.services.sandboxes import Sandboxes
from limpet.store import SandboxRecord
from limpet.vmm.memory import MemoryImage


@dataclass(frozen=True)
class Source:
    """What a clone begins with. The layers must stay reachable until it is made: hold `layers.building`. `vault`: the
    sandbox whose generations are the clone's too, since its disks hold the same snapshots."""

    layers: Mapping[str, str]
    memory: MemoryImage | None
    spec: SandboxSpec
    workspace: WorkspaceInfo | None
    parent: str | None
    vault: str


def spec_of(source: SandboxSpec) -> SandboxSpec:
    """The spec of a clone: as its source's, but host ports can only be given once, so it gets free ones."""
    return source.model_copy(update={"ports": [PortMapping(host=0, guest=port.guest) for port in source.ports]})


def reserve(host: Host, name: str, source: Source) -> SandboxRecord:
    """The row of a clone that is about to be made. Raises AlreadyExists."""
    record = SandboxRecord(
        new_id("sb"), name, State.CREATING, spec_of(source.spec), datetime.now(UTC), workspace=source.workspace,
        parent=source.parent,
    )  # fmt: skip
    host.records.insert(record)
    return record


async def make(host: Host, sandboxes: Sandboxes, record: SandboxRecord, source: Source, stages: Stages) -> None:
    """Start the clone of a reserved row. A failed one leaves no trace."""

    async def layers() -> Disks:
        return await disks.on(host, source.layers)

    try:
        async with host.locks.lifecycle(record.id, f"create of {record.name}"):
            host.paths.sandbox(record.id).root.mkdir(mode=0o700)
            if not hidden(record):
                await host.vaults.copy(source.vault, record.id)
            vm = await Start(host, record, source.memory, layers).run(stages)
            await sandboxes.watch(vm)
    except BaseException:
        host.forget(record)
        raise
    host.events.emit("sandbox.created", sandbox=record, parent=source.parent)
