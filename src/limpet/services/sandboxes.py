"""The life of a sandbox.

                 create                start
        (none) ────────► creating ──────────────┐
                            │ failed: no trace  ▼
                            ▼               starting ──► running ──► stopping ──► stopped
                         (none)                 │ failed     │                       ▲ │
                                                ▼            │ died: error tells why │ │ start
                                             stopped         └───────► error ────────┘ ▼
                                                                         └──────► starting
        stopped | error ── rm ──► (none)

Every change of state happens under the sandbox's lifecycle lock. Verbs return an operation at once; its stages are
streamed. `kill` leaves `stopped`; `error` means that it ended by itself, and `error` in the record says why.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from limpet import durable, images, log
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
from limpet.services import stopping
from limpet.services.boot import Start
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.records import checked_spec
from limpet.store import SandboxRecord

_log = log.get("sandboxes")


class Sandboxes:
    """create, start, stop, restart, kill, set, remove: and watching over those that run."""

    def __init__(self, host: Host) -> None:
        self._host = host

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
        fields = request.model_dump(exclude={"name", "start"})
        spec = checked_spec(fields)
        images.find_image(self._host.paths, spec.image)
        name = check_name(request.name) if request.name else self._free_name()
        record = SandboxRecord(new_id("sb"), name, State.CREATING, spec, datetime.now(UTC))
        self._host.records.insert(record)

        async def work(stages: Stages) -> Sandbox:
            try:
                async with self._host.locks.lifecycle(record.id, f"create of {name}"):
                    await self._create(record, stages, start=request.start)
            except BaseException as error:
                self.forget(record)
                self._host.events.emit("sandbox.create_failed", sandbox=record, reason=str(error))
                raise
            return self._view(record.id)

        return self._host.operations.start("create", name, work)

    async def _create(self, record: SandboxRecord, stages: Stages, *, start: bool) -> None:
        self._host.paths.sandbox(record.id).root.mkdir(mode=0o700)
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
        if self._host.live.get(sandbox_id) is None:
            async with self._host.locks.lifecycle(sandbox_id, "start"):
                await self.ensure_running(sandbox_id, Stages(lambda _stages: None))

    async def ensure_running(self, sandbox_id: str, stages: Stages) -> None:
        """Start it unless it runs; the caller holds the lifecycle lock."""
        record = self._host.records.by_id(sandbox_id)
        if self._host.live.get(sandbox_id) is not None:
            return
        self._host.records.update(sandbox_id, state=State.STARTING)
        try:
            await self._boot(record, stages)
        except BaseException as error:
            self._host.records.update(sandbox_id, state=State.STOPPED, error=f"the last start failed: {error}")
            raise

    async def _boot(self, record: SandboxRecord, stages: Stages) -> None:
        vm = await Start(self._host, record).run(stages)
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
        self._host.records.update(record.id, state=State.STOPPING)
        try:
            result = await stopping.stop(vm, record.name, force=request.force, timeout=request.timeout)
        except BaseException:
            if vm.machine.alive():
                self._host.records.update(record.id, state=State.RUNNING)
            raise
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
                vm.ended_by_us = True
                vm.machine.terminate(signum)
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
            spec, now, later = _changed(record.spec, request)
            if spec != record.spec:
                self._host.records.update(record.id, spec=spec)
            if request.name and request.name != record.name:
                self._host.records.update(record.id, name=check_name(request.name))
                now.append("name")
            changed = self._host.records.by_id(record.id)
            if self._host.live.get(record.id) is None:
                now, later = [*now, *later], []
            self._host.events.emit("sandbox.changed", sandbox=changed, applied=now, at_next_start=later)
            return SetResult(sandbox=self._host.view(changed), applied=now, at_next_start=later)

    async def remove(self, name: str, force: bool) -> Operation:
        """Remove a sandbox and everything of it. A running one only with `force`, after a bounded stop."""
        record = self._host.records.by_name(name)
        if self._host.live.get(record.id) is not None and not force:
            raise FailedPrecondition(f"{name} is running", hint=f"limpet stop {name}, or limpet rm --force {name}")

        async def work(stages: Stages) -> dict[str, Any]:
            async with self._host.locks.lifecycle(record.id, "remove"), stages.run("remove"):
                if (vm := self._host.live.get(record.id)) is not None:
                    await stopping.force_down(vm)
                    await self._ended(vm, record, State.STOPPED, None, keep=True)
                self.forget(record)
                self._host.events.emit("sandbox.removed", sandbox=record)
            return {}

        return self._host.operations.start("remove", name, work)

    def forget(self, record: SandboxRecord) -> None:
        """The row goes first: a crash in between leaves a directory that doctor reports, never half a sandbox."""
        self._host.records.delete(record.id)
        files = self._host.paths.sandbox(record.id)
        durable.remove_tree(files.root)
        durable.remove_tree(files.sockets)

    # ── watching ─────────────────────────────────────────────────────────────────────────────────────────────────

    def watch(self, vm: LiveVM) -> None:
        """Notice when this VM ends by itself."""
        vm.watcher = asyncio.create_task(self._watch(vm), name=f"watch {vm.sandbox_id}")

    async def _watch(self, vm: LiveVM) -> None:
        await vm.ended()
        if vm.ended_by_us:
            return
        with log.operation():
            async with self._host.locks.lifecycle(vm.sandbox_id, "clean-up"):
                record = self._host.records.find(vm.sandbox_id)
                if record is None or self._host.live.get(vm.sandbox_id) is not vm:
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
        self._host.records.update(record.id, state=state, error=error, boot_id=None)
        if record.spec.ephemeral and not keep:
            self.forget(record)
            self._host.events.emit("sandbox.removed", sandbox=record, why="ephemeral")


def _changed(spec: SandboxSpec, request: SetRequest) -> tuple[SandboxSpec, list[str], list[str]]:
    """The new spec, and which fields are in force now and at the next start."""
    fields = spec.model_dump()
    now: list[str] = []
    later: list[str] = []
    for key in ("vcpus", "memory_mib"):
        if (value := getattr(request, key)) is not None and value != fields[key]:
            fields[key] = value
            later.append(key)
    for key in ("ttl", "idle_timeout"):
        if (value := getattr(request, key)) is not None:
            fields[key] = value or None
            now.append(key)
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
