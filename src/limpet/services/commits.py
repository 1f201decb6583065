"""Commit: a running sandbox becomes an image without being stopped (FRZ-1 … 4).

    the guest answers? ──► freeze its file systems ──► layers ──► thaw ──► tidy, flatten, verify, publish (offline)
                           └──── some ten milliseconds ────────┘

The frozen layers do not change any more, so all that takes long is done beside the running sandbox.
"""

from __future__ import annotations

import time

from limpet import images
from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition, LimpetError, Unavailable
from limpet.guest import Agent
from limpet.images import SPEC_KEYS, ImageFacts, Reference
from limpet.models import CommitRequest, CommitResult, ImageInfo, Operation, State
from limpet.services import chains, garbage, instants
from limpet.services.disks import Disks
from limpet.services.host import Host
from limpet.services.operations import Stages
from limpet.store import SandboxRecord

_ANSWER_S = 5.0
_FREEZE_S = 10.0  # the guest thaws by itself after this


class Commits:
    def __init__(self, host: Host) -> None:
        self._host = host

    async def commit(self, name: str, request: CommitRequest) -> Operation:
        """Raises NotFound, BadRequest for what cannot name an image."""
        record = self._host.records.by_name(name)
        reference = Reference.parse(request.image)
        if record.disks is None:
            raise FailedPrecondition(f"{name} has no disks yet", hint=f"limpet start {name}")

        async def work(stages: Stages) -> CommitResult:
            with self._host.layers.building():
                async with self._host.locks.lifecycle(record.id, "commit"), stages.run("freeze"):
                    frozen, seconds = await self._freeze(self._host.records.by_id(record.id))
                image = await images.build_from_disks(
                    self._host.paths, name=reference.name, tag=reference.tag,
                    root=self._host.layers.path(frozen["root"]), data=self._host.layers.path(frozen["data"]),
                    facts=self._facts(self._host.records.by_id(record.id), request), progress=stages.report,
                )  # fmt: skip
            self._host.events.emit("sandbox.committed", sandbox=record, image=str(reference), digest=image.info.digest)
            await garbage.collect(self._host)
            return CommitResult(image=image.info, frozen_ms=round(seconds * 1e3, 1))

        return self._host.operations.start("commit", name, work)

    async def _freeze(self, record: SandboxRecord) -> tuple[Disks, float]:
        """The layers as they were at one instant at which every file system was whole, and how long they stood."""
        vm = self._host.live.get(record.id)
        if vm is None or record.state is State.PAUSED:  # nobody writes
            return (await instants.take(self._host, record, None)).frozen, 0.0
        try:
            agent = await vm.agent(_ANSWER_S)
            await agent.ping(timeout=_ANSWER_S)
        except LimpetError as error:
            raise Unavailable(
                f"{record.name} cannot be committed: its guest does not answer ({error.message})",
                hint="it may be out of memory or its agent stopped: `limpet logs` tells; a checkpoint needs no guest",
            ) from None
        await chains.leave_alone(vm)
        await agent.sync()
        return await self._frozen(agent, record)

    async def _frozen(self, agent: Agent, record: SandboxRecord) -> tuple[Disks, float]:
        began = time.perf_counter()
        try:
            await agent.freeze(_FREEZE_S)
            crashpoint("commit.frozen")
            instant = await instants.take(self._host, record, None)
        finally:
            thawed = await agent.thaw()
        seconds = time.perf_counter() - began
        if not thawed:
            raise Unavailable(
                f"{record.name} was frozen too long and went on by itself: the image would be of no single instant",
                hint="try again when the host is less busy",
            )
        return instant.frozen, seconds

    def _facts(self, record: SandboxRecord, request: CommitRequest) -> ImageFacts:
        """The spec as it is, and where the workspace lies; nothing that is only true on this host."""
        parent, spec = self._parent(record), record.spec.model_dump(mode="json", include=set(SPEC_KEYS))
        workspace = None
        if record.workspace and record.workspace.status == "complete":
            workspace = record.workspace.model_dump(mode="json", include={"guest_dir", "kind", "base", "status"})
            spec["workdir"] = spec.get("workdir") or record.workspace.guest_dir
        return ImageFacts(
            user=parent.user, home=parent.home, spec=spec, workspace=workspace, parent=parent.digest,
            comment=request.comment, source="commit",
        )  # fmt: skip

    def _parent(self, record: SandboxRecord) -> ImageInfo:
        """The image that the disks lie on: its tag may mean another one by now."""
        assert record.disks is not None
        directory = self._host.layers.chain(record.disks["root"])[-1].parent
        return images.find_image(self._host.paths, f"{directory.parent.name}@{directory.name}").info
