# Made by tools/unasync.py from ../_async/checkpoints.py: edit that one.
"""The checkpoints of all sandboxes. A sandbox's own are made and listed with its methods."""

from __future__ import annotations

import builtins

from limpet.client import _wire
from limpet.client._sync.operations import Operations, OnStage
from limpet.client._sync.sandbox import Sandbox
from limpet.client._sync.transport import Transport
from limpet.errors import NotFound
from limpet.models import CheckpointInfo, PruneResult, RestoreResult, VerifyResult


class Checkpoints:
    """A checkpoint is named by its id, by the beginning of one, or as `SANDBOX@ID`, where ID may also be a label (of
    several with the same label the newest counts)."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._operations = Operations(transport)

    def list(self, sandbox: str | None = None) -> builtins.list[CheckpointInfo]:
        """Of one sandbox or of all, the oldest first."""
        if sandbox is not None:
            return Sandbox(self._transport, sandbox).checkpoints()
        answer = self._transport.request("GET", _wire.path_of("checkpoints"))
        return [CheckpointInfo.model_validate(item) for item in answer]

    def get(self, checkpoint: str) -> CheckpointInfo:
        """Raises NotFound with the nearest, BadRequest when several are meant."""
        name, at, reference = checkpoint.rpartition("@")
        own = self._of(name) if at else []
        labelled = [info for info in own if info.label == reference]
        if labelled:
            return labelled[-1]
        answer = self._transport.request("GET", _wire.path_of("checkpoints", reference))
        info = CheckpointInfo.model_validate(answer)
        if at and info.id not in {one.id for one in own}:
            raise NotFound(f"'{name}' has no checkpoint {reference!r}", hint=f"limpet checkpoint ls {name}")
        return info

    def _of(self, name: str) -> builtins.list[CheckpointInfo]:
        """Those of the sandbox of this name; of one that is gone, those that were made under this name."""
        try:
            return self.list(name)
        except NotFound:
            left = [info for info in self.list() if info.sandbox == name]
            if not left:
                raise
            return left

    def _id(self, checkpoint: str) -> str:
        """What the daemon resolves; a damaged one can be named (and removed) by its id only."""
        return (self.get(checkpoint)).id if "@" in checkpoint else checkpoint

    def verify(self, checkpoint: str, *, boot: bool = False, on_stage: OnStage | None = None) -> VerifyResult:
        """Compare every file with its digest. `boot`: also start a throw-away VM from it."""
        path = _wire.path_of("checkpoints", self._id(checkpoint), "verify")
        answer = self._operations.run("POST", path, body={"boot": boot}, on_stage=on_stage)
        return VerifyResult.model_validate(answer)

    def remove(self, checkpoint: str, *, on_stage: OnStage | None = None) -> PruneResult:
        """Remove it and what only it needed. One that a suspended sandbox lives in is refused."""
        path = _wire.path_of("checkpoints", self._id(checkpoint))
        return PruneResult.model_validate(self._operations.run("DELETE", path, on_stage=on_stage))

    def restore(
        self, checkpoint: str, *, as_name: str | None = None, force: bool = False, disk_only: bool = False,
        on_stage: OnStage | None = None,
    ) -> RestoreResult:  # fmt: skip
        """As `Sandbox.restore`, of the sandbox that the checkpoint names or is of."""
        name, at, reference = checkpoint.rpartition("@")
        if not at:
            info = self.get(checkpoint)
            name, reference = self._name_of(info), info.id
        return Sandbox(self._transport, name).restore(
            reference, as_name=as_name, force=force, disk_only=disk_only, on_stage=on_stage
        )

    def _name_of(self, info: CheckpointInfo) -> str:
        """What the checkpoint's sandbox is called now; one that is gone keeps its name."""
        boxes = self._transport.request("GET", _wire.path_of("sandboxes"))
        return next((str(box["name"]) for box in boxes if box["id"] == info.sandbox_id), info.sandbox)
