"""The checkpoints of all sandboxes. A sandbox's own are made and listed with its methods."""

from __future__ import annotations

import builtins

from limpet.client import _wire
from limpet.client._async.operations import AsyncOperations, OnStage
from limpet.client._async.sandbox import AsyncSandbox
from limpet.client._async.transport import AsyncTransport
from limpet.errors import NotFound
from limpet.models import CheckpointInfo, PruneResult, RestoreResult, VerifyResult


class AsyncCheckpoints:
    """A checkpoint is named by its id, by the beginning of one, or as `SANDBOX@ID`, where ID may also be a label (of
    several with the same label the newest counts)."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._operations = AsyncOperations(transport)

    async def list(self, sandbox: str | None = None) -> builtins.list[CheckpointInfo]:
        """Of one sandbox or of all, the oldest first."""
        if sandbox is not None:
            return await AsyncSandbox(self._transport, sandbox).checkpoints()
        answer = await self._transport.request("GET", _wire.path_of("checkpoints"))
        return [CheckpointInfo.model_validate(item) for item in answer]

    async def get(self, checkpoint: str) -> CheckpointInfo:
        """Raises NotFound with the nearest, BadRequest when several are meant."""
        name, at, reference = checkpoint.rpartition("@")
        own = await self._of(name) if at else []
        labelled = [info for info in own if info.label == reference]
        if labelled:
            return labelled[-1]
        answer = await self._transport.request("GET", _wire.path_of("checkpoints", reference))
        info = CheckpointInfo.model_validate(answer)
        if at and info.id not in {one.id for one in own}:
            raise NotFound(f"'{name}' has no checkpoint {reference!r}", hint=f"limpet checkpoint ls {name}")
        return info

    async def _of(self, name: str) -> builtins.list[CheckpointInfo]:
        """Those of the sandbox of this name; of one that is gone, those that were made under this name."""
        try:
            return await self.list(name)
        except NotFound:
            left = [info for info in await self.list() if info.sandbox == name]
            if not left:
                raise
            return left

    async def _id(self, checkpoint: str) -> str:
        """What the daemon resolves; a damaged one can be named (and removed) by its id only."""
        return (await self.get(checkpoint)).id if "@" in checkpoint else checkpoint

    async def verify(self, checkpoint: str, *, boot: bool = False, on_stage: OnStage | None = None) -> VerifyResult:
        """Compare every file with its digest. `boot`: also start a throw-away VM from it."""
        path = _wire.path_of("checkpoints", await self._id(checkpoint), "verify")
        answer = await self._operations.run("POST", path, body={"boot": boot}, on_stage=on_stage)
        return VerifyResult.model_validate(answer)

    async def remove(self, checkpoint: str, *, on_stage: OnStage | None = None) -> PruneResult:
        """Remove it and what only it needed. One that a suspended sandbox lives in is refused."""
        path = _wire.path_of("checkpoints", await self._id(checkpoint))
        return PruneResult.model_validate(await self._operations.run("DELETE", path, on_stage=on_stage))

    async def restore(
        self, checkpoint: str, *, as_name: str | None = None, force: bool = False, disk_only: bool = False,
        on_stage: OnStage | None = None,
    ) -> RestoreResult:  # fmt: skip
        """As `AsyncSandbox.restore`, of the sandbox that the checkpoint names or is of."""
        name, at, reference = checkpoint.rpartition("@")
        if not at:
            info = await self.get(checkpoint)
            name, reference = await self._name_of(info), info.id
        return await AsyncSandbox(self._transport, name).restore(
            reference, as_name=as_name, force=force, disk_only=disk_only, on_stage=on_stage
        )

    async def _name_of(self, info: CheckpointInfo) -> str:
        """What the checkpoint's sandbox is called now; one that is gone keeps its name."""
        boxes = await self._transport.request("GET", _wire.path_of("sandboxes"))
        return next((str(box["name"]) for box in boxes if box["id"] == info.sandbox_id), info.sandbox)
