"""Syncing: everything that sandboxes write, on its way to their vaults (PAY-2).

A syncer belongs to a running VM: it begins when the VM becomes somebody's (`join`), stands still with it (`hold`,
`go_on`), makes a last sync when it is stopped (`final`) and ends with it (`leave`). Limpet's own VMs have none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime

from limpet import log
from limpet.errors import FailedPrecondition, LimpetError
from limpet.models import Operation, PayloadStatus, State, SyncResult, SyncStatus
from limpet.services.health import Health
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.records import hidden
from limpet.services.syncer import Syncer
from limpet.services.vaulttable import OpenVault
from limpet.store import SandboxRecord
from limpet.vault import Generation

_PENDING_S = 5.0  # to ask a guest for what the host does not have yet

Listener = Callable[[str, Generation], Awaitable[None]]
_log = log.get("syncing")


class Syncing:
    """All syncers. `payloads` tells how the payloads of a sandbox are, for its status."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._syncers: dict[str, Syncer] = {}
        self._listeners: list[Listener] = []
        self.payloads: Callable[[SandboxRecord], Sequence[PayloadStatus]] = lambda _record: ()

    # ── for those who run VMs ────────────────────────────────────────────────────────────────────────────────────

    def join(self, vm: LiveVM) -> None:
        """A VM has become a user's sandbox."""
        record = self._host.records.find(vm.sandbox_id)
        if record is None or hidden(record):
            return
        self._syncers[vm.sandbox_id] = Syncer(self._host, vm, self._tell)
        self.go_on(vm.sandbox_id)

    async def hold(self, sandbox_id: str) -> None:
        """Its VM is about to stand still: nothing may be asked of the guest."""
        if (syncer := self._syncers.get(sandbox_id)) is not None:
            await syncer.hold()

    def go_on(self, sandbox_id: str) -> None:
        """Its VM runs again, if it does."""
        syncer, record = self._syncers.get(sandbox_id), self._host.records.find(sandbox_id)
        if syncer is not None and record is not None and record.state is State.RUNNING:
            syncer.start()

    @contextlib.asynccontextmanager
    async def held(self, sandbox_id: str) -> AsyncIterator[None]:
        """`hold` for a block that makes a VM stand still; `go_on` when it fails."""
        await self.hold(sandbox_id)
        try:
            yield
        except BaseException:
            self.go_on(sandbox_id)
            raise

    async def final(self, vm: LiveVM, timeout: float) -> tuple[int | None, str | None]:
        """Sync a last time, within `timeout` seconds, before a VM ends; by itself it syncs no more (see `go_on`). The
        newest generation, and why it does not have everything, if so. An ephemeral sandbox goes with its vault: that
        is only filled for a payload."""
        syncer, record = self._syncers.get(vm.sandbox_id), self._host.records.find(vm.sandbox_id)
        if syncer is None or record is None:
            return None, None
        if record.spec.ephemeral and not record.payloads:
            await syncer.hold()
            return None, None
        return await syncer.final(timeout)

    async def leave(self, sandbox_id: str) -> None:
        """Its VM is gone, or another daemon's."""
        if (syncer := self._syncers.pop(sandbox_id, None)) is not None:
            await syncer.hold()

    async def close(self) -> None:
        """End all syncers; VMs go on."""
        await asyncio.gather(*(self.leave(sandbox_id) for sandbox_id in list(self._syncers)))

    def look(self) -> None:
        """Tell who has fallen behind; called every few seconds."""
        for syncer in self._syncers.values():
            syncer.look()

    # ── for payloads ─────────────────────────────────────────────────────────────────────────────────────────────

    def add_listener(self, listener: Listener) -> None:
        """`listener(sandbox id, generation)` is awaited after every commit, before the next sync: it should be short.
        What it raises is logged."""
        self._listeners.append(listener)

    async def _tell(self, sandbox_id: str, generation: Generation) -> None:
        for listener in self._listeners:
            try:
                await listener(sandbox_id, generation)
            except Exception:
                _log.exception("a listener failed", sandbox=sandbox_id, generation=generation.number)

    async def now(self, sandbox_id: str) -> SyncResult:
        """Everything that was written before this call is in the generation that is answered. Raises
        FailedPrecondition for a sandbox that does not run, and whatever prevents the sync."""
        record = self._host.records.by_id(sandbox_id)
        syncer = self._syncers.get(sandbox_id)
        if syncer is None or record.state not in (State.RUNNING, State.STOPPING):
            verb = "resume" if record.state in (State.PAUSED, State.SUSPENDED) else "start"
            raise FailedPrecondition(
                f"{record.name} is {record.state.value}: nothing is written in it", hint=f"limpet {verb} {record.name}"
            )
        return await syncer.now()

    # ── verbs ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def sync(self, name: str) -> Operation:
        """Now. Raises NotFound, FailedPrecondition when it does not run."""
        record = self._host.records.by_name(name)
        self._host.live.require(record.id, name)

        async def work(stages: Stages) -> SyncResult:
            async with stages.run("sync"):
                return await self.now(record.id)

        return self._host.operations.start("sync", name, work)

    async def status(self, name: str, *, pending: bool) -> SyncStatus:
        """Of any sandbox; with `pending` its guest is asked, for some seconds, what the host does not have yet."""
        record = self._host.records.by_name(name)
        status = await self._status(record)
        syncer = self._syncers.get(record.id)
        if not pending or syncer is None or record.state is not State.RUNNING:
            return status
        with contextlib.suppress(LimpetError, OSError, TimeoutError):
            async with asyncio.timeout(_PENDING_S):
                files, size = await syncer.pending()
                return status.model_copy(update={"pending_files": files, "pending_bytes": size})
        return status

    async def all_status(self) -> Sequence[SyncStatus]:
        """Of all sandboxes that have a VM; no guest is asked."""
        return [await self._status(record) for record in self._host.records.all() if self._host.live.get(record.id)]

    async def _status(self, record: SandboxRecord) -> SyncStatus:
        opened, syncer = await self._host.vaults.find(record.id), self._syncers.get(record.id)
        head = opened.vault.head if opened is not None else None
        health = syncer.health if syncer is not None else Health()
        age = health.age
        if age is None and head is not None:
            age = max((datetime.now(UTC) - head.time).total_seconds(), 0.0)
        vm = self._host.live.get(record.id)
        why = _damage(opened) or (vm.stall.message if vm and vm.stall else None)
        if why is None and syncer is not None:
            why = syncer.degraded()
        return SyncStatus(
            sandbox=record.name, sandbox_id=record.id, state=record.state.value,
            last_durable=head.time if head is not None else None,
            generation=head.number if head is not None else None,
            age=None if age is None else round(age, 3), lag=round(health.lag, 3), failures=health.failures,
            degraded=why is not None, why=why,
            last_verified=opened.vault.last_verified if opened is not None else None,
            log=list(health.lines), payloads=list(self.payloads(record)),
        )  # fmt: skip


def _damage(opened: OpenVault | None) -> str | None:
    return f"the vault is damaged: {opened.vault.damage}" if opened is not None and opened.vault.damage else None
