"""Bringing a generation's files back: to a new directory of the host, or into the guest that runs.

to a directory   every byte verified on the way, everything published by one rename (vault/restoring.py)
into the guest   what is there now is made a generation, which is kept for a week; then the old files take its place
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition
from limpet.guest import Agent
from limpet.models import VaultRestored
from limpet.services.host import Host
from limpet.services.operations import RunningStage, Stages
from limpet.services.syncing import Syncing
from limpet.services.vaulttable import OpenVault
from limpet.services.vaultview import Part, parts
from limpet.vault import Generation, restoring

_SAVED_FOR = timedelta(days=7)
_PIECE = 1 << 20  # bytes of an archive that are put together at a time


class Restore:
    """One restore of one generation."""

    def __init__(
        self, host: Host, syncing: Syncing, sandbox_id: str, name: str, opened: OpenVault, generation: Generation
    ) -> None:
        self._host, self._syncing = host, syncing
        self._sandbox_id, self._name = sandbox_id, name
        self._opened, self._generation = opened, generation

    async def to_directory(self, path: bytes, to: str, stages: Stages) -> VaultRestored:
        """Raises NotFound, BadRequest for a directory that will not do, Damaged, InsufficientSpace."""
        run, loop = self._host.vaults.run, asyncio.get_running_loop()
        with self._opened.reading() as vault:
            async with stages.run("write") as stage:
                found = await run(parts, self._generation, path)
                wanted = [(part.tree, part.path, part.place) for part in found]
                done = await run(restoring.restore_all, wanted, Path(to), progress=_teller(stage, loop))
            if len(found) == len(self._generation.volumes) and vault.damage is None:
                async with self._opened.lock:
                    await run(vault.mark_verified, datetime.now(UTC))
        return self._told(path, to, done.files, done.bytes, left_out=done.left_out)

    async def into_guest(self, path: bytes, stages: Stages) -> VaultRestored:
        """Raises FailedPrecondition when it does not run, and whatever prevents that the present is saved first."""
        async with self._host.locks.workspace(self._sandbox_id, f"restore into {self._name}"):
            with self._opened.reading():
                async with stages.run("save the present"):
                    saved = await self._save()
                await self._syncing.hold(self._sandbox_id)  # no generation of something half restored
                try:
                    async with stages.run("write") as stage:
                        files, size = await self._write(path, stage)
                finally:
                    self._syncing.go_on(self._sandbox_id)
        return self._told(path, None, files, size, saved=saved)

    async def _write(self, path: bytes, stage: RunningStage) -> tuple[int, int]:
        run, files, size = self._host.vaults.run, 0, 0
        found = await run(parts, self._generation, path)
        async with self._host.live.guest(self._sandbox_id, self._name) as agent:
            for part in found:
                stage.update(detail=os.fsdecode(part.mount))
                crashpoint("vault.restore.guest.before")
                await self._unpack(agent, part, found)
                crashpoint("vault.restore.guest.after")
                of_part = await run(part.tree.totals, part.path)
                files, size = files + of_part[0], size + of_part[1]
        return files, size

    async def _save(self) -> int | None:
        """Make the present a generation that is kept whatever its age."""
        number = (await self._syncing.now(self._sandbox_id)).generation
        if number is not None:
            async with self._opened.lock:
                why, until = f"before a restore of generation {self._generation.number}", datetime.now(UTC) + _SAVED_FOR
                await self._host.vaults.run(self._opened.vault.pin, number, why, until)
        return number

    async def _unpack(self, agent: Agent, part: Part, found: list[Part]) -> None:
        """A directory takes the place of what is there, unless something is mounted in it; a file that of a file."""
        node = await self._host.vaults.run(part.tree.lookup, part.path)
        if node is None:
            raise FailedPrecondition(f"{os.fsdecode(part.mount)} is not in generation {self._generation.number}")
        inner = any(other.mount.startswith(part.mount + b"/") for other in found)
        target = part.mount if node.kind == "dir" else part.mount.rpartition(b"/")[0] or b"/"
        archive = self._archive(restoring.pack(part.tree, part.path))
        await agent.unpack(os.fsdecode(target), archive, replace=node.kind == "dir" and not inner)

    async def _archive(self, pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
        while piece := await self._host.vaults.run(_some, pieces):
            yield piece

    def _told(
        self, path: bytes, to: str | None, files: int, size: int, *,
        left_out: dict[str, int] | None = None, saved: int | None = None,
    ) -> VaultRestored:  # fmt: skip
        return VaultRestored(
            generation=self._generation.number, time=self._generation.time, path=os.fsdecode(path), to=to,
            files=files, bytes=size, left_out=left_out or {}, saved=saved,
        )  # fmt: skip


def _some(pieces: Iterator[bytes]) -> bytes:
    """The next megabyte; nothing at the end."""
    kept = bytearray()
    for piece in pieces:
        kept += piece
        if len(kept) >= _PIECE:
            break
    return bytes(kept)


def _teller(stage: RunningStage, loop: asyncio.AbstractEventLoop) -> restoring.Progress:
    def tell(files: int, size: int) -> None:
        loop.call_soon_threadsafe(lambda: stage.update(detail=f"{files} files, {size >> 20} MiB"))

    return tell
