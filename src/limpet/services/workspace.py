"""The workspace of a sandbox: a host directory brought in, its changes shown, taken back and applied.

Long guest I/O runs under the workspace lock, never under the lifecycle lock (VM-11). An import is first recorded as
`partial`, then done, then recorded as `complete` (VM-12): what a crash cut off is never taken for whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from limpet.errors import FailedPrecondition, LimpetError
from limpet.guest import Agent, Exit, Output
from limpet.guest.agent import INTERNAL
from limpet.models import (
    ApplyRequest,
    ApplyResult,
    Changes,
    Drift,
    ImportRequest,
    ImportResult,
    Operation,
    WorkspaceInfo,
)
from limpet.names import new_id
from limpet.services import workspaces
from limpet.services.host import Host
from limpet.services.operations import Stages
from limpet.services.streams import STDOUT, PatchBody
from limpet.store import SandboxRecord


class GuestShell:
    """What `workspaces` needs of a guest, out of the agent's operations."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.run = agent.run
        self.unpack = agent.unpack

    async def stream(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> AsyncIterator[bytes]:
        """A command's standard output as it comes; leaving early ends the command."""
        command = await self._agent.exec(argv, user=user, cwd=cwd, env=env, timeout=timeout, ident=new_id(INTERNAL))
        ended = False
        try:
            async for event in command.events():
                if isinstance(event, Output) and event.lane == STDOUT:
                    yield event.data
                ended = isinstance(event, Exit)
        finally:
            if not ended:
                with contextlib.suppress(LimpetError):
                    await command.signal("TERM")  # its traps clean up
            await command.detach()


def _partial(plan: workspaces.ImportPlan) -> WorkspaceInfo:
    """The record of an import that has begun."""
    return WorkspaceInfo(
        host_dir=str(plan.top),
        guest_dir=f"{workspaces.ROOT}/{workspaces.guest_name_for(plan.top)}",
        status="partial",
        kind=plan.kind,
        files=plan.files,
        bytes=plan.bytes,
    )


class Workspaces:
    def __init__(self, host: Host) -> None:
        self._host = host

    async def import_dir(self, name: str, request: ImportRequest) -> Operation:
        """Bring a directory in; with `dry_run` only say what would be copied."""
        record = self._host.records.by_name(name)

        async def work(stages: Stages) -> ImportResult:
            if request.dry_run:
                return await self._dry_run(request)
            async with self._host.locks.workspace(record.id, f"import into {name}"):
                return await self._import(record, request, stages)

        return self._host.operations.start("import", name, work)

    async def _dry_run(self, request: ImportRequest) -> ImportResult:
        plan = await workspaces.plan_import(request.host_dir, request.untracked)
        info = _partial(plan)
        return ImportResult(
            workspace=info, files=plan.files, bytes=plan.bytes, paths=plan.paths, warnings=plan.warnings
        )

    async def _import(self, record: SandboxRecord, request: ImportRequest, stages: Stages) -> ImportResult:
        self._host.live.require(record.id, record.name)
        async with stages.run("read"):
            plan = await workspaces.plan_import(request.host_dir, request.untracked)
        began = _partial(plan)
        if record.workspace is not None and not request.replace:
            await self._check_nothing_is_lost(record, began.host_dir)
        self._host.records.update(record.id, workspace=began)
        async with stages.run("copy") as stage, self._host.live.guest(record.id, record.name) as agent:

            def tell(done: int, total: int) -> None:
                stage.update(done / total if total else 1.0, f"{done >> 10} of {total >> 10} KiB")

            info = await workspaces.import_tree(
                GuestShell(agent), plan, Path(began.guest_dir).name, replace=True, progress=tell
            )
        self._host.records.update(record.id, workspace=info)
        self._host.events.emit("workspace.imported", sandbox=record, host_dir=info.host_dir, files=info.files)
        return ImportResult(workspace=info, files=info.files, bytes=info.bytes, warnings=plan.warnings)

    async def _check_nothing_is_lost(self, record: SandboxRecord, host_dir: str) -> None:
        """Refuse to replace a workspace whose work has not been taken back. Raises FailedPrecondition."""
        info = record.workspace
        if info is None or info.status != "complete":
            return
        if info.host_dir != host_dir:
            raise FailedPrecondition(
                f"{record.name} already has the workspace of {info.host_dir}", hint="use another sandbox, or --replace"
            )
        async with self._host.live.guest(record.id, record.name) as agent:
            found = await workspaces.changes(GuestShell(agent), info, None)
        if found.changes:
            raise FailedPrecondition(
                f"{record.name} has {len(found.changes)} changed files that an import would replace",
                hint=f"limpet apply {record.name} first, or import with --replace",
            )

    async def changes(self, name: str, base: str | None) -> Changes:
        record, info = self._complete(name)
        lock = self._host.locks.workspace(record.id, f"diff of {name}")
        async with lock, self._host.live.guest(record.id, name) as agent:
            return await workspaces.changes(GuestShell(agent), info, base)

    async def patch(self, name: str, base: str | None) -> PatchBody:
        record, info = self._complete(name)
        lock = self._host.locks.workspace(record.id, f"diff of {name}")
        async with lock, self._host.live.guest(record.id, name) as agent:
            patch = await workspaces.patch(GuestShell(agent), info, base)
        return PatchBody(patch.base, patch.chunks)

    async def apply(self, name: str, request: ApplyRequest) -> ApplyResult:
        """Fetch the patch, then apply it on the host, all or nothing."""
        record, info = self._complete(name)
        target = Path(request.host_dir or info.host_dir)
        async with self._host.locks.workspace(record.id, f"apply of {name}"):
            with tempfile.NamedTemporaryFile(prefix=".tmp-patch-", dir=self._host.paths.data) as file:
                async with self._host.live.guest(record.id, name) as agent:
                    patch = await workspaces.patch(GuestShell(agent), info, request.base)
                    async for chunk in patch.chunks:
                        await asyncio.to_thread(file.write, chunk)
                file.flush()
                changes = await workspaces.apply(Path(file.name), target, check=request.check)
        if not request.check:
            await self._note_applied(record, info, target)
            self._host.events.emit("workspace.applied", sandbox=record, host_dir=str(target), files=len(changes))
        return ApplyResult(host_dir=str(target), base=patch.base, changes=changes, applied=not request.check)

    async def _note_applied(self, record: SandboxRecord, info: WorkspaceInfo, target: Path) -> None:
        """What we ourselves wrote to the host directory is no drift."""
        if str(target.resolve()) != info.host_dir:
            return
        plan = await workspaces.plan_import(info.host_dir, not (info.fingerprint or "").startswith("u0"))
        self._host.records.update(record.id, workspace=info.model_copy(update={"fingerprint": plan.fingerprint}))

    async def drift(self, name: str) -> Drift:
        """Whether the host directory changed since the import (WS-6)."""
        _, info = self._complete(name)
        try:
            why = await workspaces.drift(info)
        except LimpetError as error:
            why = error.message
        return Drift(moved=why is not None, why=why)

    def _complete(self, name: str) -> tuple[SandboxRecord, WorkspaceInfo]:
        record = self._host.records.by_name(name)
        info = record.workspace
        if info is None:
            raise FailedPrecondition(f"{name} has no workspace", hint=f"limpet import {name} DIR")
        if info.status != "complete":
            raise FailedPrecondition(
                f"the workspace of {name} is only partly there: its import was cut off",
                hint=f"limpet import {name} {info.host_dir}",
            )
        return record, info
