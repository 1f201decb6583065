"""One instant of a sandbox, taken: its disks frozen as layers, and its memory in an image when it runs.

    new layers on the present ones ──► the database names them ──► the switch ──► (seals, manifest, rename)

The order is what makes it safe. A new layer is empty and reads as what it lies on; so from the moment that the database
names it, it is true whether or not QEMU was switched to it, and whoever of us is killed meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition, LimpetError
from limpet.services import chains, disks
from limpet.services.disks import Disks
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.machines import MachineFacts
from limpet.store import SandboxRecord
from limpet.vmm import capture
from limpet.vmm.memory import MemoryImage

_CAPTURE_S = 120.0  # a migration that takes longer writes to a disk that is as good as broken


@dataclass(frozen=True)
class Instant:
    """What was taken: the layers that are frozen now, and how long the guest stood still (seconds)."""

    frozen: Disks
    pause: float


async def take(host: Host, record: SandboxRecord, memory: MemoryImage | None) -> Instant:
    """Freeze a sandbox's disks, in one pause with its memory when an image is to be written. The caller holds the
    lifecycle lock and `layers.building`. The sandbox goes on as it was, also when this fails."""
    record = host.records.by_id(record.id)
    if record.disks is None:
        raise FailedPrecondition(f"{record.name} has no disks yet", hint=f"limpet start {record.name}")
    vm = host.live.get(record.id)
    if vm is not None:
        await chains.leave_alone(vm)
    frozen = await _present(vm, record.disks)
    crashpoint("instant.overlay.before")
    above = await disks.on(host, frozen)
    crashpoint("instant.overlay.after")
    host.records.update(record.id, disks=above)
    crashpoint("instant.switch.before")
    if vm is None:
        return Instant(frozen, 0.0)
    overlays = {name: host.layers.path(layer) for name, layer in above.items()}
    try:
        if memory is None:
            taken = await capture.switch(vm.machine, overlays)
        else:
            taken = await capture.capture(vm.machine, memory, overlays, timeout=_CAPTURE_S)
    except BaseException:
        await asyncio.shield(_restore_record(host, record, vm, above))
        raise
    crashpoint("instant.switch.after")
    return Instant(frozen, taken.pause)


async def _present(vm: LiveVM | None, recorded: Mapping[str, str]) -> Disks:
    """The layers that are written to now. A running machine knows best: a switch may have been recorded only."""
    if vm is None:
        return dict(recorded)
    nodes = await capture.nodes(vm.machine)
    return {name: nodes.get(name, layer) for name, layer in recorded.items()}


async def _restore_record(host: Host, record: SandboxRecord, vm: LiveVM, above: Disks) -> None:
    """After a failed switch: let the record name what the machine writes to. If it cannot say, the new layers stay
    recorded, which is right either way."""
    try:
        nodes = await capture.nodes(vm.machine)
    except LimpetError:
        return
    if all(nodes.get(name) == layer for name, layer in above.items()):
        return
    host.records.update(record.id, disks=record.disks)
    host.layers.drop(*above.values())


async def agree(host: Host, record: SandboxRecord, vm: LiveVM) -> SandboxRecord:
    """After an earlier daemon was cut off between record and switch: let the record name what the machine writes to."""
    await capture.close_unused(vm.machine)
    written = await _present(vm, record.disks or {})
    there = all(host.layers.path(layer).exists() for layer in written.values())
    return host.records.update(record.id, disks=written) if there and written != record.disks else record


async def machine_facts(vm: LiveVM, record: SandboxRecord) -> MachineFacts:
    """What a memory image of this machine will fit. vCPUs and memory are the machine's own: `set` may have changed
    the spec for the next start."""
    version = (await vm.machine.qmp("query-version"))["qemu"]
    memory = (await vm.machine.qmp("query-memory-size-summary"))["base-memory"]
    cpus = await vm.machine.qmp("query-cpus-fast")
    return MachineFacts(
        accel=vm.machine.accel,
        qemu=f"{version['major']}.{version['minor']}.{version['micro']}",
        vcpus=len(cpus),
        memory_mib=memory >> 20,
        network=record.spec.network,
    )


async def agent_disk(vm: LiveVM) -> Path:
    """The agent disk that a machine has open. Raises FailedPrecondition when it was deleted meanwhile."""
    for block in await vm.machine.qmp("query-block"):
        if block.get("qdev", "").startswith("disk-agent"):
            path = Path(block["inserted"]["file"])
            if path.is_file():
                return path
    raise FailedPrecondition(
        "the agent disk of this sandbox is gone: it was started by an older limpet",
        hint="restart it, or take a checkpoint with --disk-only",
    )
