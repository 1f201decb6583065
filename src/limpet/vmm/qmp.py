"""QEMU's control socket: the `qemu.qmp` library behind bounded calls and limpet's errors.

QEMU serves one client at a time and keeps running when that client goes: a new daemon just connects again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate

from limpet.errors import DeadlineExceeded, FailedPrecondition, Unavailable

# The library reports each lost connection as an error; here that is how every machine ends.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

_RETRY_S = 0.002


@dataclass(frozen=True)
class MachineEvent:
    """Something QEMU reports under its own name (qemu-qmp-ref(7)): SHUTDOWN, STOP, BLOCK_IO_ERROR, GUEST_PANICKED …"""

    kind: str
    data: dict[str, Any]


class Control:
    """One connection to a QMP socket."""

    def __init__(self, client: QMPClient, events: EventListener) -> None:
        self._client = client
        self._events = events
        self._closing: asyncio.Future[None] | None = None

    @classmethod
    async def connect(cls, path: Path, *, timeout: float) -> Control:
        """Connect and negotiate within `timeout` seconds. Raises Unavailable when nobody listens or answers."""
        try:
            async with asyncio.timeout(timeout):
                return await cls._connect(path)
        except TimeoutError:
            raise Unavailable(f"QEMU did not greet on {path} within {timeout:g} s") from None
        except (QMPError, OSError, EOFError) as error:
            raise Unavailable(f"cannot reach QEMU on {path}: {error}") from None

    @classmethod
    async def _connect(cls, path: Path) -> Control:
        client, events = QMPClient(path.parent.name), EventListener()
        client.register_listener(events)
        try:
            await client.connect(str(path))
        except BaseException:
            await _disconnect(client)
            raise
        return cls(client, events)

    @property
    def connected(self) -> bool:
        return self._client.runstate is Runstate.RUNNING

    async def execute(self, command: str, arguments: dict[str, object] | None = None, *, timeout: float = 5.0) -> Any:
        """Run a QMP command and return its value. Raises FailedPrecondition when QEMU refuses it, Unavailable when
        the connection is lost, DeadlineExceeded after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            raise DeadlineExceeded(f"QEMU did not answer {command} within {timeout:g} s") from None
        except ExecuteError as error:
            raise FailedPrecondition(f"QEMU refused {command}: {error}") from None
        except (QMPError, OSError, EOFError) as error:
            raise Unavailable(f"the connection to QEMU is lost ({command}): {error}") from None

    async def give(self, name: str, fd: int) -> None:
        """Send a descriptor along with `getfd`, under which `name` later commands find it."""
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise Unavailable(f"the connection to QEMU is lost (getfd): {error}") from None
        await self.execute("getfd", {"fdname": name})

    async def events(self) -> AsyncIterator[MachineEvent]:
        """Events since the connection was made, until it ends. One consumer at a time."""
        ending = asyncio.ensure_future(self._ended())
        try:
            while not self._events.empty() or not ending.done():
                if (event := await self._next_event(ending)) is not None:
                    yield MachineEvent(str(event["event"]), dict(event.get("data", {})))
        finally:
            ending.cancel()

    async def _next_event(self, ending: asyncio.Future[None]) -> Any:
        """The next event, or None when there is none yet and the connection has ended."""
        if not self._events.empty():
            return await self._events.get()
        getting = asyncio.ensure_future(self._events.get())
        either: set[asyncio.Future[Any]] = {getting, ending}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return getting.result() if getting.done() else None
        finally:
            getting.cancel()

    async def _ended(self) -> None:
        while self.connected:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Hang up; the machine runs on. Several may close at once: the library cannot take that, so they share one."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(_disconnect(self._client))
        await asyncio.shield(self._closing)


async def _disconnect(client: QMPClient) -> None:
    # Reports why the connection had ended already; whoever needs to know has been told by `execute`.
    with contextlib.suppress(QMPError, OSError, EOFError):
        await client.disconnect()
