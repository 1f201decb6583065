"""Statistics and logs of sandboxes (VM-21): QEMU's view from the host, the agent's from the guest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from limpet.errors import LimpetError, NotFound
from limpet.models import Stats, SystemInfo
from limpet.paths import Paths
from limpet.services.live import LiveTable
from limpet.services.records import Records
from limpet.vmm.layers import Layers, occupied

_GUEST_SECONDS = 1.0  # a guest that does not answer in this time is left out of the statistics
_LOG_BYTES = 4 << 20


class StatsService:
    def __init__(self, paths: Paths, records: Records, live: LiveTable, layers: Layers) -> None:
        self._paths, self._records, self._live, self._layers = paths, records, live, layers

    async def one(self, name: str) -> Stats:
        record = self._records.by_name(name)
        files = self._paths.sandbox(record.id)
        used = self._layers.used(*(record.disks or {}).values()) + occupied(files.intake)
        stats = Stats(name=name, state=record.state, memory_limit=record.spec.memory_mib << 20, disk_used=used)
        if (vm := self._live.get(record.id)) is None:
            return stats
        measured = await vm.machine.stats()
        try:
            guest = await (await vm.agent(_GUEST_SECONDS)).system()
        except LimpetError:
            guest = None
        return stats.model_copy(
            update={
                "cpu_seconds": measured.cpu_seconds,
                "memory_pss": measured.memory_pss,
                "disk_read": measured.disk_read,
                "disk_written": measured.disk_written,
                "guest": guest,
            }
        )

    async def all(self) -> Sequence[Stats]:
        return await asyncio.gather(*(self.one(record.name) for record in self._records.all()))

    async def system(self, name: str) -> SystemInfo:
        record = self._records.by_name(name)
        async with self._live.guest(record.id, name) as agent:
            return await agent.system()

    async def logs(self, name: str, source: Literal["console", "agent", "qemu"], tail: int | None) -> bytes:
        """The last `tail` lines of a log, at most 4 MiB; also of a sandbox that is stopped or crashed."""
        record = self._records.by_name(name)
        files = self._paths.sandbox(record.id)
        if source == "agent" and (vm := self._live.get(record.id)) is not None:
            content = await (await vm.agent()).log(tail or 10_000)
            files.agent_log.write_bytes(content)  # kept for when the guest cannot be asked any more
        else:
            path = {"console": files.console_log, "agent": files.agent_log, "qemu": files.qemu_log}[source]
            if not path.exists():
                raise NotFound(f"{name} has no {source} log yet", hint=f"limpet start {name}")
            with path.open("rb") as file:
                file.seek(max(path.stat().st_size - _LOG_BYTES, 0))
                content = file.read(_LOG_BYTES)
        return content if tail is None else b"".join(content.splitlines(keepends=True)[-tail:] if tail else [])
