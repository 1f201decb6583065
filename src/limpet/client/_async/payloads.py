"""Payloads of a sandbox: host directories that guest directories are kept in step with."""

from __future__ import annotations

import builtins
import os
from typing import TYPE_CHECKING, Literal

from limpet.client._async.operations import AsyncOperations, OnStage
from limpet.client._async.transport import AsyncTransport
from limpet.client._workdir import host_path
from limpet.models import PayloadStatus

if TYPE_CHECKING:
    from limpet.client._async.sandbox import AsyncSandbox


class AsyncPayloads:
    """`payload` is an id, or the beginning of one."""

    def __init__(self, transport: AsyncTransport, sandbox: AsyncSandbox) -> None:
        self._transport, self._sandbox = transport, sandbox
        self._operations = AsyncOperations(transport)

    async def list(self) -> builtins.list[PayloadStatus]:
        """All of them, and how they are."""
        answer = await self._transport.request("GET", self._sandbox.path("payloads"))
        return [PayloadStatus.model_validate(item) for item in answer]

    async def add(
        self, host_dir: str | os.PathLike[str], guest_dir: str, *, interval: float | None = None,
        on_stage: OnStage | None = None,
    ) -> PayloadStatus:  # fmt: skip
        """Seed `guest_dir` from `host_dir` and keep the latter in step with it from then on, publishing at most once
        in `interval` seconds."""
        body = {"host_dir": host_path(host_dir), "guest_dir": guest_dir, "interval": interval}
        path = self._sandbox.path("payloads")
        return PayloadStatus.model_validate(await self._operations.run("POST", path, body=body, on_stage=on_stage))

    async def remove(self, payload: str, *, on_stage: OnStage | None = None) -> None:
        """Publish a last time and let go. The host directory stays as it is, the guest's goes."""
        await self._operations.run("DELETE", self._sandbox.path("payloads", payload), on_stage=on_stage)

    async def confirm(
        self, payload: str, *, keep: Literal["guest", "host"] = "guest", on_stage: OnStage | None = None
    ) -> PayloadStatus:
        """Go on where it was held back: publish what the guest has, or (`keep="host"`) seed the guest anew."""
        path = self._sandbox.path("payloads", payload, "confirm")
        answer = await self._operations.run("POST", path, body={"keep": keep}, on_stage=on_stage)
        return PayloadStatus.model_validate(answer)
