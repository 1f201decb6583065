"""Published ports: a listener on the host's 127.0.0.1 whose connections travel over the channel (no guest network)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

from limpet import log
from limpet.errors import AlreadyExists, FailedPrecondition, LimpetError, NotFound
from limpet.guest import Data, Stream
from limpet.models import PortMapping
from limpet.services.live import LiveTable, LiveVM
from limpet.services.records import Records

_CHUNK = 256 << 10
_log = log.get("ports")


@dataclass
class _Published:
    mapping: PortMapping
    server: asyncio.Server
    connections: set[asyncio.Task[None]] = field(default_factory=set)


class Ports:
    """The listeners of all running sandboxes. What a sandbox publishes at every start is in its spec."""

    def __init__(self, records: Records, live: LiveTable) -> None:
        self._records, self._live = records, live
        self._published: dict[str, list[_Published]] = {}

    def of(self, sandbox_id: str) -> list[PortMapping]:
        """What is published now, with the host ports that were given."""
        return [published.mapping for published in self._published.get(sandbox_id, [])]

    async def list(self, name: str) -> Sequence[PortMapping]:
        return self.of(self._records.by_name(name).id)

    async def add(self, name: str, mapping: PortMapping) -> PortMapping:
        """Publish one more port, now and at later starts."""
        record = self._records.by_name(name)
        vm = self._live.require(record.id, name)
        given = await self.publish(vm, mapping)
        self._records.change_spec(record.id, ports=[*record.spec.ports, given])
        return given

    async def remove(self, name: str, host: int) -> None:
        record = self._records.by_name(name)
        entry = next((p for p in self._published.get(record.id, []) if p.mapping.host == host), None)
        kept = [mapping for mapping in record.spec.ports if mapping.host != host]
        if entry is None and len(kept) == len(record.spec.ports):
            raise NotFound(f"{name} does not publish host port {host}", hint=f"limpet ports {name}")
        self._records.change_spec(record.id, ports=kept)
        if entry is not None:
            self._published[record.id].remove(entry)
            await _close(entry)

    async def publish(self, vm: LiveVM, mapping: PortMapping) -> PortMapping:
        """Listen for one mapping. Raises AlreadyExists when the host port is taken."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            entry.connections.add(task)
            try:
                await _relay(vm, mapping.guest, reader, writer)
            finally:
                entry.connections.discard(task)

        try:
            server = await asyncio.start_server(serve, "127.0.0.1", mapping.host, limit=_CHUNK)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AlreadyExists(
                    f"port {mapping.host} of this host is in use",
                    hint="publish on another one, or on 0 for any free one",
                ) from None
            raise FailedPrecondition(f"cannot listen on 127.0.0.1:{mapping.host}: {error.strerror}") from None
        given = PortMapping(host=server.sockets[0].getsockname()[1], guest=mapping.guest)
        entry = _Published(given, server)
        self._published.setdefault(vm.sandbox_id, []).append(entry)
        return given

    async def withdraw(self, sandbox_id: str) -> None:
        """Close all listeners and connections of a sandbox that stops."""
        for entry in self._published.pop(sandbox_id, []):
            await _close(entry)


async def _close(entry: _Published) -> None:
    entry.server.close()
    for task in list(entry.connections):
        task.cancel()
    await asyncio.gather(*entry.connections, return_exceptions=True)


async def _relay(vm: LiveVM, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry one connection, both directions with their own half-close."""
    try:
        with vm.in_use():
            stream = await (await vm.agent()).connect_tcp(port)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(_upstream(reader, stream))
                    both.create_task(_downstream(stream, writer))
            finally:
                await stream.reset()
    except* (LimpetError, OSError) as group:
        _log.info("relay.ended", port=port, reason=str(group.exceptions[0]))
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _upstream(reader: asyncio.StreamReader, stream: Stream) -> None:
    while chunk := await reader.read(_CHUNK):
        await stream.send(chunk)
    await stream.end()


async def _downstream(stream: Stream, writer: asyncio.StreamWriter) -> None:
    async for item in stream:
        if isinstance(item, Data):
            writer.write(item.data)
            await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
