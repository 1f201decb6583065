"""Forks: running copies of a running sandbox, each a sandbox of its own (FRZ-8).

    one instant of the source (it stands still once, whatever the number) ──► clones, a few at a time

The memory image is only for the clones: they map it privately, and it is deleted as soon as they run. One that cannot
be made harms neither the source nor the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from limpet import durable, log
from limpet.crashpoint import crashpoint
from limpet.errors import BadRequest, Internal, LimpetError
from limpet.models import ForkFailure, ForkRequest, ForkResult, Operation, State
from limpet.names import check_name, new_id
from limpet.services import capacity, clones, instants
from limpet.services.catalogue import keep
from limpet.services.clones import Source
from limpet.services.host import Host
from limpet.services.operations import Stages
from limpet.services.sandboxes import Sandboxes
from limpet.store import SandboxRecord
from limpet.vmm.memory import MemoryImage

_AT_ONCE = 4
_log = log.get("forks")


class Forks:
    def __init__(self, host: Host, sandboxes: Sandboxes) -> None:
        self._host, self._sandboxes = host, sandboxes

    async def fork(self, name: str, request: ForkRequest) -> Operation:
        """Raises FailedPrecondition when it does not run, or so many do not fit (it says how many do)."""
        record = self._host.records.by_name(name)
        self._host.live.require(record.id, name)
        if request.name is not None and request.count != 1:
            raise BadRequest("a name names one fork", hint="give a prefix for several")
        capacity.require(self._host.paths, record.spec, request.count)
        needed = record.spec.memory_mib << 20
        durable.require_space(self._host.paths.checkpoints, needed, f"a fork of {name}")
        names = self._names(name, request)

        async def work(stages: Stages) -> ForkResult:
            return await self._fork(record, names, stages)

        return self._host.operations.start("fork", name, work)

    def _names(self, source: str, request: ForkRequest) -> list[str]:
        """Names for the forks: the one given, or the prefix with the next numbers that are free."""
        if request.name is not None:
            return [check_name(request.name)]
        prefix = check_name(request.prefix or source)
        taken = {record.name for record in self._host.records.all()}
        numbered = (f"{prefix}-{number}" for number in range(1, len(taken) + request.count + 1))
        free = [check_name(name) for name in numbered if name not in taken]
        return free[: request.count]

    async def _fork(self, record: SandboxRecord, names: Sequence[str], stages: Stages) -> ForkResult:
        host = self._host
        directory = durable.staging(host.paths.checkpoints, new_id("fork"))
        try:
            with host.layers.building():
                async with host.locks.lifecycle(record.id, "fork"), stages.run("memory image"):
                    vm = host.live.require(record.id, record.name)
                    facts = await instants.machine_facts(vm, record)
                    keep(await instants.agent_disk(vm), MemoryImage(directory).agent_disk)
                    instant = await instants.take(host, record, MemoryImage(directory))
                if record.state is State.RUNNING:
                    vm.set_clock_soon()
                record = host.records.by_id(record.id)
                spec = facts.applied_to(record.spec)
                source = Source(
                    instant.frozen, MemoryImage(directory), spec, record.workspace, record.parent, record.id
                )
                outcomes = await self._clones(names, source, stages)
        finally:
            durable.remove_tree(directory)
        made = [host.view(outcome) for outcome in outcomes if isinstance(outcome, SandboxRecord)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, ForkFailure)]
        host.events.emit("sandbox.forked", sandbox=record, forks=[fork.name for fork in made],
                         failed=[failure.name for failure in failed])  # fmt: skip
        pause = round(instant.pause * 1e3, 1)
        return ForkResult(source=record.name, forks=made, failed=failed, pause_ms=pause)

    async def _clones(self, names: Sequence[str], source: Source, stages: Stages) -> list[SandboxRecord | ForkFailure]:
        turn = asyncio.Semaphore(_AT_ONCE)

        async def one(name: str) -> SandboxRecord | ForkFailure:
            try:
                async with turn, stages.run(f"start {name}"):
                    crashpoint("fork.clone.before")
                    reserved = clones.reserve(self._host, name, source)
                    await clones.make(self._host, self._sandboxes, reserved, source, Stages.unseen())
                    crashpoint("fork.clone.after")
                    return self._host.records.by_id(reserved.id)
            except LimpetError as error:
                return ForkFailure(name=name, error={**error.to_dict(), "op_id": log.current_op()})
            except Exception as error:
                _log.exception("fork failed", fork=name)
                return ForkFailure(name=name, error=Internal(str(error), op_id=log.current_op()).to_dict())

        return await asyncio.gather(*(one(name) for name in names))
