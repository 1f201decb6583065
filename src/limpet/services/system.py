"""The daemon itself: its status, its end, and the set-up of the guest pieces."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from limpet import images
from limpet.models import PROTOCOL, DaemonStatus, Operation, State
from limpet.services.host import Host
from limpet.services.operations import Stages
from limpet.version import __version__


class System:
    def __init__(self, host: Host, end: Callable[[], None]) -> None:
        self._host, self._end = host, end
        self._started = datetime.now(UTC)

    async def status(self) -> DaemonStatus:
        paths = self._host.paths
        return DaemonStatus(
            pid=os.getpid(),
            version=__version__,
            protocol=PROTOCOL,
            started_at=self._started,
            data_dir=str(paths.data),
            cache_dir=str(paths.cache),
            socket=str(paths.daemon_socket),
            sandboxes=len(self._host.records.all()),
            running=sum(1 for record in self._host.records.all() if self._host.live.get(record.id)),
            pooled=sum(1 for record in self._host.records.everything() if record.state is State.POOLED),
        )

    async def shutdown(self) -> None:
        """End the daemon once this answer is out. Running VMs go on."""
        asyncio.get_running_loop().call_later(0.05, self._end)

    async def setup(self, mirror: str | None) -> Operation:
        async def work(stages: Stages) -> dict[str, Any]:
            return {"done": await images.setup(self._host.paths, progress=stages.report, mirror=mirror)}

        return self._host.operations.start("setup", None, work)
