"""A host that cannot write: its guests stand still instead of losing anything, and go on when it can (VM-19).

    QEMU: a write fails ──► werror=stop: the vCPUs stop, the write is kept ──► BLOCK_IO_ERROR
          space is back, or `limpet resume` ──► cont: the kept writes are tried again ──► RESUME

The guest never sees the error. That a machine stands still is nobody's to write down: QEMU says so, also to a daemon
that adopts it. A full disk is looked at until there is room; any other error waits for whoever knows the disk.
"""

from __future__ import annotations

import asyncio
import contextlib

from limpet import durable, log
from limpet.errors import LimpetError
from limpet.models import State
from limpet.services.host import Host
from limpet.services.live import LiveVM, Stall
from limpet.store import SandboxRecord
from limpet.vmm.qmp import MachineEvent

ENOUGH = 256 << 20  # bytes that have to be free before guests go on: less would be gone again at once
_POLL_S = 2.0
_SETTLE_S = 0.3  # after which a write that fails again has shown itself
_STANDING = "io-error"  # QEMU's run state
_log = log.get("diskfull")


class DiskWatch:
    """Follows what the machines of running sandboxes say about their disks."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def watch(self, vm: LiveVM) -> None:
        """Until the VM is let go."""
        vm.disk_watch = asyncio.create_task(self._watch(vm), name=f"disks of {vm.sandbox_id}")

    async def _watch(self, vm: LiveVM) -> None:
        recovering = asyncio.create_task(self._recover(vm), name=f"recovery of {vm.sandbox_id}")
        try:
            with contextlib.suppress(LimpetError):
                if await vm.machine.run_state() == _STANDING:  # since before this daemon
                    self._stands_still(vm, Stall(self._explained(full=True, reason="it was found standing"), full=True))
            async for event in vm.machine.events():
                if event.kind == "BLOCK_IO_ERROR" and event.data.get("action") == "stop":
                    self._failed(vm, event)
                elif event.kind == "RESUME":
                    vm.goes_on()
        finally:
            recovering.cancel()

    def _failed(self, vm: LiveVM, event: MachineEvent) -> None:
        full, reason = bool(event.data.get("nospace")), str(event.data.get("reason", "unknown error"))
        self._stands_still(vm, Stall(self._explained(full=full, reason=reason), full=full))

    def _explained(self, *, full: bool, reason: str) -> str:
        directory = self._host.paths.layers
        if not full:
            return f"the host cannot write to {directory} ({reason}): the guest stands still, nothing is lost so far"
        free = durable.free_bytes(directory) >> 20
        return (
            f"the host's disk is full ({free} MiB are free in {directory}): the guest stands still, and goes on by "
            f"itself when {ENOUGH >> 20} MiB are free"
        )

    def _stands_still(self, vm: LiveVM, stall: Stall) -> None:
        new = vm.stall is None  # several writes fail at once
        vm.stands_still(stall)
        if new and (record := self._host.records.find(vm.sandbox_id)) is not None:
            _log.error("stands still", sandbox=record.name, reason=stall.message)
            self._tell("sandbox.disk_full" if stall.full else "sandbox.disk_error", record, reason=stall.message)

    def _tell(self, kind: str, record: SandboxRecord, **data: object) -> None:
        """An event, if the disk that is full takes it."""
        try:
            self._host.events.emit(kind, sandbox=record, **data)
        except LimpetError as error:
            _log.error("event lost", kind=kind, sandbox=record.name, reason=error.message)

    async def _recover(self, vm: LiveVM) -> None:
        while True:
            await vm.stalled.wait()
            await asyncio.sleep(_POLL_S)
            if vm.stall is None or not vm.stall.full or durable.free_bytes(self._host.paths.layers) < ENOUGH:
                continue
            try:
                async with self._host.locks.lifecycle(vm.sandbox_id, "going on", wait=_POLL_S):
                    record = self._host.records.find(vm.sandbox_id)
                    if record is not None and record.state is State.RUNNING and vm.stall is not None:
                        await self.go_on(record, vm)
            except LimpetError as error:
                _log.warning("does not go on", sandbox=vm.sandbox_id, reason=error.message)

    async def go_on(self, record: SandboxRecord, vm: LiveVM) -> None:
        """Let QEMU try again what failed; the caller holds the lifecycle lock. Raises Unavailable when it fails
        again."""
        await vm.run()
        await asyncio.sleep(_SETTLE_S)
        if await vm.machine.run_state() == _STANDING:
            raise (vm.stall or Stall(self._explained(full=True, reason="it failed again"), full=True)).error()
        vm.goes_on()
        vm.set_clock_soon()
        self._tell("sandbox.went_on", record)
