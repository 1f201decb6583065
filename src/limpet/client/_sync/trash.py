# Made by tools/unasync.py from ../_async/trash.py: edit that one.
"""The trash: removed sandboxes, which can be had back for some days."""

from __future__ import annotations

import builtins

from limpet import models
from limpet.client import _wire
from limpet.client._sync.operations import Operations, OnStage
from limpet.client._sync.sandbox import Sandbox
from limpet.client._sync.transport import Transport
from limpet.models import PruneResult, TrashEntry


class Trash:
    """A sandbox in it is named by the name that it had (the newest of several) or by its id."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._operations = Operations(transport)

    def list(self) -> builtins.list[TrashEntry]:
        """The newest first."""
        answer = self._transport.request("GET", _wire.path_of("trash"))
        return [TrashEntry.model_validate(item) for item in answer]

    def empty(self, name: str | None = None, *, on_stage: OnStage | None = None) -> PruneResult:
        """Remove one, or all (None), for good: disks, checkpoints and vaults."""
        path = _wire.path_of("trash") if name is None else _wire.path_of("trash", name)
        return PruneResult.model_validate(self._operations.run("DELETE", path, on_stage=on_stage))

    def undelete(self, name: str, *, as_name: str | None = None, on_stage: OnStage | None = None) -> Sandbox:
        """Take one back, stopped (or suspended, where it was). `as_name`: where its name is taken by now."""
        path = _wire.path_of("trash", name, "undelete")
        answer = self._operations.run("POST", path, body={"as_name": as_name}, on_stage=on_stage)
        info = models.Sandbox.model_validate(answer)
        return Sandbox(self._transport, info.name, info)
