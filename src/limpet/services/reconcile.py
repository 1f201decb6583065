"""What the daemon does before it serves: make the records agree with what really runs (VM-8, VM-10).

row            lock held                        lock free
running …      adopt: connect QMP and channel   tear leftovers down → stopped (why in `error`)
creating       kill the half-made VM, forget    forget: an unfinished create leaves no trace
stopping       adopt, back to running           → stopped
(no row)       reported by doctor               reported by doctor, never deleted
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime

from limpet import durable, log
from limpet.errors import LimpetError
from limpet.models import State
from limpet.paths import SandboxPaths
from limpet.services.boot import machine_uuid
from limpet.services.host import Host
from limpet.services.live import LiveVM, load_handles
from limpet.services.sandboxes import Sandboxes
from limpet.store import SandboxRecord
from limpet.vmm.handles import rediscover
from limpet.vmm.lock import held
from limpet.vmm.machine import Machine, end_leftovers

_log = log.get("reconcile")


async def reconcile(host: Host, sandboxes: Sandboxes) -> None:
    """Bring every sandbox to a state that is true. One that cannot be handled never stops the others."""
    durable.sweep(host.paths.data)
    durable.sweep(host.paths.sandboxes)
    await asyncio.gather(*(_one(host, sandboxes, record) for record in host.records.all()))


async def _one(host: Host, sandboxes: Sandboxes, record: SandboxRecord) -> None:
    try:
        if record.state is State.CREATING:
            await _forget_unfinished(host, sandboxes, record)
        elif held(host.paths.sandbox(record.id).lock):
            await _adopt(host, sandboxes, record)
        elif record.state not in (State.STOPPED, State.ERROR):
            await _demote(host, sandboxes, record, "the VM ended while no daemon was watching")
    except (LimpetError, OSError) as error:
        _log.error("reconcile.failed", sandbox=record.name, reason=str(error))
        host.events.emit("reconcile.failed", sandbox=record, reason=str(error))
        host.records.update(record.id, state=State.ERROR, error=f"could not be taken over: {error}")


async def _adopt(host: Host, sandboxes: Sandboxes, record: SandboxRecord) -> None:
    files = host.paths.sandbox(record.id)
    machine = await _recognised(record, files)
    if machine is None:
        await _demote(host, sandboxes, record, "its VM could not be recognised any more")
        return
    vm = LiveVM(record.id, machine, files)
    if record.started_at is not None:
        vm.started = time.monotonic() - max((datetime.now(UTC) - record.started_at).total_seconds(), 0.0)
    host.live.add(vm)
    for mapping in record.spec.ports:
        try:
            await host.ports.publish(vm, mapping)
        except LimpetError as error:
            host.events.emit("port.lost", sandbox=record, host=mapping.host, reason=error.message)
    vm.save_handles()
    host.records.update(record.id, state=State.RUNNING, error=None)
    sandboxes.watch(vm)
    host.events.emit("sandbox.adopted", sandbox=record)


async def _recognised(record: SandboxRecord, files: SandboxPaths) -> Machine | None:
    """The running machine by its handles file, or by its lock when that file is lost, damaged or of another start."""
    saved = load_handles(files)
    with contextlib.suppress(LimpetError):
        if saved is not None and (machine := await Machine.adopt(saved)) is not None:
            return machine
    found = rediscover(record.name, machine_uuid(record.id), files.lock, files.qmp, files.channel)
    return await Machine.adopt(found.to_dict()) if found else None


async def _demote(host: Host, sandboxes: Sandboxes, record: SandboxRecord, why: str) -> None:
    files = host.paths.sandbox(record.id)
    await end_leftovers(load_handles(files), files.lock)
    durable.remove_tree(files.sockets)
    for leftover in (files.handles, files.intake):
        leftover.unlink(missing_ok=True)
    state = State.STOPPED if files.root_disk.exists() or record.incarnation == 0 else State.ERROR
    host.records.update(record.id, state=state, error=why, boot_id=None)
    host.events.emit("sandbox.died", sandbox=record, reason=why)
    if record.spec.ephemeral:
        sandboxes.forget(record)


async def _forget_unfinished(host: Host, sandboxes: Sandboxes, record: SandboxRecord) -> None:
    files = host.paths.sandbox(record.id)
    await end_leftovers(load_handles(files), files.lock)
    sandboxes.forget(record)
    host.events.emit("sandbox.create_failed", sandbox=record, reason="the daemon ended while it was being created")
