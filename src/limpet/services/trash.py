"""The trash: a removed sandbox is kept whole for some days (VM-17).

    rm ──► one row is changed: TRASHED, another name ──► undelete: the same row is changed back
                             │ after trash.days, `trash empty`, `rm --purge`
                             ▼
           one row is changed: doomed ──► checkpoints, vault, files, at last the row ──► layers that nothing needs

Each change of a row is a commit point. Before the second one the sandbox is whole, with its disks, its memory, its
checkpoints and its vault; after it the sandbox is gone, and a daemon that finds the row finishes what was cut off.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from limpet import log
from limpet.crashpoint import crashpoint
from limpet.errors import AlreadyExists, LimpetError, NotFound
from limpet.models import Operation, PruneResult, RiskReport, Sandbox, State, TrashEntry, UndeleteRequest
from limpet.names import check_name
from limpet.services import garbage, risk
from limpet.services.catalogue import size_of
from limpet.services.host import Host
from limpet.services.operations import Stages
from limpet.services.records import HIDDEN, known_as
from limpet.store import SandboxRecord
from limpet.vmm.layers import occupied

_PATIENCE_S = 600.0  # for which something is seen to be too old before it goes: a clock that jumps does no harm
_log = log.get("trash")


def put(host: Host, record: SandboxRecord) -> None:
    """Move a sandbox that does not run to the trash; the caller holds the lifecycle lock."""
    removed = {"name": record.name, "removed_at": datetime.now(UTC).isoformat(), "state": record.state.value}
    crashpoint("rm.trash.before")
    host.records.update(record.id, name=f"{HIDDEN}trash-{record.id}", state=State.TRASHED, trash=removed)
    crashpoint("rm.trash.after")
    host.events.emit("sandbox.removed", sandbox=record, trash=True)


async def purge(host: Host, record: SandboxRecord) -> int:
    """Delete for good a sandbox that does not run; the bytes that this freed. The caller holds the lifecycle lock."""
    doom(host, record)
    freed = await asyncio.to_thread(_own_bytes, host, record)
    for checkpoint in host.catalogue.of(record.id):
        await asyncio.to_thread(host.catalogue.forget, checkpoint.info.id)
    host.forget(record)
    return freed + await garbage.collect(host)


def doom(host: Host, record: SandboxRecord) -> None:
    """From here on the sandbox is gone; what follows only clears away."""
    crashpoint("purge.row.before")
    host.records.update(record.id, name=f"{HIDDEN}purge-{record.id}", state=State.TRASHED, trash=None)
    crashpoint("purge.row.after")


def expires_at(record: SandboxRecord, days: float) -> datetime:
    """When something in the trash goes."""
    assert record.trash is not None
    return datetime.fromisoformat(record.trash["removed_at"]) + timedelta(days=days)


class Trash:
    """The verbs, and the clock that empties it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._due: dict[str, float] = {}  # id: since when (monotonic) it has been seen to be too old

    async def list(self) -> Sequence[TrashEntry]:
        """The newest first. `size` is what deleting it would free."""
        host, days = self._host, self._host.config.trash_days
        found, everything = host.records.trashed(), host.records.everything()
        sizes = await asyncio.to_thread(_sizes, host, found, everything)
        return [await self._entry(record, days, sizes[record.id]) for record in found]

    async def _entry(self, record: SandboxRecord, days: float, size: int) -> TrashEntry:
        assert record.trash is not None
        name = record.trash["name"]
        return TrashEntry(
            id=record.id, name=name, removed_at=datetime.fromisoformat(record.trash["removed_at"]),
            expires_at=expires_at(record, days), size=size, generations=await self._generations(record.id),
            sandbox=self._host.view(record).model_copy(update={"name": name}),
        )  # fmt: skip

    async def _generations(self, sandbox_id: str) -> int:
        try:
            found = await self._host.vaults.find(sandbox_id)
        except LimpetError:  # damaged: `limpet vault check` tells
            return 0
        return len(found.vault.generations()) if found else 0

    async def undelete(self, trashed: str, request: UndeleteRequest) -> Operation:
        """Bring a sandbox back as it was, under its name or another. Raises NotFound, BadRequest; the operation
        fails with AlreadyExists when the name is taken."""
        record = self._host.records.find_trashed(trashed)
        name = check_name(request.as_name) if request.as_name else known_as(record)

        async def work(stages: Stages) -> Sandbox:
            async with self._host.locks.lifecycle(record.id, "undelete"), stages.run("undelete"):
                return self._host.view(self._bring_back(record.id, name))

        return self._host.operations.start("undelete", name, work)

    def _bring_back(self, sandbox_id: str, name: str) -> SandboxRecord:
        former = self._require(sandbox_id)
        assert former.trash is not None
        try:
            crashpoint("undelete.row.before")
            record = self._host.records.update(sandbox_id, name=name, state=State(former.trash["state"]), trash=None)
            crashpoint("undelete.row.after")
        except AlreadyExists as error:
            hint = f"limpet undelete {known_as(former)} --as NEW"
            raise AlreadyExists(error.message, hint=hint) from None
        self._host.events.emit("sandbox.undeleted", sandbox=record)
        return record

    def _require(self, sandbox_id: str) -> SandboxRecord:
        """Still in the trash, now that the lock is held. Raises NotFound."""
        record = self._host.records.by_id(sandbox_id)
        if record.trash is None:
            raise NotFound(f"{record.name} is not in the trash any more", hint="see `limpet ls`")
        return record

    async def empty(self, trashed: str | None) -> Operation:
        """Delete one, or all, for good. Raises NotFound, BadRequest."""
        chosen = self._host.records.trashed() if trashed is None else [self._host.records.find_trashed(trashed)]

        async def work(stages: Stages) -> PruneResult:
            async with stages.run("empty"):
                freed = [await self._purge(record) for record in chosen]
            return PruneResult(removed=[known_as(record) for record in chosen], freed=sum(freed))

        return self._host.operations.start("trash empty", trashed, work)

    async def _purge(self, record: SandboxRecord) -> int:
        async with self._host.locks.lifecycle(record.id, "emptying of the trash"):
            freed = await purge(self._host, self._require(record.id))
        self._host.events.emit("sandbox.purged", sandbox=_shown(record), freed=freed)
        return freed

    async def risk(self, name: str) -> RiskReport:
        """What only this sandbox has: asked before it is removed."""
        return await risk.report(self._host, self._host.records.by_name(name))

    async def look(self) -> None:
        """Delete what is too old. Raises nothing: what cannot be deleted now is tried again."""
        now, days = datetime.now(UTC), self._host.config.trash_days
        old = [record for record in self._host.records.trashed() if expires_at(record, days) <= now]
        self._due = {record.id: self._due.get(record.id, time.monotonic()) for record in old}
        for record in old:
            if time.monotonic() - self._due[record.id] < _PATIENCE_S:
                continue
            try:
                await self._purge(record)
            except (LimpetError, OSError) as error:
                _log.warning("purge.failed", sandbox=known_as(record), reason=str(error))


