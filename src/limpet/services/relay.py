"""Connections of this host that go on in a guest, over its channel: the bytes, both ways, and the listeners."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Awaitable, Callable

from limpet import log
from limpet.errors import LimpetError, Unavailable
from limpet.guest import Data, Stream
from limpet.guest.intake import SLOT
from limpet.guest.streams import nonsense

_LEFT_BEHIND = 30.0  # seconds for the guest to take what a client had sent before it went away
_LINGER = 2.0  # seconds that the guest then gets to end by itself

_log = log.get("relay")

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: Stream) -> None:
    """Carry one connection, each direction with its own back-pressure and half-close, until both have ended. The
    stream is over afterwards. Raises what broke it off, after the bytes that came before: Unavailable also when the
    client is gone; OSError when it takes nothing any more."""
    sending = asyncio.create_task(_upstream(reader, stream))
    leaving = asyncio.create_task(_give_up(writer, sending, stream))
    breaking = asyncio.create_task(stream.broken())
    try:
        await _downstream(stream, writer)
        await asyncio.wait([sending, breaking], return_when=asyncio.FIRST_COMPLETED)
        await (sending if sending.done() else breaking)
    finally:
        for task in (sending, leaving, breaking):
            task.cancel()
        await asyncio.gather(sending, leaving, breaking, return_exceptions=True)
        await stream.reset()


async def _upstream(reader: asyncio.StreamReader, stream: Stream) -> None:
    try:
        while chunk := await reader.read(SLOT):
            await stream.send_bulk(chunk)
    except OSError as error:  # a connection that was reset carries nothing back either: the guest need not go on
        stream.abort(Unavailable(f"the client went away: {error}"))
        raise
    await stream.end()


async def _downstream(stream: Stream, writer: asyncio.StreamWriter) -> None:
    async for item in stream:
        if not isinstance(item, Data):
            raise nonsense(f"a message amid the bytes of {stream.op}")
        writer.write(item.data)
        await writer.drain()
    writer.write_eof()


async def _give_up(writer: asyncio.StreamWriter, sending: asyncio.Task[None], stream: Stream) -> None:
    """End the stream of a client that is gone: the guest would go on for nobody (`docker logs -f`)."""
    await _hung_up(writer)
    await asyncio.wait([sending], timeout=_LEFT_BEHIND)
    await asyncio.sleep(_LINGER)
    stream.abort(Unavailable("the client went away"))


async def _hung_up(writer: asyncio.StreamWriter) -> None:
    """Wait until the client is gone altogether. End-of-file alone does not tell that from one that only sends no more;
    the kernel does: it reports EPOLLHUP, asked for or not, when both directions are shut."""
    gone, loop = asyncio.Event(), asyncio.get_running_loop()
    with select.epoll(1) as watch:
        watch.register(writer.get_extra_info("socket").fileno(), 0)
        loop.add_reader(watch.fileno(), gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(watch.fileno())


class Listener:
    """A socket that is listened on, and the connections to it: they end with it."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(cls, listening: socket.socket, serve: Serve) -> Listener:
        """Accept on a socket, which is the listener's from now on. `serve` has each connection to itself; it is
        closed afterwards, and LimpetError and OSError are its end."""
        listener = cls(serve)
        listener._server = await asyncio.start_server(listener._accept, sock=listening, limit=SLOT // 2)
        return listener

    async def close(self) -> None:
        """Stop listening and end all connections."""
        if self._server is not None:
            self._server.close()
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._handle(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                await self._serve(reader, writer)
            except LimpetError as error:
                _log.info("relay.ended", reason=error.message)
            writer.close()
            await writer.wait_closed()
        except OSError as error:
            _log.info("relay.ended", reason=str(error))
        finally:
            writer.transport.abort()  # nothing is waited for any more
