"""Going back: a sandbox made what it was at a checkpoint, in place or as a new one (FRZ-7).

    verify ──► save the present as a checkpoint ──► end the VM ──► layers on the checkpoint's ──► go on from its memory

Nothing is started from a checkpoint that is not as it was written. When the last step fails, the sandbox is left
stopped on the disks that it had; its memory is in the checkpoint that was made of the present.
"""

from __future__ import annotations

from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition, NotFound
from limpet.models import Operation, RestoreRequest, RestoreResult, State
from limpet.names import check_name
from limpet.services import checkpointing, clones, disks, garbage, origins
from limpet.services.boot import Start
from limpet.services.catalogue import Checkpoint
from limpet.services.host import Host
from limpet.services.operations import Stages
from limpet.services.sandboxes import Sandboxes
from limpet.store import SandboxRecord


class Restoring:
    def __init__(self, host: Host, sandboxes: Sandboxes) -> None:
        self._host, self._sandboxes = host, sandboxes

    async def restore(self, name: str, request: RestoreRequest) -> Operation:
        """Raises NotFound, BadRequest (ambiguous or damaged), FailedPrecondition while it runs without `force`."""
        if request.as_name is not None:
            return self._as_new(self._find(name, request.checkpoint), request)
        record = self._host.records.by_name(name)
        checkpoint = self._host.catalogue.find(request.checkpoint, record.id)
        if record.state in (State.RUNNING, State.PAUSED) and not request.force:
            raise FailedPrecondition(
                f"{name} is running",
                hint=f"--force replaces it (a checkpoint of the present is made first), "
                f"or: limpet restore {name}@{checkpoint.info.id} --as NEW",
            )
        return self._in_place(record, checkpoint, disk_only=request.disk_only)

    def _find(self, name: str, reference: str) -> Checkpoint:
        """A checkpoint of this sandbox, or of one in the trash; also of one that is gone, by its id."""
        try:
            return self._host.catalogue.find(reference, self._host.records.find_any(name).id)
        except NotFound:
            found = self._host.catalogue.find(reference)
            if found.info.sandbox != name:
                raise
            return found

    async def undo(self, name: str) -> Operation:
        """Back to the newest checkpoint that was asked for, not one that going back or a suspend made. Raises
        FailedPrecondition without one."""
        record = self._host.records.by_name(name)
        own = [known for known in self._host.catalogue.of(record.id) if known.info.made_by in ("user", "exec")]
        if not own:
            raise FailedPrecondition(f"{name} has no checkpoint to go back to", hint=f"limpet checkpoint create {name}")
        return self._in_place(record, own[-1], disk_only=False)

    def _in_place(self, record: SandboxRecord, checkpoint: Checkpoint, *, disk_only: bool) -> Operation:
        async def work(stages: Stages) -> RestoreResult:
            async with self._host.locks.lifecycle(record.id, "restore"):
                with self._host.layers.building():
                    saved = await self._replace(record.id, checkpoint, stages, disk_only)
            view = self._host.view(self._host.records.by_id(record.id))
            return RestoreResult(sandbox=view, checkpoint=checkpoint.info, saved=saved.info if saved else None)

        return self._host.operations.start("restore", record.name, work)

    async def _replace(
        self, sandbox_id: str, checkpoint: Checkpoint, stages: Stages, disk_only: bool
    ) -> Checkpoint | None:
        host = self._host
        record = host.records.by_id(sandbox_id)
        was_running = host.live.get(record.id) is not None
        async with stages.run("verify"):
            memory = await origins.of(self._host, checkpoint, disk_only=disk_only)
        saved: Checkpoint | None = None
        if record.disks is not None and record.memory is None:
            async with stages.run("save the present"):
                saved = await checkpointing.make(host, record, made_by="restore")
        async with stages.run("end"):
            crashpoint("restore.end.before")
            await self._sandboxes.end_now(host.records.by_id(sandbox_id))
            crashpoint("restore.end.after")
        before = host.records.by_id(sandbox_id)
        new = await disks.on(host, checkpoint.manifest.layer_ids())
        crashpoint("restore.disks.before")
        record = host.records.update(
            sandbox_id, disks=new, parent=checkpoint.info.id, memory=None, workspace=checkpoint.info.workspace,
            spec=origins.spec(checkpoint, memory), state=State.STARTING if memory or was_running else State.STOPPED,
        )  # fmt: skip
        try:
            crashpoint("restore.disks.after")
            vm = await Start(host, record, memory).run(stages) if memory or was_running else None
        except BaseException as error:
            self._go_back(before, error)
            raise
        if vm is not None:
            await self._sandboxes.watch(vm)
        host.events.emit("sandbox.restored", sandbox=record, checkpoint=checkpoint.info.id,
                         saved=saved.info.id if saved else None)  # fmt: skip
        return saved

    def _go_back(self, before: SandboxRecord, error: BaseException) -> None:
        """The restored VM did not start: the row names the earlier disks again."""
        self._host.records.update(
            before.id, disks=before.disks, parent=before.parent, workspace=before.workspace, spec=before.spec,
            memory=before.memory, state=State.SUSPENDED if before.memory else State.STOPPED,
            error=f"the restore failed: {error}",
        )  # fmt: skip

    def _as_new(self, checkpoint: Checkpoint, request: RestoreRequest) -> Operation:
        name = check_name(request.as_name or "")

        async def work(stages: Stages) -> RestoreResult:
            with self._host.layers.building():
                record = await self._clone(name, checkpoint, stages, request.disk_only)
            return RestoreResult(sandbox=self._host.view(record), checkpoint=checkpoint.info)

        return self._host.operations.start("restore", name, work)

    async def try_out(self, checkpoint: Checkpoint, stages: Stages) -> None:
        """Start a throw-away VM from a checkpoint and end it. Raises what went wrong."""
        with self._host.layers.building():
            record = await self._clone(f"+verify-{checkpoint.info.id}", checkpoint, stages, disk_only=False)
        async with self._host.locks.lifecycle(record.id, "end of the trial"):
            await self._sandboxes.end_now(record)
            self._host.forget(record)
        await garbage.collect(self._host)

    async def _clone(self, name: str, checkpoint: Checkpoint, stages: Stages, disk_only: bool) -> SandboxRecord:
        async with stages.run("verify"):
            memory = await origins.of(self._host, checkpoint, disk_only=disk_only)
        info = checkpoint.info
        source = clones.Source(
            checkpoint.manifest.layer_ids(), memory, origins.spec(checkpoint, memory), info.workspace, info.id,
            info.sandbox_id,
        )  # fmt: skip
        record = clones.reserve(self._host, name, source)
        await clones.make(self._host, self._sandboxes, record, source, stages)
        return self._host.records.by_id(record.id)