def _shown(record: SandboxRecord) -> SandboxRecord:
    """The record under the name that users know."""
    return replace(record, name=known_as(record))


def _own_bytes(host: Host, record: SandboxRecord) -> int:
    """Of what is not layers: vault, checkpoints, logs."""
    directories = [host.paths.vault(record.id), host.paths.sandbox(record.id).root]
    files = [file for directory in directories for file in directory.rglob("*") if file.is_file()]
    return sum(map(occupied, files)) + sum(size_of(known.directory) for known in host.catalogue.of(record.id))


def _sizes(host: Host, wanted: Sequence[SandboxRecord], everything: Sequence[SandboxRecord]) -> Mapping[str, int]:
    """Bytes that deleting each would free: layers that somebody else needs too do not count. Blocks."""
    needs = {record.id: set(_needed(host, record)) for record in everything}
    users = Counter(path for paths in needs.values() for path in paths)
    users.update(path for top in host.templates.roots() for path in host.layers.reachable(top))
    return {
        record.id: _own_bytes(host, record) + sum(occupied(path) for path in needs[record.id] if users[path] == 1)
        for record in wanted
    }


def _needed(host: Host, record: SandboxRecord) -> Iterator[Path]:
    """The layers of a sandbox and of its checkpoints."""
    checkpoints = (layer for known in host.catalogue.of(record.id) for layer in known.manifest.layer_ids().values())
    for top in (*(record.disks or {}).values(), *checkpoints):
        yield from (path for path in host.layers.reachable(top) if path.suffix != ".raw")
