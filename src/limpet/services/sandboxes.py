"""The life of a sandbox.

                 create                start
        (none) ────────► creating ──────────────┐
                            │ failed: no trace  ▼
                            ▼               starting ──► running ──► stopping ──► stopped
                         (none)                 │ failed     │                       ▲ │
                                                ▼            │ died: error tells why │ │ start
                                             stopped         └───────► error ────────┘ ▼
                                                                         └──────► starting
        stopped | suspended | error ── rm ──► trashed ── undelete ──► as before (trash.py)
        running ⇄ paused, running ⇄ suspended: standing.py

Every change of state happens under the sandbox's lifecycle lock. Verbs return an operation at once; its stages are
streamed. `kill` leaves `stopped`; `error` means that it ended by itself, and `error` in the record says why.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from limpet import images, log
from limpet.crashpoint import crashpoint
from limpet.errors import BadRequest, FailedPrecondition, LimpetError
from limpet.models import (
    CreateRequest,
    KillRequest,
    Operation,
    Sandbox,
    SetRequest,
    SetResult,
    State,
    StopRequest,
    StopResult,
)
from limpet.names import check_name, new_id, random_name
from limpet.services import capacity, imagebuild, stopping, trash
from limpet.services.diskfull import DiskWatch
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.pool import Pool
from limpet.services.records import changed_spec, checked_spec
from limpet.services.starting import Starter
from limpet.services.syncing import Syncing
from limpet.store import SandboxRecord

_LEAST_PUBLISH_S = 2.0  # for the last publication to host directories
_LAST_S = 15.0  # for a sandbox that is removed while it runs to bring its data to the disks
_log = log.get("sandboxes")


class Sandboxes:
    """create, start, stop, restart, kill, set, remove: and watching over those that run."""

    def __init__(self, host: Host, starter: Starter, pool: Pool, syncing: Syncing) -> None:
        self._host, self._starter, self._pool, self._syncing = host, starter, pool, syncing
        self._disks = DiskWatch(host)

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
        image = images.named(self._host.paths, request.image)
        asked = request.model_dump(exclude={"name", "start", "payloads"}, exclude_unset=True)
        spec = checked_spec({**image.spec, **asked, "env": {**image.spec.get("env", {}), **request.env}})
        name = check_name(request.name) if request.name else self._free_name()
        payloads = self._host.payloads.checked(request.payloads)
        recipe = image if isinstance(image, images.Recipe) else None
        pooled = await self._pool.claim(name, spec) if request.start and not payloads and recipe is None else None
        if request.start and pooled is None:
            capacity.admit(self._host.paths, spec)
        record = pooled or SandboxRecord(new_id("sb"), name, State.CREATING, spec, datetime.now(UTC), payloads=payloads)
        if pooled is None:
            self._host.records.insert(record)

        async def work(stages: Stages) -> Sandbox:
            try:
                async with self._host.locks.lifecycle(record.id, f"create of {name}"):
                    crashpoint("create.row.after")
                    if recipe is not None:
                        await imagebuild.build(self._host, recipe, stages)
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
            elif vm.stall is not None:
                await self._disks.go_on(record, vm)
            return
        capacity.admit(self._host.paths, record.spec)
        self._host.records.update(sandbox_id, state=State.STARTING)
        try:
            await self._boot(record, stages)
        except BaseException as error:
            state = State.STOPPED if record.memory is None else State.SUSPENDED
            self._host.records.update(sandbox_id, state=state, error=f"the last start failed: {error}")
            raise

    async def _go_on(self, record: SandboxRecord, vm: LiveVM) -> None:
        """From a pause: the vCPUs run, the clock is right again."""
        await vm.run()
        self._host.records.update(record.id, state=State.RUNNING)
        self._syncing.go_on(record.id)
        await (await vm.agent()).check_clock()
        self._host.events.emit("sandbox.resumed", sandbox=record)

    async def _boot(self, record: SandboxRecord, stages: Stages) -> None:
        vm = await self._pool.wake(record, stages) or await self._starter.start(record, stages)
        await self.watch(vm)
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
            result = await stopping.stop(
                vm, record.name, force=request.force, timeout=request.timeout, final=self._last_sync
            )
        except BaseException:
            if vm.machine.alive():
                self._host.records.update(record.id, state=State.RUNNING)
                self._syncing.go_on(record.id)
                self._host.payloads.go_on(record.id)
                self._host.engines.go_on(vm)
            raise
        crashpoint("stop.off.after")
        await self._ended(vm, record, State.STOPPED, None)
        self._host.events.emit(
            "sandbox.stopped", sandbox=record, rung=result.rung, durability=result.durability, seconds=result.seconds
        )
        return result

    async def _last_sync(self, vm: LiveVM, timeout: float) -> tuple[int | None, str | None]:
        """To the vault, and from there to the host directories of payloads (PAY-7)."""
        began = time.monotonic()
        generation, problem = await self._syncing.final(vm, timeout)
        left = max(timeout - (time.monotonic() - began), _LEAST_PUBLISH_S)
        unpublished = await self._host.payloads.final(vm.sandbox_id, left)
        return generation, "; ".join(reason for reason in (problem, unpublished) if reason) or None

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
            spec, now, later = changed_spec(record.spec, request)
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

    async def remove(self, name: str, force: bool, purge: bool = False) -> Operation:
        """Move a sandbox to the trash; with `purge`, and when it is ephemeral, delete it for good. A running one only
        with `force`, after a bounded stop."""
        record = self._host.records.by_name(name)
        if self._host.live.get(record.id) is not None and not force:
            raise FailedPrecondition(f"{name} is running", hint=f"limpet stop {name}, or limpet rm --force {name}")
        for_good = purge or record.spec.ephemeral or self._host.config.trash_days == 0

        async def work(stages: Stages) -> dict[str, Any]:
            async with self._host.locks.lifecycle(record.id, "remove"), stages.run("remove"):
                await self._remove(self._host.records.by_id(record.id), for_good)
            return {}

        return self._host.operations.start("remove", name, work)

    async def _remove(self, record: SandboxRecord, for_good: bool) -> None:
        if for_good and not record.payloads:
            await self.end_now(record)
        else:
            await self._end_gently(record)
        if (ended := self._host.records.find(record.id)) is None:
            return  # an ephemeral one went with its VM
        if for_good:
            await self._purge(ended)
        else:
            trash.put(self._host, ended)

    async def _end_gently(self, record: SandboxRecord) -> None:
        """What comes out of the trash, and what payloads leave on the host, has everything that was written, if the
        guest still answers."""
        try:
            await self.stop_now(record, StopRequest(force=True, timeout=_LAST_S))
        except LimpetError as error:
            _log.warning("not stopped gently", sandbox=record.name, reason=error.message)
            await self.end_now(record)

    async def _purge(self, record: SandboxRecord, **why: str) -> None:
        await trash.purge(self._host, record)
        self._host.events.emit("sandbox.removed", sandbox=record, **why)

    async def end_now(self, record: SandboxRecord, state: State = State.STOPPED) -> None:
        """End the VM, if there is one, without asking the guest; the caller holds the lifecycle lock."""
        if (vm := self._host.live.get(record.id)) is not None:
            crashpoint("end.machine.before")
            await stopping.force_down(vm)
            crashpoint("end.machine.after")
            await self._ended(vm, record, state, None, keep=True)

    # ── watching ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def watch(self, vm: LiveVM) -> None:
        """Notice when this VM ends by itself, or by us when what was to follow failed; and when it stands still. Bring
        what it writes to the host meanwhile, and serve its Docker API here."""
        self._disks.watch(vm)
        vm.watcher = asyncio.create_task(self._watch(vm), name=f"watch {vm.sandbox_id}")
        self._syncing.join(vm)
        if (record := self._host.records.find(vm.sandbox_id)) is not None:
            self._host.payloads.begin(record)
        await self._host.docker_sockets.open(vm)

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
        await self._syncing.leave(record.id)
        await self._host.payloads.release(self._host.records.by_id(record.id))
        await self._host.ports.withdraw(record.id)
        await self._host.docker_sockets.close(record.id)
        await vm.close()
        await vm.machine.close()
        for leftover in (vm.files.handles, vm.files.intake):
            leftover.unlink(missing_ok=True)
        crashpoint("end.record.before")
        self._host.records.update(record.id, state=state, error=error, boot_id=None)
        if record.spec.ephemeral and not keep:
            await self._purge(record, why="ephemeral")


def _signal_number(name: str) -> int:
    """A signal by name (`KILL`, `SIGTERM`) or number. Raises BadRequest."""
    text = name.upper().removeprefix("SIG")
    try:
        return int(text) if text.isdigit() and signal.Signals(int(text)) else signal.Signals[f"SIG{text}"].value
    except (KeyError, ValueError):
        raise BadRequest(f"{name!r} is not a signal", hint="for example KILL, TERM or 9") from None
