"""Whether a service answers, by a real call of its API over its Unix socket; each call is bounded."""

from __future__ import annotations

import time
from _socket import AF_UNIX, SO_PEERCRED, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET
from _socket import socket as Socket
from struct import calcsize, pack, unpack

from limpet_agent import codec
from limpet_agent.faults import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

READY, NOT_READY, ERROR = "ready", "not_ready", "error"
PATIENCE = 2.0  # seconds for an answer
_LIST_PATIENCE = 10.0  # for one that takes work
_MOST = 8 << 20  # bytes of an answer
_UCRED = "iII"  # struct ucred (unix(7))

# HTTP/2 (RFC 9113): frame types, flags, and what is sent with them
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_LARGEST_FRAME = 16 << 10
_SERVING = b"\0\0\0\0\2\x08\1"  # gRPC: not compressed, 2 bytes; HealthCheckResponse{status: SERVING}


class Health:
    """What was seen. `pid`: of the process that listens, when one does."""

    __slots__ = ("pid", "reason", "state")

    def __init__(self, state: str, reason: str | None = None, pid: int | None = None) -> None:
        self.state, self.reason, self.pid = state, reason, pid


class Silent(Exception):
    """Somebody took the call and did not answer, or hung up."""


class Call:
    """A connection that has until a certain moment. Raises OSError, Silent."""

    def __init__(self, path: str, patience: float) -> None:
        self._until = time.monotonic() + patience
        self.socket = Socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            self.socket.settimeout(patience)
            self.socket.connect(path)
            self.pid: int = unpack(_UCRED, self.socket.getsockopt(SOL_SOCKET, SO_PEERCRED, calcsize(_UCRED)))[0]
        except BaseException:
            self.socket.close()
            raise

    def send(self, data: bytes) -> None:
        self._patient()
        self.socket.sendall(data)

    def receive(self, most: int = 64 << 10) -> bytes:
        """Some bytes; none at the end."""
        self._patient()
        return self.socket.recv(most)

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.receive(size - len(data))
            if not more:
                raise Silent
            data += more
        return data

    def _patient(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)


def look(path: str, ask: Callable[[Call], str | None]) -> Health:
    """How the service at `path` is. `ask` makes the call and says what is wrong with the answer, if anything."""
    try:
        call = Call(path, PATIENCE)
    except (FileNotFoundError, NotADirectoryError):
        return Health(NOT_READY)
    except ConnectionRefusedError:
        return Health(NOT_READY, "socket exists but nobody listens")
    except OSError as error:  # BlockingIOError: so many wait in the queue that it is full
        return Health(ERROR, _unreachable(error))
    try:
        wrong = ask(call)
    except (OSError, Silent, ValueError):
        wrong = "socket exists but does not answer"
    finally:
        call.socket.close()
    return Health(ERROR if wrong else READY, wrong, call.pid)


def _unreachable(error: OSError) -> str:
    if isinstance(error, BlockingIOError | TimeoutError):
        return "socket exists but does not answer"
    return f"cannot connect: {(error.strerror or str(error)).lower()}"


def ping_docker(call: Call) -> str | None:
    """The Docker API's own ping."""
    status, body = _get(call, "/_ping")
    return None if status == 200 and body == b"OK" else f"answers a ping with HTTP {status}"


def docker(path: str, target: str, patience: float = _LIST_PATIENCE) -> Any:
    """What the Docker API answers to a GET. Raises Fault(unavailable)."""
    try:
        call = Call(path, patience)
        try:
            status, body = _get(call, target)
        finally:
            call.socket.close()
    except (OSError, Silent, ValueError) as error:
        raise Fault("unavailable", f"dockerd does not answer: {error!r}") from None
    if status != 200:
        raise Fault("unavailable", f"dockerd answers {target} with HTTP {status}")
    return codec.loads(b'{"it": ' + body + b"}")["it"]


def _get(call: Call, target: str) -> tuple[int, bytes]:
    """Status and body. HTTP/1.0: the answer comes in one piece and ends with the connection. Raises ValueError."""
    call.send(f"GET {target} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
    answer = bytearray()
    while data := call.receive():
        answer += data
        if len(answer) > _MOST:
            raise ValueError("a longer answer than anybody needs")
    head, found, body = bytes(answer).partition(b"\r\n\r\n")
    version, _, rest = head.partition(b" ")
    if not found or not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise Silent
    return int(rest[:3]), body


def check_grpc(call: Call) -> str | None:
    """grpc.health.v1.Health/Check, with as much HTTP/2 as that takes."""
    headers = {
        ":method": "POST", ":scheme": "http", ":path": "/grpc.health.v1.Health/Check", ":authority": "localhost",
        "content-type": "application/grpc", "te": "trailers",
    }  # fmt: skip
    block = b"".join(_literal(name) + _literal(value, b"") for name, value in headers.items())
    request = _frame(_HEADERS, _END_HEADERS, 1, block) + _frame(_DATA, _END_STREAM, 1, bytes(5))
    call.send(_PREFACE + _frame(_SETTINGS, 0, 0, b"") + request)
    while True:
        head = call.exactly(9)
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        stream = int.from_bytes(head[5:], "big")
        payload = call.exactly(length) if length <= _LARGEST_FRAME else b""
        if stream == 1 and kind == _DATA:
            return None if payload == _SERVING else "says that it is not serving"
        if length > _LARGEST_FRAME or (stream == 1 and flags & _END_STREAM):
            return "does not answer a health check"


def _literal(text: str, prefix: bytes = b"\0") -> bytes:
    """A header's name or value (RFC 7541, 6.2.2): not indexed, not Huffman coded; shorter than 127 bytes."""
    return prefix + bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return pack(">I", len(payload))[1:] + pack(">BBI", kind, flags, stream) + payload
