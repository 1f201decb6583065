"""The workspace: a host directory in the guest, and its changes on their way back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from limpet.client._async.operations import AsyncOperations, OnStage
from limpet.client._async.transport import AsyncTransport
from limpet.models import ApplyResult, Changes, Drift, ImportResult

if TYPE_CHECKING:
    from limpet.client._async.sandbox import AsyncSandbox


class AsyncWorkspace:
    def __init__(self, transport: AsyncTransport, sandbox: AsyncSandbox) -> None:
        self._transport, self._sandbox = transport, sandbox

    async def import_(
        self, host_dir: str | os.PathLike[str], *, untracked: bool = True, dry_run: bool = False,
        replace: bool = False, on_stage: OnStage | None = None,
    ) -> ImportResult:  # fmt: skip
        """Bring a host directory in, a git repository with its uncommitted work. `dry_run` only lists the paths. Work
        in the sandbox that was not taken back is in the way (FailedPrecondition) unless `replace` gives it up."""
        host = os.path.realpath(host_dir)
        body = {"host_dir": host, "untracked": untracked, "dry_run": dry_run, "replace": replace}
        answer = await AsyncOperations(self._transport).run(
            "POST", self._sandbox.path("workspace", "import"), body=body, on_stage=on_stage
        )
        return ImportResult.model_validate(answer)

    async def changes(self, base: str | None = None) -> Changes:
        """The files that differ from `base` (default: the state that was imported)."""
        answer = await self._transport.request("GET", self._sandbox.path("workspace", "changes"), params={"base": base})
        return Changes.model_validate(answer)

    async def patch(self, base: str | None = None) -> bytes:
        """All changes as one binary-safe patch."""
        async with self.patch_stream(base) as (_, chunks):
            return b"".join([chunk async for chunk in chunks])

    @contextlib.asynccontextmanager
    async def patch_stream(self, base: str | None = None) -> AsyncIterator[tuple[str, AsyncIterator[bytes]]]:
        """The base that was used, and the patch in pieces."""
        path = self._sandbox.path("workspace", "patch")
        async with self._transport.stream("GET", path, params={"base": base}) as response:
            yield response.headers.get("limpet-base", ""), response.aiter_bytes()

    async def apply(
        self, host_dir: str | os.PathLike[str] | None = None, *, base: str | None = None, check: bool = False
    ) -> ApplyResult:
        """Bring the changes into `host_dir` (default: where they came from), all or nothing. `check` only says
        whether that would work."""
        body = {"host_dir": None if host_dir is None else os.path.realpath(host_dir), "base": base, "check": check}
        answer = await self._transport.request("POST", self._sandbox.path("workspace", "apply"), body=body)
        return ApplyResult.model_validate(answer)

    async def drift(self) -> Drift:
        """Whether the host directory changed since it was imported."""
        return Drift.model_validate(await self._transport.request("GET", self._sandbox.path("workspace", "drift")))
