"""tcp.connect and unix.connect: a stream that ends in a connection inside the guest, so that published ports and the
Docker API need no network."""

from __future__ import annotations

import os
from _socket import (  # fmt: skip
    AF_INET,
    AF_INET6,
    AF_UNIX,
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

from limpet_agent.faults import Fault
from limpet_agent.loop import IN, OUT, Loop, Timer
from limpet_agent.streams import CHUNK, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap
    from typing import Any

    Address = tuple[str, int] | bytes

_PATIENCE = 10.0  # seconds to connect
_BACKLOG_RETRY = 0.02  # seconds
_PATH_MAX = 107  # bytes, unix(7)


def connect_tcp(loop: Loop, stream: Stream, params: dict[str, Any]) -> None:
    """Handle tcp.connect {host, port}. Raises Fault for bad parameters; later failures reset the stream."""
    host, port = params.get("host", "127.0.0.1"), params.get("port")
    if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 65536:
        raise Fault("bad_request", "tcp.connect needs host and port")
    family = AF_INET6 if ":" in host else AF_INET
    try:
        inet_pton(family, host)
    except (OSError, ValueError):
        raise Fault("bad_request", f"{host!r} is not an IP address") from None
    socket = Socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
    socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
    _Relay(loop, stream, socket, (host, port), f"{host}:{port} in the guest").connect()


def connect_unix(loop: Loop, stream: Stream, params: dict[str, Any]) -> None:
    """Handle unix.connect {path}. Raises Fault for bad parameters; later failures reset the stream."""
    path = params.get("path")
    address = os.fsencode(path) if isinstance(path, str) else b""
    if not address.startswith(b"/") or b"\0" in address or len(address) > _PATH_MAX:
        raise Fault("bad_request", f"unix.connect needs an absolute path of at most {_PATH_MAX} bytes")
    socket = Socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
    _Relay(loop, stream, socket, address, f"{path} in the guest").connect()


class _Relay:
    """Carries bytes both ways, each with back-pressure of its own, until both sides have ended. A peer that takes no
    more is still listened to: its last words say why."""

    def __init__(self, loop: Loop, stream: Stream, socket: Socket, address: Address, where: str) -> None:
        self._loop, self._stream, self._socket = loop, stream, socket
        self._address, self._where = address, where
        self._inbox: deque[tuple[int, bytes, bool]] = deque()  # charge, bytes or reference, whether it is a reference
        self._unsent: memoryview | None = None  # of the first in the inbox, once it is resolved
        self._buffer: mmap | None = None  # for what lies on the intake disk
        self._connected = self._read_all = self._sent_all = self._closed = False
        self._retry: Timer | None = None
        stream.on_data = lambda charge, data: self._arrived(charge, data, False)
        stream.on_reference = lambda charge, payload: self._arrived(charge, payload, True)
        stream.on_end = stream.on_writable = self._update
        stream.on_gone = self._close
        self._timer = loop.after(_PATIENCE, self._late)

    def connect(self) -> None:
        """Begin to connect. Raises Fault when that fails at once."""
        try:
            self._try_to_connect()
        except OSError as error:
            self._close()
            raise self._fault(error) from None

    def _try_to_connect(self) -> None:
        try:
            self._socket.connect(self._address)
        except BlockingIOError:
            if isinstance(self._address, bytes):  # unix(7): EAGAIN says that its backlog is full, nothing is under way
                self._retry = self._loop.after(_BACKLOG_RETRY, self._try_again)
                return
        self._loop.watch(self._socket.fileno(), OUT, self._finish_connect)

    def _try_again(self) -> None:
        try:
            self._try_to_connect()
        except OSError as error:
            self._stream.reset(self._fault(error))

    def _finish_connect(self, _events: int) -> None:
        number = self._socket.getsockopt(SOL_SOCKET, SO_ERROR)
        if number:
            self._stream.reset(self._fault(OSError(number, os.strerror(number))))
            return
        self._timer.cancel()
        self._connected = True
        self._stream.send_message({"connected": True})
        self._update()

    def _late(self) -> None:
        if not self._connected and not self._closed:
            self._stream.reset(Fault("deadline", f"{self._where} does not answer"))

    def _fault(self, error: OSError) -> Fault:
        absent = isinstance(error, FileNotFoundError)
        reason = "nobody listens" if absent else (error.strerror or str(error)).lower()
        return Fault("unavailable", f"{self._where}: {reason}")

    def _arrived(self, charge: int, data: bytes, is_reference: bool) -> None:
        if not self._sent_all:
            self._inbox.append((charge, data, is_reference))
            self._update()
        elif self._stream.sent_all():  # closed for good: as TCP answers with RST
            self._stream.reset(Fault("unavailable", f"{self._where}: the connection was closed"))
        else:
            self._stream.took(charge, at_once=is_reference)

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
        except Fault as fault:
            self._stream.reset(fault)
        self._update()

    def _write(self) -> None:
        charge, data, is_reference = self._inbox[0]
        if self._unsent is None:
            self._unsent = self._resolved(data) if is_reference else memoryview(data)
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self._write_no_more()
            return
        if not self._unsent:
            self._unsent = None
            self._inbox.popleft()
            self._stream.took(charge, at_once=is_reference)

    def _resolved(self, payload: bytes) -> memoryview:
        """What a reference stands for. One buffer serves them all: each is sent before the next is looked at."""
        intake = self._stream.intake()
        if self._buffer is None:
            self._buffer = intake.buffer()
        return intake.fetch(payload, self._buffer)

    def _write_no_more(self) -> None:
        """The peer takes nothing any more: what is meant for it goes nowhere, what it said before still counts."""
        self._sent_all, self._unsent = True, None
        while self._inbox:
            charge, _, is_reference = self._inbox.popleft()
            self._stream.took(charge, at_once=is_reference)

    def _read(self) -> None:
        try:
            data = self._socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._read_all = True
            self._stream.break_off(self._fault(error))
            return
        if data:
            self._stream.send(data)
        else:
            self._read_all = True
            self._stream.end()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            if self._retry is not None:
                self._retry.cancel()
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
