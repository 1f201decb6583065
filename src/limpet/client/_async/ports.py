"""Published ports: a port of this host's 127.0.0.1 that leads to one of the guest's."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING

from limpet.client._async.transport import AsyncTransport
from limpet.models import PortMapping

if TYPE_CHECKING:
    from limpet.client._async.sandbox import AsyncSandbox


class AsyncPorts:
    def __init__(self, transport: AsyncTransport, sandbox: AsyncSandbox) -> None:
        self._transport, self._sandbox = transport, sandbox

    async def list(self) -> builtins.list[PortMapping]:
        """What is published now."""
        answer = await self._transport.request("GET", self._sandbox.path("ports"))
        return [PortMapping.model_validate(item) for item in answer]

    async def publish(self, guest: int, host: int = 0) -> PortMapping:
        """Publish a guest port on this host port; 0: any free one, which the result names."""
        body = {"host": host, "guest": guest}
        return PortMapping.model_validate(await self._transport.request("POST", self._sandbox.path("ports"), body=body))

    async def remove(self, host: int) -> None:
        await self._transport.request("DELETE", self._sandbox.path("ports", str(host)))
