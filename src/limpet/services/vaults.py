"""The verbs on vaults: what generations there are, what they hold, whether they are whole, what they take.

All of it works without any VM, for sandboxes that run, are stopped, broken, in the trash, or of which only the vault is
left. Reading keeps every generation until it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias, TypeVar

from limpet import log
from limpet.crashpoint import crashpoint
from limpet.errors import BadRequest, Busy, LimpetError, NotFound
from limpet.models import (
    GenerationInfo,
    Operation,
    PathChange,
    PathVersion,
    PruneResult,
    Row,
    VaultCheck,
    VaultChecks,
    VaultListing,
    VaultRestored,
    VaultRestoreRequest,
    VaultUsage,
)
from limpet.services.host import Host
from limpet.services.operations import RunningStage, Stages
from limpet.services.records import known_as
from limpet.services.streams import VaultFile
from limpet.services.syncing import Syncing
from limpet.services.vaultrestore import Restore
from limpet.services.vaulttable import OpenVault
from limpet.services.vaultview import generation_at, guest_path, listing
from limpet.vault import Generation, queries

_COLLECT_S = 600.0  # seconds between two collections
_BATCH = 200  # differences that are looked for at a time
_NO_VAULT = "a vault begins about a second after the sandbox's first start"

T = TypeVar("T")
_Check: TypeAlias = "Callable[[Kept, RunningStage], Awaitable[VaultCheck]]"
_log = log.get("vaults")


@dataclass(frozen=True)
class Kept:
    """A vault, and whose it is."""

    sandbox_id: str
    name: str  # as users know it; the id where only the vault is left
    state: str
    opened: OpenVault


class Vaults:
    def __init__(self, host: Host, syncing: Syncing) -> None:
        self._host, self._syncing = host, syncing
        self._collecting: asyncio.Task[None] | None = None
        self._collected = time.monotonic()

    # ── finding ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _find(self, name: str) -> Kept:
        """By a sandbox's name or id, also of one in the trash. Raises NotFound."""
        try:
            record = self._host.records.find_any(name)
        except NotFound:
            if name not in self._host.vaults.ids():
                raise
            return await self._kept(name)
        return await self._kept(record.id)

    async def _kept(self, sandbox_id: str) -> Kept:
        record, opened = self._host.records.find(sandbox_id), await self._host.vaults.find(sandbox_id)
        name = known_as(record) if record is not None else sandbox_id
        if opened is None:
            raise NotFound(f"{name} has no vault", hint=_NO_VAULT)
        return Kept(sandbox_id, name, record.state.value if record is not None else "gone", opened)

    async def _chosen(self, name: str | None) -> list[Kept]:
        """One vault, or all of them, by name."""
        if name is not None:
            return [await self._find(name)]
        found = [await self._kept(sandbox_id) for sandbox_id in self._host.vaults.ids()]
        return sorted(found, key=lambda kept: kept.name)

    async def _generation(self, kept: Kept, at: str | None) -> Generation:
        return await self._host.vaults.run(generation_at, kept.opened.vault, kept.name, at)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def history(self, name: str) -> Sequence[GenerationInfo]:
        """The oldest first."""
        kept = await self._find(name)
        with kept.opened.reading() as vault:
            return await self._host.vaults.run(queries.history, vault)

    async def versions(self, name: str, path: str) -> Sequence[PathVersion]:
        """The generations in which a path, or what is below it, changed. Raises NotFound."""
        kept, wanted = await self._find(name), guest_path(path)
        with kept.opened.reading() as vault:
            return await self._host.vaults.run(queries.versions, vault, wanted)

    async def listing(self, name: str, path: str, at: str | None) -> VaultListing:
        """What a path is, and what it holds. Raises NotFound."""
        kept, wanted = await self._find(name), guest_path(path)
        with kept.opened.reading():
            generation = await self._generation(kept, at)
            return await self._host.vaults.run(listing, generation, wanted)

    async def read(self, name: str, path: str, at: str | None) -> VaultFile:
        """A regular file. Raises NotFound, BadRequest for anything else."""
        kept, wanted = await self._find(name), guest_path(path)
        with kept.opened.reading():
            generation = await self._generation(kept, at)
            node, chunks = await self._host.vaults.run(queries.content, generation, wanted)
        return VaultFile(generation.number, queries.entry(wanted, node), self._in_batches(kept, chunks, 1))

    async def diff(self, name: str, a: str, b: str | None) -> AsyncIterator[PathChange]:
        """What differs between two generations. Raises NotFound."""
        kept = await self._find(name)
        before, after = await self._generation(kept, a), await self._generation(kept, b)
        return self._in_batches(kept, queries.diff(before, after), _BATCH)

    async def _in_batches(self, kept: Kept, items: Iterator[T], count: int) -> AsyncGenerator[T, None]:
        """What an iterator gives that reads from a vault; from the first item on everything is kept for it."""
        with kept.opened.reading():
            while batch := await self._host.vaults.run(list, itertools.islice(items, count)):
                for item in batch:
                    yield item

    async def usage(self) -> Sequence[VaultUsage]:
        """Of all vaults, by name."""
        found = []
        for kept in await self._chosen(None):
            used = await self._host.vaults.run(kept.opened.vault.usage)
            found.append(
                VaultUsage(
                    sandbox=kept.name, sandbox_id=kept.sandbox_id, state=kept.state, generations=used.generations,
                    oldest=used.oldest, newest=used.newest, size=used.size, reclaimable=used.reclaimable,
                )
            )  # fmt: skip
        return found

    # ── restoring ────────────────────────────────────────────────────────────────────────────────────────────────

    async def restore(self, name: str, request: VaultRestoreRequest) -> Operation:
        """Bring a generation's files to a host directory, or back into the running guest. Raises NotFound."""
        kept = await self._find(name)
        generation = await self._generation(kept, request.at)
        restore = Restore(self._host, self._syncing, kept.sandbox_id, kept.name, kept.opened, generation)
        path = guest_path(request.path or "/")
        if request.to is None:
            self._host.live.require(kept.sandbox_id, kept.name)
        elif not Path(request.to).is_absolute():
            raise BadRequest(f"{request.to!r} is no absolute path")

        async def work(stages: Stages) -> VaultRestored:
            began = time.monotonic()
            if request.to is None:
                restored = await restore.into_guest(path, stages)
            else:
                restored = await restore.to_directory(path, request.to, stages)
            self._host.events.emit(
                "vault.restored", self._host.records.find(kept.sandbox_id), generation=generation.number,
                path=restored.path, to=request.to, files=restored.files,
            )  # fmt: skip
            return restored.model_copy(update={"seconds": round(time.monotonic() - began, 3)})

        return self._host.operations.start("vault restore", kept.name, work)

    # ── upkeep ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def check(self, name: str | None) -> Operation:
        """Verify every byte of one vault or of all."""
        return await self._checks("vault check", name, self._check)

    async def repair(self, name: str | None) -> Operation:
        """Make vaults whole again, as far as they can be, and check them."""
        return await self._checks("vault repair", name, self._repair)

    async def _checks(self, kind: str, name: str | None, check: _Check) -> Operation:
        chosen = await self._chosen(name)

        async def work(stages: Stages) -> VaultChecks:
            checks = []
            for kept in chosen:
                async with stages.run(kept.name) as stage:
                    checks.append(await check(kept, stage))
            return VaultChecks(checks=checks)

        return self._host.operations.start(kind, name, work)

    async def _check(self, kept: Kept, stage: RunningStage) -> VaultCheck:
        began, loop, run = time.monotonic(), asyncio.get_running_loop(), self._host.vaults.run

        def tell(done: int, total: int) -> None:
            loop.call_soon_threadsafe(stage.update, done / total if total else 1.0, f"{done >> 20} MiB")

        async with kept.opened.checking:
            with contextlib.ExitStack() as checked:
                async with kept.opened.lock:  # whoever removes something ends first; syncs need not wait
                    vault = checked.enter_context(kept.opened.reading())
                found = await run(vault.inspect, progress=tell)
            if not found.problems:
                await run(vault.mark_verified, datetime.now(UTC))
        if problems := found.problems:
            self._host.events.emit(
                "vault.damaged", self._host.records.find(kept.sandbox_id), vault=kept.sandbox_id, problems=problems[:10]
            )
        return VaultCheck(
            sandbox=kept.name, ok=not problems, generations=len(vault.generations()), objects=found.objects,
            bytes=found.bytes, problems=problems, seconds=round(time.monotonic() - began, 3),
        )  # fmt: skip

    async def _repair(self, kept: Kept, stage: RunningStage) -> VaultCheck:
        async with kept.opened.lock, kept.opened.removing:
            crashpoint("vault.repair.before")
            repaired = await self._host.vaults.run(kept.opened.vault.repair)
            crashpoint("vault.repair.after")
        with contextlib.suppress(LimpetError):  # what it fell back from is still in the guest, if it runs
            await self._syncing.now(kept.sandbox_id)
        return (await self._check(kept, stage)).model_copy(update={"repaired": repaired})

    async def collect(self, name: str | None) -> Operation:
        """Forget what the ladder of retention does not keep."""
        chosen = await self._chosen(name)

        async def work(stages: Stages) -> PruneResult:
            removed, freed = list[str](), 0
            for kept in chosen:
                async with stages.run(kept.name):
                    numbers, size = await self._collect(kept)
                    removed += [f"{kept.name}@{number}" for number in numbers]
                    freed += size
            return PruneResult(removed=removed, freed=freed)

        return self._host.operations.start("vault gc", name, work)

    async def _collect(self, kept: Kept) -> tuple[list[int], int]:
        """The generations that went and the bytes that this freed. Raises Busy while somebody reads."""
        async with kept.opened.lock, kept.opened.removing:
            if kept.opened.readers:
                raise Busy(f"the vault of {kept.name} is being read", hint="try again when that is done")
            vault = kept.opened.vault
            before = {generation.number for generation in await self._host.vaults.run(vault.generations)}
            crashpoint("vault.gc.before")
            freed = await self._host.vaults.run(vault.collect, datetime.now(UTC))
            crashpoint("vault.gc.after")
            after = {generation.number for generation in await self._host.vaults.run(vault.generations)}
        return sorted(before - after), freed

    def look(self) -> None:
        """Collect all vaults in the background, once in a while; called every few seconds."""
        busy = self._collecting is not None and not self._collecting.done()
        if not busy and time.monotonic() - self._collected > _COLLECT_S:
            self._collected = time.monotonic()
            self._collecting = asyncio.create_task(self._collect_all(), name="vault gc")

    async def _collect_all(self) -> None:
        for sandbox_id in self._host.vaults.ids():
            try:
                kept = await self._kept(sandbox_id)
                if not kept.opened.lock.locked() and kept.opened.vault.damage is None:
                    await self._collect(kept)
            except (LimpetError, OSError) as error:  # tried again the next time
                _log.warning("not collected", sandbox=sandbox_id, reason=str(error))

    async def close(self) -> None:
        """Collect no more."""
        if self._collecting is not None:
            self._collecting.cancel()
            await asyncio.gather(self._collecting, return_exceptions=True)

    async def rows(self) -> list[Row]:
        """For doctor: vaults that are damaged, belong to nobody, or are not kept in step."""
        rows = list[Row]()
        for sandbox_id in self._host.vaults.ids():
            try:
                kept = await self._kept(sandbox_id)
            except LimpetError as error:
                rows.append(Row(check="vaults", status="FAIL", detail=error.message, remedy=error.hint))
                continue
            if (damage := kept.opened.vault.damage) is not None:
                detail, remedy = f"the vault of {kept.name} is damaged: {damage}", f"limpet vault repair {kept.name}"
                rows.append(Row(check="vaults", status="FAIL", detail=detail, remedy=remedy))
            if kept.state == "gone":
                detail = f"{self._host.paths.vault(sandbox_id)} belongs to no sandbox"
                remedy = f"limpet restore {sandbox_id} --to DIR, then remove it yourself"
                rows.append(Row(check="vaults", status="WARN", detail=detail, remedy=remedy))
        for status in await self._syncing.all_status():
            if status.degraded:
                detail, remedy = f"{status.sandbox} is not in step: {status.why}", f"limpet status {status.sandbox}"
                rows.append(Row(check="vaults", status="WARN", detail=detail, remedy=remedy))
        count = len(self._host.vaults.ids())
        return rows or [Row(check="vaults", status="PASS", detail=f"{count}, none known to be damaged")]
