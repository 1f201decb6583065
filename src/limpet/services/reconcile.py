"""What the daemon does before it serves: make the records agree with what really runs (VM-8, VM-10).

row              lock held                                   lock free
running …        adopt: connect QMP and channel              tear leftovers down → stopped (why in `error`)
paused           adopt, still paused                         → stopped
creating, own    kill the half-made VM, forget               forget: an unfinished create leaves no trace
stopping         adopt, back to running, with its engine     → stopped
suspended        end it: its memory is in the checkpoint     stays
starting         adopt, renewed; end it if it does not        → stopped
                   answer
starting from    the same, then suspended                    → suspended: the checkpoint is used up only when
  a suspend                                                    the sandbox runs
trashed          stays                                       stays; a deletion that was cut off is finished
(no row)         reported by doctor                          reported by doctor, never deleted

A migration that an earlier daemon began is called off; layers and checkpoints that nothing needs are removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime

from limpet import durable, log
from limpet.crashpoint import crashpoint
from limpet.errors import LimpetError
from limpet.images import upkeep
from limpet.models import State
from limpet.paths import SandboxPaths
from limpet.services import garbage, identity, instants, trash
from limpet.services.host import Host
from limpet.services.identity import machine_uuid
from limpet.services.live import LiveVM, load_handles
from limpet.services.records import hidden
from limpet.services.sandboxes import Sandboxes
from limpet.store import SandboxRecord
from limpet.vmm import capture
from limpet.vmm.handles import rediscover
from limpet.vmm.lock import held
from limpet.vmm.machine import Machine, end_leftovers

_FINISH_S = 8.0  # for a guest that was starting to answer; a client waits 15 s for a daemon
_TEMPLATE_S = 600.0  # a template that is not finished by then never will be
_log = log.get("reconcile")


async def reconcile(host: Host, sandboxes: Sandboxes) -> None:
    """Bring every sandbox to a state that is true. One that cannot be handled never stops the others."""
    for directory in (host.paths.data, host.paths.sandboxes, host.paths.checkpoints):
        durable.sweep(directory)
    durable.sweep(host.paths.templates, age=_TEMPLATE_S)
    upkeep.sweep(host.paths)
    host.vaults.sweep()
    host.catalogue.load()
    host.payloads.settle(host.records.everything())
    crashpoint("reconcile.sweep.after")
    await asyncio.gather(*(_one(host, sandboxes, record) for record in host.records.everything()))
    crashpoint("reconcile.records.after")
    _forget_used_up(host)
    await garbage.collect(host)
    crashpoint("reconcile.collect.after")


async def _one(host: Host, sandboxes: Sandboxes, record: SandboxRecord) -> None:
    try:
        if record.trash is not None:  # whole, and nobody's business until it is undeleted or too old
            return
        record = _adopt_disks(host, record)
        if record.state is State.CREATING or hidden(record):
            await _forget_unfinished(host, record)
        elif record.state is State.SUSPENDED or (record.memory and not held(host.paths.sandbox(record.id).lock)):
            await _end_suspended(host, record)
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
    crashpoint("reconcile.adopt.before")
    machine = await _recognised(record, files)
    if machine is None:
        await _demote(host, sandboxes, record, "its VM could not be recognised any more")
        return
    vm = LiveVM(record.id, machine, files)
    paused = record.state is State.PAUSED
    await capture.go_on(machine, running=not paused)
    if record.state is State.STARTING:
        if (finished := await _finish(host, record, vm)) is None:
            await _give_up(host, sandboxes, record)
            return
        record = finished
    if record.started_at is not None:
        vm.started = time.monotonic() - max((datetime.now(UTC) - record.started_at).total_seconds(), 0.0)
    record = await instants.agree(host, record, vm)
    host.live.add(vm)
    for mapping in record.spec.ports:
        try:
            await host.ports.publish(vm, mapping)
        except LimpetError as error:
            host.events.emit("port.lost", sandbox=record, host=mapping.host, reason=error.message)
    vm.save_handles()
    await host.payloads.adopt(vm, record)
    host.records.update(record.id, state=State.PAUSED if paused else State.RUNNING, error=None, memory=None)
    crashpoint("reconcile.adopt.after")
    await sandboxes.watch(vm)
    if not paused:
        host.engines.go_on(vm)  # an earlier daemon may have been cut off in a stop
    host.events.emit("sandbox.adopted", sandbox=record)


async def _finish(host: Host, record: SandboxRecord, vm: LiveVM) -> SandboxRecord | None:
    """End a start that was cut off: the guest may have gone on from its memory without having been renewed. None when
    it does not answer."""
    try:
        boot_id = await identity.renew(vm, record, _FINISH_S)
    except LimpetError as error:
        _log.warning("start.lost", sandbox=record.name, reason=error.message)
        await vm.close()
        await vm.machine.close()
        return None
    return host.records.update(
        record.id, boot_id=boot_id, started_at=datetime.now(UTC), incarnation=record.incarnation + 1
    )


async def _give_up(host: Host, sandboxes: Sandboxes, record: SandboxRecord) -> None:
    """A start came to nothing: one from a suspend leaves it suspended."""
    if record.memory is not None:
        await _end_suspended(host, record)
    else:
        await _demote(host, sandboxes, record, "the daemon ended while it started, and it does not answer")


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
    crashpoint("reconcile.demote.before")
    await end_leftovers(load_handles(files), files.lock)
    await host.payloads.release(record)
    crashpoint("reconcile.demote.after")
    durable.remove_tree(files.sockets)
    for leftover in (files.handles, files.intake):
        leftover.unlink(missing_ok=True)
    there = record.disks is not None and all(host.layers.path(layer).exists() for layer in record.disks.values())
    state = State.STOPPED if there or record.incarnation == 0 else State.ERROR
    host.records.update(record.id, state=state, error=why, boot_id=None)
    host.events.emit("sandbox.died", sandbox=record, reason=why)
    if record.spec.ephemeral:
        trash.doom(host, record)
        host.forget(record)


async def _end_suspended(host: Host, record: SandboxRecord) -> None:
    """Its memory is safe: what is left of its VM goes."""
    files = host.paths.sandbox(record.id)
    crashpoint("reconcile.suspended.before")
    await end_leftovers(load_handles(files), files.lock)
    await host.payloads.release(record)
    crashpoint("reconcile.suspended.after")
    for leftover in (files.handles, files.intake):
        leftover.unlink(missing_ok=True)
    host.records.update(record.id, state=State.SUSPENDED, boot_id=None)


async def _forget_unfinished(host: Host, record: SandboxRecord) -> None:
    files = host.paths.sandbox(record.id)
    crashpoint("reconcile.unfinished.before")
    await end_leftovers(load_handles(files), files.lock)
    crashpoint("reconcile.unfinished.after")
    host.forget(record)
    if not hidden(record):
        host.events.emit("sandbox.create_failed", sandbox=record, reason="the daemon ended while it was being created")


def _forget_used_up(host: Host) -> None:
    """Remove checkpoints of suspends that were resumed, and those whose sandbox is gone."""
    records = host.records.everything()
    ids, memories = {record.id for record in records}, {record.memory for record in records}
    for checkpoint in host.catalogue.all():
        info = checkpoint.info
        if info.sandbox_id not in ids or (info.made_by == "suspend" and info.id not in memories):
            host.catalogue.forget(info.id)


def _adopt_disks(host: Host, record: SandboxRecord) -> SandboxRecord:
    """The disks of a sandbox that an earlier limpet made lie in its own directory: give them their names as layers.
    Hard links, so that it works while the VM runs and a crash on the way loses nothing."""
    if record.disks is not None:
        return record
    old = host.paths.sandbox(record.id).old_disks
    if not all(path.exists() for path in old.values()):
        return record
    layers = {name: f"ly_{record.id.removeprefix('sb_')}-{name}" for name in old}
    for name, path in old.items():
        if not host.layers.path(layers[name]).exists():
            host.layers.path(layers[name]).hardlink_to(path)
    record = host.records.update(record.id, disks=layers)
    for path in old.values():
        path.unlink()
    return record
