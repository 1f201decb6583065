"""Starting a VM: named steps, each with its undo (VM-6).

    preflight → disks → prepare → boot (launch, wait for the agent; retried once) → seed → ports → record

A start boots the kernel, or goes on from a memory image (its *origin*: a template's or a checkpoint's, found to be
whole), which is renewed before anybody can use it. A boot has a deadline: one that stalls is killed, tried once more,
and reported in the events. When a step fails, the undos run in reverse and nothing of this start is left, except disks
that were there before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from limpet import images, log
from limpet.crashpoint import crashpoint
from limpet.errors import DeadlineExceeded, FailedPrecondition, LimpetError, Unavailable
from limpet.guest import Pong
from limpet.models import State
from limpet.services import capacity, disks, identity, pipeline, stopping
from limpet.services.disks import Disks
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.pipeline import Step
from limpet.store import SandboxRecord
from limpet.vmm import accel
from limpet.vmm.command import MachineSpec
from limpet.vmm.death import console_tail
from limpet.vmm.disks import create_intake
from limpet.vmm.machine import Machine
from limpet.vmm.memory import MemoryImage
from limpet.vmm.network import GuestNetwork

_BOOT_SECONDS = {"kvm": 10.0, "tcg": 40.0}  # from launch to the agent's first answer
_RESUME_SECONDS = 15.0  # the same from a memory image
_ATTEMPTS = 2
_POLL = 0.01  # seconds between two looks at a guest that still mounts its data disk

T = TypeVar("T")
_log = log.get("boot")


class Start:
    """One start of one sandbox. `run` gives the running VM, already in the live table. `make_disks` makes what a
    sandbox without disks begins with (default: fresh ones on its image)."""

    def __init__(
        self,
        host: Host,
        record: SandboxRecord,
        origin: MemoryImage | None = None,
        make_disks: Callable[[], Awaitable[Disks]] | None = None,
    ) -> None:
        self._host, self._record, self._origin = host, record, origin
        self._fresh = make_disks or (lambda: disks.fresh(host, record))
        self._files = host.paths.sandbox(record.id)
        self._made: Disks | None = None
        self._spec: MachineSpec | None = None
        self._vm: LiveVM | None = None
        self._boot_id = ""
        self._taken = not record.payloads

    @property
    def origin_at_fault(self) -> bool:
        """Whether a failure may be the fault of what it was started from: not before the payloads were taken, nor once
        the guest has answered."""
        return self._taken and not self._boot_id

    async def run(self, stages: Stages) -> LiveVM:
        host, payloads = self._host, self._record.payloads
        preflight = Step("preflight", self._take_payloads, lambda: host.payloads.release(self._record))
        steps = [
            *([preflight] if payloads else []),
            Step("disks", self._make_disks, self._drop_disks),
            Step("prepare", self._prepare),
            Step("boot", self._resume if self._origin else self._boot, self._down),
            *([Step("seed", self._attach_payloads)] if payloads or await host.payloads.leftovers(self._record) else []),
            Step("ports", self._publish, self._withdraw),
            Step("record", self._commit),
        ]
        with self._host.layers.building():
            await pipeline.run(steps, stages)
        assert self._vm is not None
        return self._vm

    async def _take_payloads(self) -> None:
        """Before anything is made: what cannot be published to must not be worked on (PAY-9)."""
        await self._host.payloads.lock(self._record)
        self._taken = True

    async def _attach_payloads(self) -> None:
        """Before anybody can use it, so that programs find their files (PAY-1)."""
        assert self._vm is not None
        warm = self._origin is not None and self._made is None  # not a template: programs of its own run in it
        await self._host.payloads.attach(self._vm, self._record, warm=warm)

    async def _make_disks(self) -> None:
        capacity.require_disk(self._host.paths)
        if self._record.disks is not None:
            return
        crashpoint("start.disks.before")
        self._made = await self._fresh()
        crashpoint("start.disks.after")
        self._record = self._host.records.update(self._record.id, disks=self._made)
        crashpoint("start.disks.recorded")

    async def _drop_disks(self) -> None:
        if self._made is not None:
            self._host.records.update(self._record.id, disks=None)
            self._host.layers.drop(*self._made.values())

    async def _prepare(self) -> None:
        """Find the pieces and decide how to run: everything that can be refused before a machine is started."""
        paths, spec, files, given = self._host.paths, self._record.spec, self._files, self._record.disks
        assert given is not None
        pieces = images.artifacts(paths)
        verdict = await accel.probe(paths.probe, kernel=pieces.kernel, initramfs=pieces.initramfs, key=pieces.key)
        tsc = await accel.tsc_khz(paths.probe, kernel=pieces.kernel) if verdict.accel == "tcg" else None
        files.root.mkdir(mode=0o700, exist_ok=True)
        files.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_intake(files.intake)
        me = identity.of(self._record)
        self._spec = MachineSpec(
            name=me.hostname,
            uuid=identity.machine_uuid(self._record.id),
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
            kernel=pieces.kernel,
            initramfs=pieces.initramfs,
            agent_disk=self._own_agent_disk(self._origin.agent_disk if self._origin else pieces.agent_disk),
            root_disk=self._host.layers.path(given["root"]),
            data_disk=self._host.layers.path(given["data"]),
            intake=files.intake,
            qmp_socket=files.qmp,
            channel_socket=files.channel,
            console_log=files.console_log,
            qemu_log=files.qemu_log,
            lock=files.lock,
            accel=verdict.accel,
            tsc_khz=tsc,
            network=GuestNetwork() if spec.network == "user" else None,
            append=(f"limpet.hostname={me.hostname}", f"limpet.machine_id={me.machine_id}"),
            memory=self._origin,
        )

    def _own_agent_disk(self, source: Path) -> Path:
        """The agent disk under a name that lasts as long as the VM, for memory images that are made of it: the image
        that it goes on from may be gone by then. One on another file system, in the cache, keeps its name."""
        own = self._files.agent_disk
        own.unlink(missing_ok=True)
        try:
            own.hardlink_to(source)
        except OSError:
            return source
        return own

    async def _resume(self) -> None:
        """Go on from the memory image, as somebody new."""
        assert self._spec is not None
        crashpoint("start.launch.before")
        vm = self._vm = LiveVM(self._record.id, await Machine.launch(self._spec), self._files)
        crashpoint("start.launch.after")
        await vm.machine.qmp("cont", timeout=_RESUME_SECONDS)
        self._boot_id = await self._answered(vm, identity.renew(vm, self._record, _RESUME_SECONDS), _RESUME_SECONDS)

    async def _boot(self) -> None:
        assert self._spec is not None
        patience = _BOOT_SECONDS[self._spec.accel]
        pong: Pong | None = None
        for attempt in range(1, _ATTEMPTS + 1):
            began = time.monotonic()
            crashpoint("start.launch.before")
            self._vm = LiveVM(self._record.id, await Machine.launch(self._spec), self._files)
            crashpoint("start.launch.after")
            try:
                pong = await self._answered(self._vm, _first_ping(self._vm, patience), patience)
                _log.info("booted", sandbox=self._record.name, seconds=round(time.monotonic() - began, 3))
                break
            except LimpetError as error:
                await self._down()
                self._tell_failure(attempt, error.message)
                if attempt == _ATTEMPTS:
                    raise
        assert pong is not None
        if pong.data != "ready":
            reason = pong.data.removeprefix("failed: ")
            self._tell_failure(_ATTEMPTS, reason)
            raise FailedPrecondition(
                f"the data disk of {self._record.name} could not be mounted: {reason}", hint=self._where_to_look
            )
        self._boot_id = pong.boot_id

    def _tell_failure(self, attempt: int, reason: str) -> None:
        """The event keeps the console's last lines: a create that fails leaves no log behind."""
        tail = console_tail(self._files.console_log, 5)
        self._host.events.emit("boot.failed", sandbox=self._record, attempt=attempt, reason=reason, console=tail)

    @property
    def _where_to_look(self) -> str:
        new = self._record.incarnation == 0
        return "`limpet events` has the console's last lines" if new else f"limpet logs {self._record.name}"

    async def _answered(self, vm: LiveVM, question: Coroutine[Any, Any, T], patience: float) -> T:
        """Wait for the agent, or for QEMU's end, or for the deadline."""
        asked = asyncio.create_task(question)
        ended = asyncio.create_task(vm.machine.wait(None))
        try:
            await asyncio.wait((asked, ended), timeout=patience + 1, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            if ended.done():
                why = vm.explain_death().message
                raise Unavailable(f"the VM ended while it started: {why}", hint=self._where_to_look)
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
        assert self._vm is not None
        self._vm.save_handles()
        crashpoint("start.record.before")
        self._host.records.update(
            self._record.id,
            state=State.RUNNING,
            boot_id=self._boot_id,
            started_at=datetime.now(UTC),
            incarnation=self._record.incarnation + 1,
            error=None,
            memory=None,  # what it was suspended to is used up, in the same instant
        )
        crashpoint("start.record.after")
        self._host.live.add(self._vm)


async def _first_ping(vm: LiveVM, patience: float) -> Pong:
    """The agent's first answer with its data disk mounted, or found not to be mountable."""
    agent = await vm.agent(patience)
    pong = await agent.ping(set_clock=True, timeout=patience)
    while pong.data == "waiting":
        await asyncio.sleep(_POLL)
        pong = await agent.ping(timeout=patience)
    return pong
