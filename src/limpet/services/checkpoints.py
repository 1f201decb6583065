"""The verbs on checkpoints: create, list, verify, remove (FRZ-6, FRZ-9). How one is made: checkpointing.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from limpet.errors import LimpetError
from limpet.models import (
    CheckpointInfo,
    CheckpointRequest,
    Operation,
    PruneResult,
    State,
    VerifyRequest,
    VerifyResult,
)
from limpet.services import checkpointing, garbage
from limpet.services.host import Host
from limpet.services.operations import Stages
from limpet.services.restoring import Restoring


class Checkpoints:
    """The verbs. `restore` and `undo` are in restoring.py."""

    def __init__(self, host: Host, restoring: Restoring) -> None:
        self._host = host
        self.restore = restoring.restore
        self.undo = restoring.undo
        self._restoring = restoring

    async def create(self, name: str, request: CheckpointRequest) -> Operation:
        """Raises NotFound, FailedPrecondition for a sandbox without disks."""
        record = self._host.records.by_name(name)

        async def work(stages: Stages) -> CheckpointInfo:
            async with self._host.locks.lifecycle(record.id, "checkpoint"), stages.run("checkpoint"):
                current = self._host.records.by_id(record.id)
                made = await checkpointing.make(self._host, current, label=request.label, disk_only=request.disk_only)
                if current.state is State.RUNNING and made.info.kind == "full":
                    self._host.live.require(record.id, name).set_clock_soon()
            return made.info

        return self._host.operations.start("checkpoint", name, work)

    async def list(self, name: str | None) -> Sequence[CheckpointInfo]:
        catalogue = self._host.catalogue
        found = catalogue.all() if name is None else catalogue.of(self._host.records.by_name(name).id)
        return [checkpoint.info for checkpoint in found]

    async def get(self, checkpoint: str) -> CheckpointInfo:
        return self._host.catalogue.find(checkpoint).info

    async def verify(self, checkpoint: str, request: VerifyRequest) -> Operation:
        """Read everything again and compare; with `boot`, start a throw-away VM from it."""
        found = self._host.catalogue.find(checkpoint)

        async def work(stages: Stages) -> VerifyResult:
            began = time.monotonic()
            async with stages.run("verify"):
                problems = await asyncio.to_thread(
                    found.manifest.problems, found.directory, self._host.layers, thorough=True
                )
            booted: bool | None = None
            if request.boot and not problems:
                try:
                    await self._restoring.try_out(found, stages)
                    booted = True
                except LimpetError as error:
                    booted = False
                    problems = [f"a VM does not start from it: {error.message}"]
            return VerifyResult(
                id=found.info.id, ok=not problems, problems=problems, booted=booted,
                seconds=round(time.monotonic() - began, 3),
            )  # fmt: skip

        return self._host.operations.start("verify", found.info.id, work)

    async def remove(self, checkpoint: str) -> Operation:
        """Remove it and what only it needed. One that a suspended sandbox lives in is refused."""
        damaged = checkpoint in self._host.catalogue.damaged
        checkpoint_id = checkpoint if damaged else self._host.catalogue.find(checkpoint).info.id
        garbage.require_unused(self._host, checkpoint_id)

        async def work(stages: Stages) -> PruneResult:
            async with stages.run("remove"):
                freed = await asyncio.to_thread(self._host.catalogue.forget, checkpoint_id)
                freed += await garbage.collect(self._host)
            self._host.events.emit("checkpoint.removed", checkpoint=checkpoint_id)
            return PruneResult(removed=[checkpoint_id], freed=freed)

        return self._host.operations.start("checkpoint rm", checkpoint_id, work)
