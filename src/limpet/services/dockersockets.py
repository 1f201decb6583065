"""The Docker API of every running sandbox, on a Unix socket of this host (RUN-6).

    stock docker client ─ docker.sock ─ channel ─ /run/docker.sock in the guest ─ dockerd
                                           └ nobody listens there: the engine is started first

Bytes are carried, not understood: whatever the client and the engine agree on works, hijacked connections too. Only
when there is no engine to talk to the answer is ours, in the form that the client shows: HTTP 503 {"message": …}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from limpet import log, sockets
from limpet.errors import FailedPrecondition, LimpetError, Unavailable
from limpet.guest import Stream
from limpet.models import State
from limpet.services import relay
from limpet.services.live import LiveVM
from limpet.services.records import Records
from limpet.services.relay import Listener

IN_GUEST = "/run/docker.sock"
_REACH = 15.0  # seconds for the guest's agent to answer
_STILL_TRUE = 2.0  # seconds in which a failure is told again instead of tried again: one command asks several times
_ASKED = 5.0  # seconds for the client to say what it wants, when all that it gets is a refusal
_READ_ON = 2.0  # seconds to let it finish, so that it reads the refusal before it meets a broken pipe
_PIECE = 64 << 10
_NOT_NOW = {State.PAUSED: "resume", State.STOPPING: "start"}  # and what to do about it
_log = log.get("docker")


@dataclass
class _Opened:
    vm: LiveVM
    listener: Listener | None = None
    failed: tuple[float, LimpetError] | None = None  # when, and why, its engine last did not come up


class DockerSockets:
    """The listeners of all running sandboxes. `ensure` sees that the engine of a VM is ready."""

    def __init__(
        self, records: Records, ensure: Callable[[LiveVM], Awaitable[object]], *, in_guest: str = IN_GUEST
    ) -> None:
        self._records, self._ensure, self._in_guest = records, ensure, in_guest
        self._opened: dict[str, _Opened] = {}

    async def open(self, vm: LiveVM) -> None:
        """Serve the socket of a VM that runs. One that cannot be made is no reason not to run."""
        await self.close(vm.sandbox_id)
        opened = _Opened(vm)
        self._opened[vm.sandbox_id] = opened

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(opened, reader, writer)

        try:
            opened.listener = await Listener.start(sockets.listen(vm.files.docker_socket), serve)
        except OSError as error:
            _log.warning("docker.not_served", path=str(vm.files.docker_socket), reason=str(error))
            return
        if self._opened.get(vm.sandbox_id) is not opened:  # it has ended meanwhile
            await opened.listener.close()

    async def close(self, sandbox_id: str) -> None:
        """Remove the socket of a sandbox that stops, and end its connections."""
        if (opened := self._opened.pop(sandbox_id, None)) is not None and opened.listener is not None:
            with contextlib.suppress(OSError):
                opened.vm.files.docker_socket.unlink()
            await opened.listener.close()

    async def _serve(self, opened: _Opened, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if sockets.peer(writer.get_extra_info("socket")) not in (os.getuid(), 0):
            return
        if not (first := await reader.read(_PIECE)):  # in HTTP it is the client that begins
            return
        with opened.vm.in_use():
            try:
                stream = await self._connected(opened, first)
            except LimpetError as error:
                await _refuse(first, reader, writer, error)
                raise
            await relay.carry(reader, writer, stream)

    async def _connected(self, opened: _Opened, first: bytes) -> Stream:
        """A connection to the engine, started first when nobody listens, with the first bytes of the client."""
        vm = opened.vm
        record = self._records.by_id(vm.sandbox_id)
        if record.state in _NOT_NOW:  # above all: a stop ends the engine, and no client may bring it back meanwhile
            hint = f"limpet {_NOT_NOW[record.state]} {record.name}"
            raise FailedPrecondition(f"{record.name} is {record.state.value}", hint=hint)
        try:
            return await self._connect(vm, first)
        except Unavailable:
            await self._started(opened)
        return await self._connect(vm, first)

    async def _connect(self, vm: LiveVM, first: bytes) -> Stream:
        return await vm.unless_stalled(self._dial(vm, first))

    async def _dial(self, vm: LiveVM, first: bytes) -> Stream:
        return await (await vm.agent(_REACH)).connect_unix(self._in_guest, first)

    async def _started(self, opened: _Opened) -> None:
        if opened.failed is not None and time.monotonic() - opened.failed[0] < _STILL_TRUE:
            raise opened.failed[1]
        try:
            await self._ensure(opened.vm)
        except LimpetError as error:
            opened.failed = time.monotonic(), error
            raise


async def _refuse(
    request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, error: LimpetError
) -> None:
    """Answer the client's first request with the reason, in one line that `docker` prints."""
    message = f"limpet: {error.message}" + (f" ({error.hint})" if error.hint else "")
    body = json.dumps({"message": message}).encode() + b"\n"
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(_ASKED):
            while b"\r\n\r\n" not in request:
                if len(request) > _PIECE or not (more := await reader.read(_PIECE)):
                    return
                request += more
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + (b"" if request.startswith(b"HEAD ") else body))
        writer.write_eof()
        async with asyncio.timeout(_READ_ON):
            while await reader.read(_PIECE):
                pass
