"""The primitives of the synchronous client: the names of `_aio.py`, for threads."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidState, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from limpet.client._wire import CONNECT_TIMEOUT

P = ParamSpec("P")
T = TypeVar("T")

_PIECE = 256 << 10  # bytes read from the socket at once


class Refused(Exception):
    """The handshake of a web socket was answered with an HTTP error."""

    def __init__(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers


class WebSocket:
    """One web socket. Sending and receiving may happen at the same time, in two threads.

    websockets' own threaded connection holds one lock while it writes, which stops its reader: a command that echoes
    much input then waits for us while we wait for it. So we move the bytes ourselves. Whoever holds `_sending` writes;
    the reader never waits for it: what it has to answer it leaves in `_outgoing`, and only tries to write.
    """

    def __init__(self, connection: socket.socket, protocol: ClientProtocol) -> None:
        self._connection, self._protocol = connection, protocol
        self._state, self._sending = threading.Lock(), threading.Lock()
        self._outgoing: deque[memoryview] = deque()
        self._messages: deque[str | bytes] = deque()
        self._parts: list[bytes] = []  # of a message that comes in fragments
        self._text = False

    @classmethod
    def connect(cls, path: Path, target: str, headers: dict[str, str]) -> WebSocket:
        """Raises OSError when nobody listens, Refused when the server does not want this one."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(CONNECT_TIMEOUT)
            connection.connect(str(path))
            opened = cls(connection, ClientProtocol(parse_uri(f"ws://limpet{target}"), max_size=8 << 20))
            opened._handshake(headers)
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
        return opened

    def _handshake(self, headers: dict[str, str]) -> None:
        request = self._protocol.connect()
        request.headers.update(headers)
        self._protocol.send_request(request)
        self._connection.sendall(b"".join(self._protocol.data_to_send()))
        while self._protocol.state is State.CONNECTING and self._protocol.handshake_exc is None:
            self._take(self._connection.recv(_PIECE))
        error = self._protocol.handshake_exc
        if isinstance(error, InvalidStatus):
            answer = error.response
            lower = {key.lower(): value for key, value in answer.headers.raw_items()}
            raise Refused(answer.status_code, bytes(answer.body or b""), lower)
        if error is not None:
            raise ConnectionError(str(error))

    def _take(self, data: bytes) -> None:
        """Bytes that arrived; none means that no more will."""
        with self._state:
            if data:
                self._protocol.receive_data(data)
            else:
                self._protocol.receive_eof()
            for event in self._protocol.events_received():
                if isinstance(event, Frame):
                    self._on_frame(event)
            self._collect()

    def _on_frame(self, frame: Frame) -> None:
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return
        if frame.opcode is not Opcode.CONT:
            self._text = frame.opcode is Opcode.TEXT
        if not frame.fin or self._parts:
            self._parts.append(bytes(frame.data))
        if frame.fin:
            data = b"".join(self._parts) if self._parts else bytes(frame.data)
            self._messages.append(data.decode() if self._text else data)
            self._parts.clear()

    def _collect(self) -> None:
        self._outgoing.extend(memoryview(data) for data in self._protocol.data_to_send() if data)

    def recv(self) -> str | bytes | None:
        """The next message; None when the connection is closed, by whomever."""
        while not self._messages:
            if self._protocol.state is State.CLOSED:
                return None
            try:
                data = self._connection.recv(_PIECE)
            except OSError:
                data = b""
            self._take(data)
            if self._outgoing and self._sending.acquire(blocking=False):
                try:
                    self._flush(socket.MSG_DONTWAIT)
                finally:
                    self._sending.release()
        return self._messages.popleft()

    def send(self, message: str | bytes) -> None:
        """Waits while the server does not read. Raises BrokenPipeError when the connection is closed."""
        with self._sending:
            with self._state:
                if self._protocol.state is not State.OPEN:
                    raise BrokenPipeError("the connection is closed")
                if isinstance(message, str):
                    self._protocol.send_text(message.encode())
                else:
                    self._protocol.send_binary(message)
                self._collect()
            self._flush(0)

    def _flush(self, flags: int) -> None:
        while self._outgoing:
            data = self._outgoing[0]
            try:
                sent = self._connection.send(data, flags)
            except BlockingIOError:
                return
            except OSError:
                raise BrokenPipeError("the connection is closed") from None
            if sent == len(data):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = data[sent:]

    def close(self) -> None:
        """Say goodbye if that can be done at once, and wake everybody who waits here."""
        try:
            self._say_goodbye()
        finally:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()

    def _say_goodbye(self) -> None:
        if not self._sending.acquire(blocking=False):
            return
        try:
            with self._state, contextlib.suppress(InvalidState):
                self._protocol.send_close()
                self._collect()
            with contextlib.suppress(OSError):
                self._flush(socket.MSG_DONTWAIT)
        finally:
            self._sending.release()


class Background:
    """Something that goes on beside the caller, in a thread."""

    def __init__(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        self._error: BaseException | None = None

        def body() -> None:
            try:
                function(*args, **kwargs)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=body, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for its end; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Forget its outcome. A thread cannot be ended: what it works on was closed before."""
        self._thread.join(timeout=5)


def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of a function that blocks: here, just that."""
    return function(*args, **kwargs)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def iterate(data: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces."""
    return iter(data)
