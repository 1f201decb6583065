"""Starting a VM: named steps, each with its undo (VM-6).

    prepare → disks → boot (launch, wait for the agent; retried once) → ports → record

A boot has a deadline: one that stalls is killed, tried once more, and reported in the events. When a step fails, the
undos run in reverse and nothing of this start is left, except disks that were there before.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

from limpet import durable, images, log
from limpet.errors import DeadlineExceeded, FailedPrecondition, LimpetError, Unavailable
from limpet.guest import Pong
from limpet.models import State
from limpet.services import pipeline, stopping
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.pipeline import Step
from limpet.store import SandboxRecord
from limpet.vmm import accel, disks
from limpet.vmm.command import MachineSpec
from limpet.vmm.death import console_tail
from limpet.vmm.disks import Overlay
from limpet.vmm.machine import Machine
from limpet.vmm.network import GuestNetwork

_BOOT_SECONDS = {"kvm": 10.0, "tcg": 40.0}  # from launch to the agent's first answer
_ATTEMPTS = 2
_POLL = 0.01  # seconds between two looks at a guest that still mounts its data disk
_NEEDED_BYTES = 512 << 20  # free space below which nothing is started

_log = log.get("boot")


class Start:
    """One start of one sandbox. `run` gives the running VM, already in the live table."""

    def __init__(self, host: Host, record: SandboxRecord) -> None:
        self._host, self._record = host, record
        self._files = host.paths.sandbox(record.id)
        self._new_disks = False
        self._spec: MachineSpec | None = None
        self._vm: LiveVM | None = None
        self._pong: Pong | None = None

    async def run(self, stages: Stages) -> LiveVM:
        steps = [
            Step("prepare", self._prepare),
            Step("disks", self._make_disks, self._drop_disks),
            Step("boot", self._boot, self._down),
            Step("ports", self._publish, self._withdraw),
            Step("record", self._commit),
        ]
        await pipeline.run(steps, stages)
        assert self._vm is not None
        return self._vm

    async def _prepare(self) -> None:
        """Find the pieces and decide how to run: everything that can be refused before anything is touched."""
        paths, spec = self._host.paths, self._record.spec
        pieces = images.artifacts(paths)
        images.find_image(paths, spec.image)
        durable.require_space(paths.data, _NEEDED_BYTES, "starting a sandbox")
        verdict = await accel.probe(paths.probe, kernel=pieces.kernel, initramfs=pieces.initramfs, key=pieces.key)
        tsc = await accel.tsc_khz(paths.probe, kernel=pieces.kernel) if verdict.accel == "tcg" else None
        files = self._files
        files.root.mkdir(mode=0o700, exist_ok=True)
        files.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._spec = MachineSpec(
            name=self._record.name,
            uuid=machine_uuid(self._record.id),
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
            kernel=pieces.kernel,
            initramfs=pieces.initramfs,
            agent_disk=pieces.agent_disk,
            root_disk=files.root_disk,
            data_disk=files.data_disk,
            intake=files.intake,
            qmp_socket=files.qmp,
            channel_socket=files.channel,
            console_log=files.console_log,
            qemu_log=files.qemu_log,
            lock=files.lock,
            accel=verdict.accel,
            tsc_khz=tsc,
            network=GuestNetwork() if spec.network == "user" else None,
            append=(f"limpet.hostname={self._record.name}",),
        )

    async def _make_disks(self) -> None:
        if self._files.root_disk.exists() and self._files.data_disk.exists():
            disks.create_intake(self._files.intake)
            return
        self._new_disks = True
        image = images.find_image(self._host.paths, self._record.spec.image)
        blank = images.artifacts(self._host.paths).blank_data
        self._files.intake.unlink(missing_ok=True)
        await disks.create_disks(
            [Overlay(self._files.root_disk, image.root)], self._files.intake, copies={self._files.data_disk: blank}
        )

    async def _drop_disks(self) -> None:
        if self._new_disks:
            for disk in (self._files.root_disk, self._files.data_disk, self._files.intake):
                disk.unlink(missing_ok=True)

    async def _boot(self) -> None:
        assert self._spec is not None
        patience = _BOOT_SECONDS[self._spec.accel]
        for attempt in range(1, _ATTEMPTS + 1):
            began = time.monotonic()
            machine = await Machine.launch(self._spec)
            self._vm = LiveVM(self._record.id, machine, self._files)
            try:
                self._pong = await self._answer(self._vm, patience)
                _log.info("booted", sandbox=self._record.name, seconds=round(time.monotonic() - began, 3))
                break
            except LimpetError as error:
                await self._down()
                self._tell_failure(attempt, error.message)
                if attempt == _ATTEMPTS:
                    raise
        if self._pong is not None and self._pong.data != "ready":
            self._tell_failure(_ATTEMPTS, self._pong.data)
            raise FailedPrecondition(
                f"the data disk of {self._record.name} could not be mounted: {self._pong.data}",
                hint=self._where_to_look,
            )

    def _tell_failure(self, attempt: int, reason: str) -> None:
        """The event keeps the console's last lines: a create that fails leaves no log behind."""
        tail = console_tail(self._files.console_log, 5)
        self._host.events.emit("boot.failed", sandbox=self._record, attempt=attempt, reason=reason, console=tail)

    @property
    def _where_to_look(self) -> str:
        new = self._record.incarnation == 0
        return "`limpet events` has the console's last lines" if new else f"limpet logs {self._record.name}"

    async def _answer(self, vm: LiveVM, patience: float) -> Pong:
        """Wait for the agent, or for QEMU's end, or for the deadline."""
        asked = asyncio.create_task(_first_ping(vm, patience))
        ended = asyncio.create_task(vm.machine.wait(None))
        try:
            await asyncio.wait((asked, ended), timeout=patience + 1, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            if ended.done():
                why = vm.explain_death().message
                raise Unavailable(f"the VM ended while it booted: {why}", hint=self._where_to_look)
            raise DeadlineExceeded(
                f"the guest did not answer within {patience:g} s of its start", hint=self._where_to_look
            )
        finally:
            for task in (asked, ended):
                task.cancel()
            await asyncio.gather(asked, ended, return_exceptions=True)

    async def _down(self) -> None:
        if self._vm is not None:
            vm, self._vm = self._vm, None
            await vm.close()
            await stopping.force_down(vm)

    async def _publish(self) -> None:
        assert self._vm is not None
        for mapping in self._record.spec.ports:
            await self._host.ports.publish(self._vm, mapping)

    async def _withdraw(self) -> None:
        await self._host.ports.withdraw(self._record.id)

    async def _commit(self) -> None:
        assert self._vm is not None and self._pong is not None
        self._vm.save_handles()
        self._host.records.update(
            self._record.id,
            state=State.RUNNING,
            boot_id=self._pong.boot_id,
            started_at=datetime.now(UTC),
            incarnation=self._record.incarnation + 1,
            error=None,
        )
        self._host.live.add(self._vm)


async def _first_ping(vm: LiveVM, patience: float) -> Pong:
    """The agent's first answer with its data disk mounted, or found not to be mountable."""
    agent = await vm.agent(patience)
    pong = await agent.ping(set_clock=True, timeout=patience)
    while pong.data == "waiting":
        await asyncio.sleep(_POLL)
        pong = await agent.ping(timeout=patience)
    return pong


def machine_uuid(sandbox_id: str) -> str:
    """A UUID that follows from the sandbox's id: what QEMU is recognised by."""
    import uuid

    return str(uuid.uuid5(uuid.NAMESPACE_OID, sandbox_id))
