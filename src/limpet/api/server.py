"""uvicorn on a Unix socket that only its owner (and root) can use."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

from limpet import sockets
from limpet.errors import FailedPrecondition

GRACE = 5.0  # seconds that requests under way get at the end
PING = 10.0  # seconds between pings on a web socket
_KEEP_ALIVE = 75  # seconds; longer than any client of ours keeps an idle connection, so that the client closes first
_MESSAGE_MAX = 4 << 20  # bytes of one web socket message from a client


class _Http(HttpToolsProtocol):
    """Refuses other users' processes before a byte of theirs is read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        uid = sockets.peer(transport.get_extra_info("socket"))
        if uid not in (os.getuid(), 0):
            transport.write(_refusal(uid))
            transport.close()
            return
        super().connection_made(transport)


class _WebSocket(WebSocketsSansIOProtocol):
    """Tells the application that the client is gone also when it is not reading: `gone` in the scope's state."""

    async def run_asgi(self) -> None:
        self.gone = self.scope["state"]["gone"] = asyncio.Event()
        await super().run_asgi()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if hasattr(self, "gone"):
            self.gone.set()

    def shutdown(self) -> None:
        try:
            super().shutdown()
        except InvalidState:  # the client is closing already
            self.transport.close()

    def schedule_ping(self) -> None:
        # Evenly. The base class subtracts the last round trip from the interval: a client that was slow to answer once
        # is then sent pings without a pause, for ever.
        assert self.ping_interval is not None
        self.ping_timer = self.loop.call_later(self.ping_interval, self.send_keepalive_ping)

    def send_keepalive_ping(self) -> None:
        if self.transport.get_write_buffer_size():  # what waits to be written finds out by itself, and pings pile up
            self.schedule_ping()
        else:
            super().send_keepalive_ping()


def _refusal(uid: int) -> bytes:
    error = FailedPrecondition(
        f"this limpetd belongs to user {os.getuid()}, not to user {uid}", hint="limpet daemon start (each user has one)"
    )
    body = json.dumps(error.to_dict()).encode()
    head = f"HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


def _config(app: Any, ping: float) -> uvicorn.Config:
    return uvicorn.Config(
        app, http=_Http, ws=_WebSocket, ws_max_size=_MESSAGE_MAX, ws_per_message_deflate=False,
        # Pings find a client that went while its stdin was held back: writing fails then, reading is paused. No answer
        # is asked for: a client that holds output back on purpose gives none.
        ws_ping_interval=ping, ws_ping_timeout=None, lifespan="off", log_config=None, access_log=False,
        server_header=False, date_header=False, timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=int(GRACE),
        reset_contextvars=True,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def serving(app: Any, path: Path, *, ping: float = PING) -> AsyncIterator[None]:
    """Serve `app` on the Unix socket `path` (0600) as long as the block runs. The caller holds the state lock, so a
    socket file that is already there is a dead daemon's and is replaced. `ping`: seconds between pings. Leaving the
    block takes at most `GRACE` seconds and a bit; whoever streams must have been told to end before."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # failures are logged by the API itself
    listener = sockets.listen(path)
    inode = path.stat().st_ino
    config = _config(app, ping)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listener])
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == inode:
                path.unlink()
        await server.shutdown(sockets=[listener])
