"""The trash: removed sandboxes, which can be had back for some days."""

from __future__ import annotations

import builtins

from limpet import models
from limpet.client import _wire
from limpet.client._async.operations import AsyncOperations, OnStage
from limpet.client._async.sandbox import AsyncSandbox
from limpet.client._async.transport import AsyncTransport
from limpet.models import PruneResult, TrashEntry


class AsyncTrash:
    """A sandbox in it is named by the name that it had (the newest of several) or by its id."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._operations = AsyncOperations(transport)

    async def list(self) -> builtins.list[TrashEntry]:
        """The newest first."""
        answer = await self._transport.request("GET", _wire.path_of("trash"))
        return [TrashEntry.model_validate(item) for item in answer]

    async def empty(self, name: str | None = None, *, on_stage: OnStage | None = None) -> PruneResult:
        """Remove one, or all (None), for good: disks, checkpoints and vaults."""
        path = _wire.path_of("trash") if name is None else _wire.path_of("trash", name)
        return PruneResult.model_validate(await self._operations.run("DELETE", path, on_stage=on_stage))

    async def undelete(self, name: str, *, as_name: str | None = None, on_stage: OnStage | None = None) -> AsyncSandbox:
        """Take one back, stopped (or suspended, where it was). `as_name`: where its name is taken by now."""
        path = _wire.path_of("trash", name, "undelete")
        answer = await self._operations.run("POST", path, body={"as_name": as_name}, on_stage=on_stage)
        info = models.Sandbox.model_validate(answer)
        return AsyncSandbox(self._transport, info.name, info)
