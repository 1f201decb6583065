"""The warm pool: VMs restored from a template that have run a command and stand still until a `create` takes one.

    (template) ──► restored, renewed, one command ──► paused: POOLED ──► claimed: renamed, cont, renewed ──► running

A pooled VM is a sandbox of limpet's own until it is claimed; one that a daemon leaves behind is removed by the next.
It stands for the shape (image, vCPUs, memory, network) that was created last.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from datetime import UTC, datetime

from limpet import log
from limpet.crashpoint import crashpoint
from limpet.errors import LimpetError
from limpet.models import SandboxSpec, State
from limpet.names import new_id
from limpet.services import capacity, identity, machines, stopping
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.records import HIDDEN
from limpet.services.starting import Starter
from limpet.services.templates import Templates
from limpet.store import SandboxRecord

_AUTO_MOST = 4
_AUTO_WINDOW = 300.0  # seconds over which `auto` counts creates
_QUIET_S = 0.5  # seconds without a create before the pool is filled again
_WAKE_S = 10.0
_log = log.get("pool")


class Pool:
    """Keeps `pool.size` VMs ready. `start` begins to fill it, `close` ends what nobody claimed."""

    def __init__(self, host: Host, starter: Starter, templates: Templates) -> None:
        self._host, self._starter, self._templates = host, starter, templates
        self._ready: list[tuple[SandboxRecord, str]] = []  # with the key of their template
        self._claimed: set[str] = set()
        self._shape = SandboxSpec()
        self._creates: deque[float] = deque(maxlen=64)
        self._filling: asyncio.Task[None] | None = None
        self._closed = False
        host.config.changed = self.refill

    # ── for create ───────────────────────────────────────────────────────────────────────────────────────────────

    async def claim(self, name: str, spec: SandboxSpec) -> SandboxRecord | None:
        """The row of a pooled VM that fits, now under this name, or None. Raises AlreadyExists."""
        self._creates.append(time.monotonic())
        self._shape = machines.shape(spec)
        if self._wanted() > 0:
            self.refill()
        if not self._ready:
            return None
        key = await self._templates.key(spec)
        for entry in list(self._ready):
            record, made_from = entry
            vm = self._host.live.get(record.id)
            if made_from != key or entry not in self._ready:
                continue
            if vm is None or not vm.machine.alive():
                self._ready.remove(entry)
                await self._discard(record)
                continue
            claimed = self._host.records.update(
                record.id, name=name, state=State.CREATING, spec=spec, created_at=datetime.now(UTC)
            )
            self._ready.remove(entry)
            self._claimed.add(record.id)
            crashpoint("pool.claim.after")
            return claimed
        return None

    async def wake(self, record: SandboxRecord, stages: Stages) -> LiveVM | None:
        """Let a claimed VM run as this sandbox; None when it was not claimed, or does not wake: then it is gone, and
        the sandbox has to be started in another way."""
        if record.id not in self._claimed:
            return None
        self._claimed.discard(record.id)
        vm = self._host.live.require(record.id, record.name)
        try:
            async with stages.run("wake"):
                crashpoint("pool.wake.before")
                await vm.machine.qmp("cont")
                boot_id = await identity.renew(vm, record, _WAKE_S)
                for mapping in record.spec.ports:
                    await self._host.ports.publish(vm, mapping)
                vm.began()
                self._host.records.update(
                    record.id, state=State.RUNNING, boot_id=boot_id, started_at=datetime.now(UTC),
                    incarnation=record.incarnation + 1,
                )  # fmt: skip
                crashpoint("pool.wake.after")
            return vm
        except LimpetError as error:
            self._host.events.emit("pool.failed", sandbox=record, reason=error.message)
            await self._end(record)
            self._host.records.update(record.id, disks=None)
            self._host.layers.drop(*(record.disks or {}).values())
            return None

    # ── filling ──────────────────────────────────────────────────────────────────────────────────────────────────

    def refill(self) -> None:
        """Bring the pool to its size in the background, once no create is under way."""
        if not self._closed and (self._filling is None or self._filling.done()):
            self._filling = asyncio.create_task(self._fill(), name="pool")

    def _wanted(self) -> int:
        size = self._host.config.pool_size
        if size is None:
            recent = sum(1 for when in self._creates if time.monotonic() - when < _AUTO_WINDOW)
            size = min(recent, _AUTO_MOST)
        return min(size, len(self._ready) + capacity.fitting(self._host.paths, self._shape))

    async def _fill(self) -> None:
        try:
            while not self._closed:
                await asyncio.sleep(_QUIET_S)
                await self._drop_others()
                if self._creates and time.monotonic() - self._creates[-1] < _QUIET_S:
                    continue
                if len(self._ready) >= self._wanted() or not await self._add():
                    return
        except Exception as error:  # in the background: told, and tried again at the next create
            _log.warning("the pool was not filled", reason=str(error))
            self._host.events.emit("pool.failed", reason=str(error))

    async def _drop_others(self) -> None:
        """End what is too many, or no longer of the template that a create would use."""
        key = await self._templates.key(self._shape) if self._ready else ""
        for entry in list(self._ready):
            if entry in self._ready and (entry[1] != key or len(self._ready) > self._wanted()):
                self._ready.remove(entry)
                await self._discard(entry[0])

    async def _add(self) -> bool:
        """Make one more pooled VM; False when there is no template for it (yet)."""
        spec = self._shape
        template = await self._templates.find(spec)
        if template is None:
            self._templates.missed(spec)
            return False
        record = SandboxRecord(new_id("sb"), f"{HIDDEN}pool-{new_id('p')}", State.CREATING, spec, datetime.now(UTC))
        with log.operation():
            self._host.records.insert(record)
            try:
                self._host.paths.sandbox(record.id).root.mkdir(mode=0o700)
                vm = await self._starter.from_template(record, template, Stages.unseen())
                agent = await vm.agent()
                await agent.run(["/bin/sh", "-c", "echo ready"])
                crashpoint("pool.park.before")
                await vm.machine.qmp("stop")
                self._host.records.update(record.id, state=State.POOLED, incarnation=0)
                crashpoint("pool.park.after")
            except BaseException:
                await asyncio.shield(self._discard(record))
                raise
        self._ready.append((self._host.records.by_id(record.id), template.key))
        return True

    async def _discard(self, record: SandboxRecord) -> None:
        await self._end(record)
        self._host.forget(record)

    async def _end(self, record: SandboxRecord) -> None:
        if (vm := self._host.live.drop(record.id)) is not None:
            await self._host.ports.withdraw(record.id)
            await stopping.force_down(vm)
            await vm.close()
            await vm.machine.close()

    async def close(self) -> None:
        """End the VMs that nobody claimed: without a daemon they are of no use."""
        self._closed = True
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        ready, self._ready = self._ready, []
        await asyncio.gather(*(self._discard(record) for record, _ in ready), return_exceptions=True)
