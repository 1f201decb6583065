"""tcp.connect: a stream that ends in a TCP connection inside the guest, so that published ports need no network."""

from __future__ import annotations

import os
from _socket import (  # fmt: skip
    AF_INET,
    AF_INET6,
    IPPROTO_TCP,
    SHUT_WR,
    SO_ERROR,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_NODELAY,
    inet_pton,
)
from _socket import socket as Socket
from collections import deque

from limpet_agent.faults import Fault, from_os
from limpet_agent.loop import IN, OUT, Loop
from limpet_agent.streams import CHUNK, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PATIENCE = 10.0  # seconds to connect


def connect(loop: Loop, stream: Stream, params: dict[str, Any]) -> None:
    """Handle tcp.connect {host, port}. Raises Fault for bad parameters; later failures reset the stream."""
    host, port = params.get("host", "127.0.0.1"), params.get("port")
    if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 65536:
        raise Fault("bad_request", "tcp.connect needs host and port")
    family = AF_INET6 if ":" in host else AF_INET
    try:
        inet_pton(family, host)
    except (OSError, ValueError):
        raise Fault("bad_request", f"{host!r} is not an IP address") from None
    _Relay(loop, stream, Socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC), host, port)


class _Relay:
    """Carries bytes both ways, each with back-pressure of its own, until both sides have ended."""

    def __init__(self, loop: Loop, stream: Stream, socket: Socket, host: str, port: int) -> None:
        self._loop, self._stream, self._socket = loop, stream, socket
        self._where = f"{host}:{port} in the guest"
        self._inbox: deque[tuple[memoryview, int]] = deque()
        self._connected = self._read_all = self._sent_all = self._closed = False
        stream.on_data = self._data
        stream.on_end = stream.on_writable = self._update
        stream.on_gone = self._close
        socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        try:
            socket.connect((host, port))
        except BlockingIOError:
            pass
        except OSError as error:
            self._closed = True
            socket.close()
            raise from_os(error, self._where) from None
        loop.watch(socket.fileno(), OUT, self._finish_connect)
        self._timer = loop.after(_PATIENCE, self._late)

    def _finish_connect(self, _events: int) -> None:
        number = self._socket.getsockopt(SOL_SOCKET, SO_ERROR)
        if number:
            self._stream.reset(from_os(OSError(number, os.strerror(number)), self._where))
            return
        self._timer.cancel()
        self._connected = True
        self._stream.send_message({"connected": True})
        self._update()

    def _late(self) -> None:
        if not self._connected and not self._closed:
            self._stream.reset(Fault("deadline", f"{self._where} does not answer"))

    def _data(self, charge: int, data: bytes) -> None:
        self._inbox.append((memoryview(data), charge))
        self._update()

    def _update(self) -> None:
        """Watch for what can make progress now."""
        if self._closed or not self._connected:
            return
        if self._stream.ended and not self._inbox and not self._sent_all:
            self._sent_all = True
            try:
                self._socket.shutdown(SHUT_WR)
            except OSError:
                pass
        wants_in = not self._read_all and self._stream.room
        wants_out = bool(self._inbox)
        if wants_in or wants_out:
            self._loop.watch(self._socket.fileno(), IN * wants_in | OUT * wants_out, self._ready)
        else:
            self._loop.unwatch(self._socket.fileno())
        if self._read_all and self._sent_all:
            self._close()

    def _ready(self, events: int) -> None:
        try:
            if events & OUT and self._inbox:
                self._write()
            if events & ~OUT and not self._read_all and self._stream.room:
                self._read()
        except BlockingIOError:
            pass
        except OSError as error:
            self._stream.reset(from_os(error, self._where))
        self._update()

    def _write(self) -> None:
        data, charge = self._inbox[0]
        taken = self._socket.send(data)
        if taken < len(data):
            self._inbox[0] = (data[taken:], charge)
        else:
            self._inbox.popleft()
            self._stream.took(charge)

    def _read(self) -> None:
        data = self._socket.recv(CHUNK)
        if data:
            self._stream.send(data)
        else:
            self._read_all = True
            self._stream.end()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
