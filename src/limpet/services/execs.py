"""Commands in guests: started, followed, left and found again. A client that goes never ends a command (GST-6)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Literal

from limpet import guest
from limpet.errors import FailedPrecondition
from limpet.guest import GuestExec
from limpet.guest.agent import INTERNAL
from limpet.models import ExecInfo, ExecRequest, State
from limpet.names import new_id
from limpet.services import checkpointing, workspaces
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.retention import superfluous
from limpet.services.sandboxes import Sandboxes
from limpet.services.streams import STDERR, STDOUT, ExecEvent, Exit, Gap, Lane, Notice, Output, Started
from limpet.store import SandboxRecord

_DRIFT_KNOWN = 15.0  # seconds for which an answer about the host directory holds
_LABEL = 100  # characters of a command that label its checkpoint
_LANES: dict[str, Lane] = {"stdout": STDOUT, "stderr": STDERR}


class Session:
    """A client attached to a command: what the guest says, as events; and the VM counted as in use meanwhile."""

    def __init__(
        self,
        host: Host,
        record: SandboxRecord,
        vm: LiveVM,
        started: Started,
        command: GuestExec | None,
        drift: asyncio.Task[str | None] | None = None,
    ) -> None:
        self._host, self._record = host, record
        self._drift = drift  # looked at when it is known; no command waits for it (WS-6)
        self._started = started
        self._command = command  # None: started detached, there is nothing to follow
        self._in_use = contextlib.ExitStack()
        if command is not None:
            self._in_use.enter_context(vm.in_use())

    async def __aiter__(self) -> AsyncIterator[ExecEvent]:
        yield self._started
        if self._command is None:
            return
        async for event in self._command.events():
            if (notice := self._notice_of_drift()) is not None:
                yield notice
            match event:
                case guest.Output():
                    yield Output(STDERR if event.lane == STDERR else STDOUT, event.data)
                case guest.Gap():
                    yield Gap(_LANES.get(event.lane, STDOUT), event.start, event.end)
                case guest.Exit():
                    self._note_end(event.info)
                    yield Exit(event.info)

    def _notice_of_drift(self) -> Notice | None:
        """That the host directory moved on since the import, once it is known; told once."""
        if self._drift is None or not self._drift.done():
            return None
        drift, self._drift = self._drift, None
        why = None if drift.cancelled() or drift.exception() else drift.result()
        if why is None:
            return None
        return Notice(f"the host directory changed since it was imported: {why}", "--sync imports it again")

    def _note_end(self, info: ExecInfo) -> None:
        ended = {"exec_id": info.id, "exit_code": info.exit_code, "signal": info.signal}
        self._host.events.emit("exec.ended", sandbox=self._record, **ended)

    async def write_stdin(self, data: bytes) -> None:
        if self._command is not None:
            await self._command.send_stdin(data)

    async def close_stdin(self) -> None:
        if self._command is not None:
            await self._command.close_stdin()

    async def resize(self, rows: int, cols: int) -> None:
        if self._command is not None:
            await self._command.resize(rows, cols)

    async def signal(self, signal: str) -> None:
        if self._command is not None:
            await self._command.signal(signal)

    async def detach(self) -> None:
        self._in_use.close()
        if self._command is not None:
            await self._command.detach()


class Execs:
    def __init__(self, host: Host, sandboxes: Sandboxes) -> None:
        self._host, self._sandboxes = host, sandboxes
        self._drifts: dict[str, tuple[float, str | None, asyncio.Task[str | None]]] = {}

    async def start(self, name: str, request: ExecRequest, *, start_if_stopped: bool) -> Session:
        """Start a command in the workspace, if there is one and no directory is given; with the sandbox's variables
        under the command's own."""
        record = self._host.records.by_name(name)
        if start_if_stopped or record.state in (State.PAUSED, State.SUSPENDED):
            await self._sandboxes.ensure_started(record.id)
        vm = self._host.live.require(record.id, name)
        if record.spec.every_exec:
            await self._checkpoint(record, request)
        cwd = request.cwd or record.spec.workdir or _workspace_directory(record)
        options = request.model_dump(exclude={"argv", "cwd", "env", "detach"})
        options["user"] = request.user or record.spec.user
        exec_id = new_id("ex")
        with vm.in_use():
            agent = await vm.agent()
            run = agent.exec_detached if request.detach else agent.exec
            env = {**record.spec.env, **request.env}
            command = await run(request.argv, ident=exec_id, cwd=cwd, env=env, **options)
        self._host.events.emit("exec.started", sandbox=record, exec_id=exec_id, argv=request.argv[:16])
        followed = command if isinstance(command, GuestExec) else None
        return Session(self._host, record, vm, Started(exec_id, command.pid), followed, self._drift_of(record))

    async def _checkpoint(self, record: SandboxRecord, request: ExecRequest) -> None:
        """A disk checkpoint before the command, labelled with it; the ladder thins out older ones."""
        host = self._host
        async with host.locks.lifecycle(record.id, "checkpoint"):
            label = " ".join(request.argv)[:_LABEL]
            await checkpointing.make(host, host.records.by_id(record.id), label=label, disk_only=True, made_by="exec")
        own = [known.info for known in host.catalogue.of(record.id) if known.info.made_by == "exec"]
        for doomed in superfluous(own, datetime.now(UTC)):
            await asyncio.to_thread(host.catalogue.forget, doomed.id)

    def _drift_of(self, record: SandboxRecord) -> asyncio.Task[str | None] | None:
        """Whether the host directory moved, found out beside the command; known for a while, as it reads the tree."""
        if record.workspace is None:
            return None
        imported = record.workspace.fingerprint
        since, of, task = self._drifts.get(record.id, (0.0, None, None))
        if task is None or of != imported or time.monotonic() - since > _DRIFT_KNOWN:
            task = asyncio.create_task(workspaces.drift(record.workspace), name=f"drift of {record.name}")
            self._drifts[record.id] = (time.monotonic(), imported, task)
        return task

    async def attach(
        self, name: str, exec_id: str, *, stdout: int | None, stderr: int | None, stdin: bool, steal: bool
    ) -> Session:
        """Follow a command again. Raises NotFound, Busy when another client has its input."""
        record = self._host.records.by_name(name)
        vm = self._host.live.require(record.id, name)
        agent = await vm.agent()
        command = await agent.attach(exec_id, stdout=stdout, stderr=stderr, stdin=stdin, steal=steal)
        return Session(self._host, record, vm, Started(command.id, command.pid), command)

    async def list(self, name: str) -> Sequence[ExecInfo]:
        """Commands of users; those that limpet runs for itself are left out."""
        found = await (await self._vm(name).agent()).execs()
        return [info for info in found if not info.id.startswith(f"{INTERNAL}_")]

    async def get(self, name: str, exec_id: str) -> ExecInfo:
        return await (await self._vm(name).agent()).get_exec(exec_id)

    async def signal(self, name: str, exec_id: str, signal: str) -> None:
        await (await self._vm(name).agent()).signal(exec_id, signal)

    async def output(
        self, name: str, exec_id: str, lane: Literal["stdout", "stderr"], offset: int
    ) -> AsyncIterator[bytes]:
        """What is kept of one lane from `offset` up to now; it does not wait for more."""
        agent = await self._vm(name).agent()
        info = await agent.get_exec(exec_id)
        end, start = (
            (info.stdout_bytes, info.stdout_start) if lane == "stdout" else (info.stderr_bytes, info.stderr_start)
        )
        position = max(offset, start)
        wanted = {"stdout": None, "stderr": None, lane: position}
        command = await agent.attach(exec_id, stdout=wanted["stdout"], stderr=wanted["stderr"])

        async def kept() -> AsyncIterator[bytes]:
            left = end - position
            try:
                if left <= 0:
                    return
                async for event in command.events():
                    if isinstance(event, guest.Gap):
                        left -= event.end - event.start
                    elif isinstance(event, guest.Output):
                        yield event.data[:left]
                        left -= len(event.data)
                    if left <= 0:
                        return
            finally:
                await command.detach()

        return kept()

    def _vm(self, name: str) -> LiveVM:
        return self._host.live.require(self._host.records.by_name(name).id, name)


def _workspace_directory(record: SandboxRecord) -> str | None:
    """Where commands begin. Raises FailedPrecondition when the import was cut off."""
    if record.workspace is None:
        return None
    if record.workspace.status != "complete":
        raise FailedPrecondition(
            f"the workspace of {record.name} is only partly there: its import was cut off",
            hint=f"limpet import {record.name} {record.workspace.host_dir}",
        )
    return record.workspace.guest_dir
