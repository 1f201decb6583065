# Made by tools/unasync.py from ../_async/ports.py: edit that one.
"""Published ports: a port of this host's 127.0.0.1 that leads to one of the guest's."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING

from limpet.client._sync.transport import Transport
from limpet.models import PortMapping

if TYPE_CHECKING:
    from limpet.client._sync.sandbox import Sandbox


class Ports:
    def __init__(self, transport: Transport, sandbox: Sandbox) -> None:
        self._transport, self._sandbox = transport, sandbox

    def list(self) -> builtins.list[PortMapping]:
        """What is published now."""
        answer = self._transport.request("GET", self._sandbox.path("ports"))
        return [PortMapping.model_validate(item) for item in answer]

    def publish(self, guest: int, host: int = 0) -> PortMapping:
        """Publish a guest port on this host port; 0: any free one, which the result names."""
        body = {"host": host, "guest": guest}
        return PortMapping.model_validate(self._transport.request("POST", self._sandbox.path("ports"), body=body))

    def remove(self, host: int) -> None:
        self._transport.request("DELETE", self._sandbox.path("ports", str(host)))
