"""Standing still and going on: pause (vCPUs stopped, memory kept), suspend (memory in a checkpoint, process gone),
resume.

    running ⇄ paused          pause, resume: QEMU's `stop` and `cont`
    running ⇄ suspended       suspend, resume: a checkpoint, and a restore of it in place

Whoever comes back finds the right time and fresh entropy, as after every restore.
"""

from __future__ import annotations

import contextlib

from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition, LimpetError
from limpet.models import Operation, Sandbox, State
from limpet.services import checkpointing
from limpet.services.catalogue import Checkpoint
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.sandboxes import Sandboxes
from limpet.services.syncing import Syncing
from limpet.store import SandboxRecord

_SYNC_S = 5.0  # seconds for a last sync before a suspend


class Standing:
    def __init__(self, host: Host, sandboxes: Sandboxes, syncing: Syncing) -> None:
        self._host, self._sandboxes, self._syncing = host, sandboxes, syncing

    async def pause(self, name: str) -> Operation:
        """Stop the vCPUs. Nothing happens when they stand still already."""
        record = self._host.records.by_name(name)

        async def work(stages: Stages) -> Sandbox:
            async with self._host.locks.lifecycle(record.id, "pause"), stages.run("pause"):
                vm = self._host.live.require(record.id, name)
                if self._host.records.by_id(record.id).state is not State.PAUSED:
                    async with self._syncing.held(record.id):
                        changed = await self._pause(record, vm)
                    self._host.events.emit("sandbox.paused", sandbox=changed)
            return self._view(record)

        return self._host.operations.start("pause", name, work)

    async def _pause(self, record: SandboxRecord, vm: LiveVM) -> SandboxRecord:
        crashpoint("pause.stop.before")
        await vm.machine.qmp("stop")
        try:
            crashpoint("pause.stop.after")
            return self._host.records.update(record.id, state=State.PAUSED)
        except BaseException:
            await vm.machine.qmp("cont", timeout=30)
            raise

    async def resume(self, name: str) -> Operation:
        """Go on, from a pause or from a suspend. Raises FailedPrecondition for a sandbox that was stopped."""
        record = self._host.records.by_name(name)
        if record.state not in (State.PAUSED, State.SUSPENDED, State.RUNNING):
            raise FailedPrecondition(f"{name} is {record.state.value}, not paused", hint=f"limpet start {name}")

        async def work(stages: Stages) -> Sandbox:
            async with self._host.locks.lifecycle(record.id, "resume"):
                await self._sandboxes.ensure_running(record.id, stages)
            return self._view(record)

        return self._host.operations.start("resume", name, work)

    async def suspend(self, name: str) -> Operation:
        """Write the memory to a checkpoint and end the process."""
        record = self._host.records.by_name(name)

        async def work(stages: Stages) -> Sandbox:
            async with self._host.locks.lifecycle(record.id, "suspend"):
                await self.suspend_now(self._host.records.by_id(record.id), stages)
            return self._view(record)

        return self._host.operations.start("suspend", name, work)

    async def suspend_now(self, record: SandboxRecord, stages: Stages) -> None:
        """The caller holds the lifecycle lock."""
        vm = self._host.live.get(record.id)
        if vm is None:
            if record.state is State.SUSPENDED:
                return
            raise FailedPrecondition(f"{record.name} is not running", hint=f"limpet start {record.name}")
        if record.spec.ephemeral:
            raise FailedPrecondition(f"{record.name} is ephemeral: it ends with its VM", hint="create it without --rm")
        async with stages.run("suspend"):
            if record.state is State.RUNNING:
                await self._syncing.final(vm, _SYNC_S)  # as far as it can be: all of it is in the memory image too
            async with self._syncing.held(record.id):
                checkpoint = await self._end_in_checkpoint(record, vm)
        self._host.events.emit("sandbox.suspended", sandbox=record, checkpoint=checkpoint.info.id)

    async def _end_in_checkpoint(self, record: SandboxRecord, vm: LiveVM) -> Checkpoint:
        await vm.machine.qmp("stop")  # nothing may change between the memory image and the end of the process
        try:
            checkpoint = await checkpointing.make(self._host, record, made_by="suspend")
            crashpoint("suspend.record.before")
            self._host.records.update(record.id, memory=checkpoint.info.id, state=State.SUSPENDED)
            crashpoint("suspend.record.after")
            await self._sandboxes.end_now(record, State.SUSPENDED)
        except BaseException:
            await self._stay(record, vm)
            raise
        return checkpoint

    async def _stay(self, record: SandboxRecord, vm: LiveVM) -> None:
        """After a suspend that failed: if its VM is still there, it goes on as it was."""
        if vm.machine.alive():
            self._host.records.update(record.id, memory=None, state=record.state)
            if record.state is not State.PAUSED:
                await vm.machine.qmp("cont", timeout=30)
                with contextlib.suppress(LimpetError):
                    await (await vm.agent()).check_clock()

    def _view(self, record: SandboxRecord) -> Sandbox:
        return self._host.view(self._host.records.by_id(record.id))
