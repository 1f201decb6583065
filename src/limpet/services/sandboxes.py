"""The life of a sandbox.

                 create                start
        (none) ────────► creating ──────────────┐
                            │ failed: no trace  ▼
                            ▼               starting ──► running ──► stopping ──► stopped
                         (none)                 │ failed     │                       ▲ │
                                                ▼            │ died: error tells why │ │ start
                                             stopped         └───────► error ────────┘ ▼
                                                                         └──────► starting
        stopped | suspended | error ── rm ──► (none)
        running ⇄ paused, running ⇄ suspended: standing.py

Every change of state happens under the sandbox's lifecycle lock. Verbs return an operation at once; its stages are
streamed. `kill` leaves `stopped`; `error` means that it ended by itself, and `error` in the record says why.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from limpet import images, log
from limpet.crashpoint import crashpoint
from limpet.errors import BadRequest, FailedPrecondition
from limpet.models import (
    CreateRequest,
    KillRequest,
    Operation,
    Sandbox,
    SandboxSpec,
    SetRequest,
    SetResult,
    State,
    StopRequest,
    StopResult,
)
from limpet.names import check_name, new_id, random_name
from limpet.services import garbage, stopping
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.pool import Pool
from limpet.services.records import checked_spec
from limpet.services.starting import Starter
from limpet.store import SandboxRecord

_log = log.get("sandboxes")


class Sandboxes:
    """create, start, stop, restart, kill, set, remove: and watching over those that run."""

    def __init__(self, host: Host, starter: Starter, pool: Pool) -> None:
        self._host, self._starter, self._pool = host, starter, pool

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def list(self, labels: Mapping[str, str]) -> Sequence[Sandbox]:
        records = self._host.records.all()
        return [self._host.view(r) for r in records if labels.items() <= r.spec.labels.items()]

    async def get(self, name: str) -> Sandbox:
        return self._host.view(self._host.records.by_name(name))

    def _view(self, sandbox_id: str) -> Sandbox:
        return self._host.view(self._host.records.by_id(sandbox_id))

    # ── create ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def create(self, request: CreateRequest) -> Operation:
        """Validate, reserve the name, then boot in the background (VM-13). A failed create leaves no trace."""
        image = images.find_image(self._host.paths, request.image)
        asked = request.model_dump(exclude={"name", "start"}, exclude_unset=True)
        spec = checked_spec({**image.info.spec, **asked, "env": {**image.info.spec.get("env", {}), **request.env}})
        name = check_name(request.name) if request.name else self._free_name()
        pooled = await self._pool.claim(name, spec) if request.start else None
        record = pooled or SandboxRecord(new_id("sb"), name, State.CREATING, spec, datetime.now(UTC))
        if pooled is None:
            self._host.records.insert(record)

        async def work(stages: Stages) -> Sandbox:
            try:
                async with self._host.locks.lifecycle(record.id, f"create of {name}"):
                    crashpoint("create.row.after")
                    await self._create(record, stages, start=request.start)
            except BaseException as error:
                await asyncio.shield(self.end_now(record))  # one out of the pool that was not woken
                self._host.forget(record)
                self._host.events.emit("sandbox.create_failed", sandbox=record, reason=str(error))
                raise
            return self._view(record.id)

        return self._host.operations.start("create", name, work)

    async def _create(self, record: SandboxRecord, stages: Stages, *, start: bool) -> None:
        self._host.paths.sandbox(record.id).root.mkdir(mode=0o700, exist_ok=True)
        self._host.events.emit("sandbox.created", sandbox=record)
        if start:
            await self._boot(record, stages)
        else:
            self._host.records.update(record.id, state=State.STOPPED)

    def _free_name(self) -> str:
        taken = {record.name for record in self._host.records.all()}
        return next(name for name in iter(random_name, "") if name not in taken)

    # ── start, stop, restart, kill ───────────────────────────────────────────────────────────────────────────────

    async def start(self, name: str) -> Operation:
        record = self._host.records.by_name(name)

        async def work(stages: Stages) -> Sandbox:
            async with self._host.locks.lifecycle(record.id, "start"):
                await self.ensure_running(record.id, stages)
            return self._view(record.id)

        return self._host.operations.start("start", name, work)

    async def ensure_started(self, sandbox_id: str) -> None:
        """Start it unless it runs, without an operation of its own (for `exec --start`)."""
        if self._host.records.by_id(sandbox_id).state is not State.RUNNING:
            async with self._host.locks.lifecycle(sandbox_id, "start"):
                await self.ensure_running(sandbox_id, Stages.unseen())

    async def ensure_running(self, sandbox_id: str, stages: Stages) -> None:
        """Start it unless it runs, let it go on when it is paused; the caller holds the lifecycle lock."""
        record = self._host.records.by_id(sandbox_id)
        if (vm := self._host.live.get(sandbox_id)) is not None:
            if record.state is State.PAUSED:
                await self._go_on(record, vm)
            return
        self._host.records.update(sandbox_id, state=State.STARTING)
        try:
            await self._boot(record, stages)
        except BaseException as error:
            state = State.STOPPED if record.memory is None else State.SUSPENDED
            self._host.records.update(sandbox_id, state=state, error=f"the last start failed: {error}")
            raise

    async def _go_on(self, record: SandboxRecord, vm: LiveVM) -> None:
        """From a pause: the vCPUs run, the clock is right again."""
        crashpoint("resume.cont.before")
        await vm.machine.qmp("cont", timeout=30)
        crashpoint("resume.cont.after")
        self._host.records.update(record.id, state=State.RUNNING)
        await (await vm.agent()).check_clock()
        self._host.events.emit("sandbox.resumed", sandbox=record)

    async def _boot(self, record: SandboxRecord, stages: Stages) -> None:
        vm = await self._pool.wake(record, stages) or await self._starter.start(record, stages)
        self.watch(vm)
        self._host.events.emit("sandbox.started", sandbox=record, accel=vm.machine.accel)

    async def stop(self, name: str, request: StopRequest) -> Operation:
        record = self._host.records.by_name(name)

        async def work(stages: Stages) -> StopResult:
            async with self._host.locks.lifecycle(record.id, "stop"), stages.run("stop"):
                return await self.stop_now(record, request)

        return self._host.operations.start("stop", name, work)

    async def stop_now(self, record: SandboxRecord, request: StopRequest) -> StopResult:
        """The ladder; the caller holds the lifecycle lock. A refused stop leaves it running."""
        vm = self._host.live.get(record.id)
        if vm is None:
            return StopResult(name=record.name, rung="none", durability="clean")
        if record.state is State.PAUSED:  # its guest has to flush
            await self._go_on(record, vm)
        self._host.records.update(record.id, state=State.STOPPING)
        try:
            crashpoint("stop.flush.before")
            result = await stopping.stop(vm, record.name, force=request.force, timeout=request.timeout)
        except BaseException:
            if vm.machine.alive():
                self._host.records.update(record.id, state=State.RUNNING)
            raise
        crashpoint("stop.off.after")
        await self._ended(vm, record, State.STOPPED, None)
        self._host.events.emit(
            "sandbox.stopped", sandbox=record, rung=result.rung, durability=result.durability, seconds=result.seconds
        )
        return result

    async def restart(self, name: str, request: StopRequest) -> Operation:
        record = self._host.records.by_name(name)
        if record.spec.ephemeral:
            raise FailedPrecondition(f"{name} is ephemeral: stopping removes it", hint="create it without --rm")

        async def work(stages: Stages) -> Sandbox:
            async with self._host.locks.lifecycle(record.id, "restart"):
                async with stages.run("stop"):
                    await self.stop_now(record, request)
                await self.ensure_running(record.id, stages)
            return self._view(record.id)

        return self._host.operations.start("restart", name, work)

    async def kill(self, name: str, request: KillRequest) -> Operation:
        """Signal QEMU at once, without a flush. The sandbox is `stopped` afterwards when the signal ends it."""
        record = self._host.records.by_name(name)
        signum = _signal_number(request.signal)

        async def work(stages: Stages) -> StopResult:
            async with self._host.locks.lifecycle(record.id, "kill"), stages.run("kill"):
                vm = self._host.live.require(record.id, name)
                crashpoint("kill.signal.before")
                vm.ended_by_us = True
                vm.machine.terminate(signum)
                crashpoint("kill.signal.after")
                if not await vm.ended(5.0):
                    vm.ended_by_us = False
                    raise FailedPrecondition(
                        f"{name} still runs 5 s after SIG{request.signal}", hint=f"limpet kill {name}"
                    )
                await self._ended(vm, record, State.STOPPED, None)
                self._host.events.emit("sandbox.killed", sandbox=record, signal=request.signal)
            rung: Literal["sigterm", "sigkill"] = "sigterm" if signum == signal.SIGTERM else "sigkill"
            return StopResult(name=name, rung=rung, durability="killed", at_risk=[*stopping.AT_RISK])

        return self._host.operations.start("kill", name, work)

    # ── set, remove ──────────────────────────────────────────────────────────────────────────────────────────────

    async def set(self, name: str, request: SetRequest) -> SetResult:
        """Change what a sandbox is. Names, env and labels apply at once; vcpus and memory at the next start."""
        record = self._host.records.by_name(name)
        async with self._host.locks.lifecycle(record.id, "set"):
            record = self._host.records.by_id(record.id)
            spec, now, later = _changed(record.spec, request)
            if request.name and request.name != record.name:
                check_name(request.name)
                now.append("name")
            if self._host.live.get(record.id) is None:
                now, later = [*now, *later], []
            if request.dry_run:
                return SetResult(sandbox=self._host.view(record), applied=now, at_next_start=later)
            if spec != record.spec:
                self._host.records.update(record.id, spec=spec)
            if request.name and request.name != record.name:
                self._host.records.update(record.id, name=request.name)
            changed = self._host.records.by_id(record.id)
            self._host.events.emit("sandbox.changed", sandbox=changed, applied=now, at_next_start=later)
            return SetResult(sandbox=self._host.view(changed), applied=now, at_next_start=later)

    async def remove(self, name: str, force: bool) -> Operation:
        """Remove a sandbox and everything of it. A running one only with `force`, after a bounded stop."""
        record = self._host.records.by_name(name)
        if self._host.live.get(record.id) is not None and not force:
            raise FailedPrecondition(f"{name} is running", hint=f"limpet stop {name}, or limpet rm --force {name}")

        async def work(stages: Stages) -> dict[str, Any]:
            async with self._host.locks.lifecycle(record.id, "remove"), stages.run("remove"):
                await self.end_now(record)
                await self._forget(record)
            return {}

        return self._host.operations.start("remove", name, work)

    async def _forget(self, record: SandboxRecord, **why: str) -> None:
        """Remove the row, the files, the checkpoints, and the layers that only they needed."""
        self._host.forget(record)
        crashpoint("rm.checkpoints.before")
        for checkpoint in self._host.catalogue.of(record.id):
            await asyncio.to_thread(self._host.catalogue.forget, checkpoint.info.id)
        await garbage.collect(self._host)
        self._host.events.emit("sandbox.removed", sandbox=record, **why)

    async def end_now(self, record: SandboxRecord, state: State = State.STOPPED) -> None:
        """End the VM, if there is one, without asking the guest; the caller holds the lifecycle lock."""
        if (vm := self._host.live.get(record.id)) is not None:
            crashpoint("end.machine.before")
            await stopping.force_down(vm)
            crashpoint("end.machine.after")
            await self._ended(vm, record, state, None, keep=True)

    # ── watching ─────────────────────────────────────────────────────────────────────────────────────────────────

    def watch(self, vm: LiveVM) -> None:
        """Notice when this VM ends by itself, or by us when what was to follow failed."""
        vm.watcher = asyncio.create_task(self._watch(vm), name=f"watch {vm.sandbox_id}")

    async def _watch(self, vm: LiveVM) -> None:
        await vm.ended()
        with log.operation():
            async with self._host.locks.lifecycle(vm.sandbox_id, "clean-up"):
                record = self._host.records.find(vm.sandbox_id)
                if record is None or self._host.live.get(vm.sandbox_id) is not vm:
                    return
                if vm.ended_by_us:
                    state = State.STOPPED if record.memory is None else State.SUSPENDED
                    await self._ended(vm, record, state, None)
                    return
                death = vm.explain_death()
                clean, reason = death.clean, None if death.clean else death.message
                await self._ended(vm, record, State.STOPPED if clean else State.ERROR, reason)
                if clean:
                    self._host.events.emit("sandbox.stopped", sandbox=record, rung="guest", durability="clean")
                else:
                    self._host.events.emit("sandbox.died", sandbox=record, reason=reason)

    async def _ended(
        self, vm: LiveVM, record: SandboxRecord, state: State, error: str | None, *, keep: bool = False
    ) -> None:
        """Clear away what belonged to a VM that is gone. An ephemeral sandbox goes with it, unless `keep`."""
        self._host.live.drop(record.id)
        await self._host.ports.withdraw(record.id)
        await vm.close()
        await vm.machine.close()
        for leftover in (vm.files.handles, vm.files.intake):
            leftover.unlink(missing_ok=True)
        crashpoint("end.record.before")
        self._host.records.update(record.id, state=state, error=error, boot_id=None)
        if record.spec.ephemeral and not keep:
            await self._forget(record, why="ephemeral")


def _changed(spec: SandboxSpec, request: SetRequest) -> tuple[SandboxSpec, list[str], list[str]]:
    """The new spec, and which fields are in force now and at the next start."""
    fields = spec.model_dump()
    now: list[str] = []
    later: list[str] = []
    for key in ("vcpus", "memory_mib"):
        if (value := getattr(request, key)) is not None and value != fields[key]:
            fields[key] = value
            later.append(key)
    for key in ("ttl", "idle_timeout", "idle_suspend", "user", "workdir"):
        if (value := getattr(request, key)) is not None:
            fields[key] = value or None
            now.append(key)
    if request.every_exec is not None:
        fields["every_exec"] = request.every_exec
        now.append("every_exec")
    for key in ("env", "labels"):
        if (changes := getattr(request, key)) is not None:
            merged = {**fields[key], **changes}
            fields[key] = {k: v for k, v in merged.items() if v is not None}
            now.append(key)
    return checked_spec(fields), now, later


def _signal_number(name: str) -> int:
    """A signal by name (`KILL`, `SIGTERM`) or number. Raises BadRequest."""
    text = name.upper().removeprefix("SIG")
    try:
        return int(text) if text.isdigit() and signal.Signals(int(text)) else signal.Signals[f"SIG{text}"].value
    except (KeyError, ValueError):
        raise BadRequest(f"{name!r} is not a signal", hint="for example KILL, TERM or 9") from None
