"""Published ports: a listener on the host's 127.0.0.1 whose connections travel over the channel (no guest network)."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from limpet.errors import AlreadyExists, FailedPrecondition, NotFound
from limpet.models import PortMapping
from limpet.services import relay
from limpet.services.live import LiveTable, LiveVM
from limpet.services.records import Records
from limpet.services.relay import Listener


@dataclass(frozen=True)
class _Published:
    mapping: PortMapping
    listener: Listener


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
            await entry.listener.close()

    async def publish(self, vm: LiveVM, mapping: PortMapping) -> PortMapping:
        """Listen for one mapping. Raises AlreadyExists when the host port is taken."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with vm.in_use():
                stream = await (await vm.agent()).connect_tcp(mapping.guest)
                await relay.carry(reader, writer, stream)

        listening = _listen(mapping.host)
        given = PortMapping(host=listening.getsockname()[1], guest=mapping.guest)
        entry = _Published(given, await Listener.start(listening, serve))
        self._published.setdefault(vm.sandbox_id, []).append(entry)
        return given

    async def withdraw(self, sandbox_id: str) -> None:
        """Close all listeners and connections of a sandbox that stops."""
        for entry in self._published.pop(sandbox_id, []):
            await entry.listener.close()


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port), backlog=100)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExists(
                f"port {port} of this host is in use", hint="publish on another one, or on 0 for any free one"
            ) from None
        raise FailedPrecondition(f"cannot listen on 127.0.0.1:{port}: {os.strerror(error.errno or 0)}") from None
