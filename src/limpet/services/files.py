"""Files and directory trees of guests, streamed both ways in constant memory (GST-8)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from limpet.errors import NotFound
from limpet.guest import Agent
from limpet.models import FileInfo, Unpacked
from limpet.services.host import Host
from limpet.services.streams import FileBody


async def _owner(agent: Agent, path: str) -> str | None:
    """The uid that a directory belongs to: what comes into it without a user belongs to that one too."""
    with contextlib.suppress(NotFound):
        return str((await agent.stat(path)).uid)
    return None


class Files:
    """Paths are absolute guest paths. The agent acts as root; what it makes belongs to the user given, else to the
    owner of the directory around it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def _guest(self, name: str) -> contextlib.AbstractAsyncContextManager[Agent]:
        return self._host.live.guest(self._host.records.by_name(name).id, name)

    async def read(self, name: str, path: str) -> FileBody:
        async with self._guest(name) as agent:
            return FileBody(await agent.stat(path), agent.read_file(path))

    async def write(
        self,
        name: str,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        mode: int | None,
        user: str | None,
        parents: bool,
        size: int | None,
    ) -> FileInfo:
        async with self._guest(name) as agent:
            return await agent.write_file(path, chunks, mode=mode, user=user, make_parents=parents)

    async def stat(self, name: str, path: str) -> FileInfo:
        async with self._guest(name) as agent:
            return await agent.stat(path)

    async def list(self, name: str, path: str) -> Sequence[FileInfo]:
        async with self._guest(name) as agent:
            return await agent.list_dir(path)

    async def mkdir(self, name: str, path: str, *, parents: bool, mode: int | None) -> None:
        async with self._guest(name) as agent:
            await agent.mkdir(path, parents=parents, mode=mode)

    async def rename(self, name: str, source: str, target: str) -> None:
        async with self._guest(name) as agent:
            await agent.rename(source, target)

    async def remove(self, name: str, path: str, *, recursive: bool) -> None:
        async with self._guest(name) as agent:
            await agent.remove(path, recursive=recursive)

    async def pack(self, name: str, path: str) -> AsyncIterator[bytes]:
        async with self._guest(name) as agent:
            await agent.stat(path)  # a missing path is an error before the answer begins
            return agent.pack(path)

    async def unpack(self, name: str, path: str, chunks: AsyncIterator[bytes], *, user: str | None) -> Unpacked:
        async with self._guest(name) as agent:
            unpacked = await agent.unpack(path, chunks, user=user or await _owner(agent, path))
            return Unpacked(files=unpacked.files, bytes=unpacked.bytes)
