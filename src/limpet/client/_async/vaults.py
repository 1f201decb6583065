"""Vaults: what sandboxes wrote, generation by generation, on the host's own disk."""

from __future__ import annotations

import builtins
import contextlib
import os
from collections.abc import AsyncIterator
from datetime import datetime

from limpet.client import _wire
from limpet.client._async.operations import AsyncOperations, OnStage
from limpet.client._async.transport import AsyncTransport
from limpet.client._workdir import host_path
from limpet.models import (
    GenerationInfo,
    PathChange,
    PathVersion,
    PruneResult,
    VaultCheck,
    VaultChecks,
    VaultListing,
    VaultRestored,
    VaultUsage,
)

At = int | str | datetime  # a generation's number, or a time (one without a zone is meant in that of this machine)


class AsyncVault:
    """The vault of one sandbox: running, stopped, broken or in the trash. Paths are absolute in the guest; `at` is a
    generation's number or a time, the newest generation when None."""

    def __init__(self, transport: AsyncTransport, sandbox: str) -> None:
        self._transport, self._sandbox = transport, sandbox
        self._operations = AsyncOperations(transport)

    def _path(self, *more: str) -> str:
        return _wire.path_of("sandboxes", self._sandbox, *more)

    async def history(self) -> builtins.list[GenerationInfo]:
        """The generations that are kept, the oldest first."""
        answer = await self._transport.request("GET", self._path("history"))
        return [GenerationInfo.model_validate(item) for item in answer]

    async def versions(self, path: str) -> builtins.list[PathVersion]:
        """The generations in which `path`, or anything below it, changed; the oldest first."""
        answer = await self._transport.request("GET", self._path("versions"), params={"path": path})
        return [PathVersion.model_validate(item) for item in answer]

    async def list(self, path: str = "/", at: At | None = None) -> VaultListing:
        """What `path` was and, for a directory, what it held."""
        params = {"path": path, "at": _text(at)}
        return VaultListing.model_validate(
            await self._transport.request("GET", self._path("vault", "entries"), params=params)
        )

    async def read(self, path: str, at: At | None = None) -> bytes:
        """A whole file."""
        async with self.stream(path, at) as chunks:
            return b"".join([chunk async for chunk in chunks])

    @contextlib.asynccontextmanager
    async def stream(self, path: str, at: At | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """A file in pieces."""
        params = {"path": path, "at": _text(at)}
        async with self._transport.stream("GET", self._path("vault", "file"), params=params) as response:
            yield response.aiter_bytes(_wire.CHUNK)

    async def diff(self, a: At, b: At | None = None) -> AsyncIterator[PathChange]:
        """What differs from one generation to the other, by path."""
        lines = self._transport.lines(self._path("vault", "diff"), params={"a": _text(a), "b": _text(b)})
        async with contextlib.aclosing(lines):
            async for line in lines:
                yield PathChange.model_validate(line)

    async def restore(
        self, path: str | None = None, *, at: At | None = None, to: str | os.PathLike[str] | None = None,
        on_stage: OnStage | None = None,
    ) -> VaultRestored:  # fmt: skip
        """Bring `path` (None: everything) back: to the host directory `to`, which must not be there yet or be empty;
        without `to` into the running guest, after a generation of what is there now."""
        target = None if to is None else host_path(to)
        body = {"path": path, "at": _text(at), "to": target}
        answer = await self._operations.run("POST", self._path("vault", "restore"), body=body, on_stage=on_stage)
        return VaultRestored.model_validate(answer)


class AsyncVaults:
    """All vaults. `name`: of one sandbox, also of one in the trash, or its id; None: all."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._operations = AsyncOperations(transport)

    def of(self, name: str) -> AsyncVault:
        """That of one sandbox, without asking whether there is one."""
        return AsyncVault(self._transport, name)

    async def usage(self) -> builtins.list[VaultUsage]:
        """What each takes of the disk."""
        answer = await self._transport.request("GET", _wire.path_of("vaults"))
        return [VaultUsage.model_validate(item) for item in answer]

    async def check(self, name: str | None = None, *, on_stage: OnStage | None = None) -> builtins.list[VaultCheck]:
        """Read everything again and compare it with its digests. Damage is told, not raised."""
        answer = await self._operations.run("POST", _path(name, "check"), on_stage=on_stage)
        return VaultChecks.model_validate(answer).checks

    async def repair(self, name: str | None = None, *, on_stage: OnStage | None = None) -> builtins.list[VaultCheck]:
        """Set what is damaged aside (nothing is deleted), back to the newest whole generation."""
        answer = await self._operations.run("POST", _path(name, "repair"), on_stage=on_stage)
        return VaultChecks.model_validate(answer).checks

    async def gc(self, name: str | None = None, *, on_stage: OnStage | None = None) -> PruneResult:
        """Thin out old generations now; the daemon does so by itself, too."""
        return PruneResult.model_validate(await self._operations.run("POST", _path(name, "gc"), on_stage=on_stage))


def _path(name: str | None, verb: str) -> str:
    return _wire.path_of("vaults", verb) if name is None else _wire.path_of("sandboxes", name, "vault", verb)


def _text(at: At | None) -> str | None:
    if isinstance(at, datetime):
        return at.astimezone().isoformat()
    return None if at is None else str(at)
