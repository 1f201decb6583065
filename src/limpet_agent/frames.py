"""The channel's codec: bytes in, frames out, no I/O. Both sides share it; the host feeds it hostile bytes.

    frame   := u32 length | u32 stream | u8 kind | payload          big-endian; `length` counts the payload

    HELLO    1  magic (8 bytes) + nonce (16): begins a session, stream 0
    OPEN     2  JSON {"op": …, "op_id": …, parameters}: opens a stream (host: odd ids, guest: even)
    DATA     3  raw bytes: standard input or output, file contents
    DATA_ERR 4  raw bytes: standard error
    CREDIT   5  u32: that many bytes were taken, so many more may be sent
    END      6  this side sends no more (half-close)
    RESET    7  JSON {"code", "message", "hint"?}: the stream is over
    MSG      8  JSON: an answer or a control message on an open stream
    REF      9  u64 offset | u32 length | u32 crc32: the bytes lie on the intake disk; stands for a DATA of that length

Every kind has a cap on its length, checked as soon as the header is there, before memory is taken for the payload.
A stream's DATA, DATA_ERR, MSG and REF frames draw on a window of `WINDOW` bytes per direction (`charge`).
"""

from __future__ import annotations

from struct import Struct

HELLO, OPEN, DATA, DATA_ERR, CREDIT, END, RESET, MSG, REF = range(1, 10)
NAMES = ("?", "HELLO", "OPEN", "DATA", "DATA_ERR", "CREDIT", "END", "RESET", "MSG", "REF")

MAGIC = b"LIMPET\x00\x01"
NONCE_SIZE = 16
NO_NONCE = bytes(NONCE_SIZE)  # in a HELLO that nobody asked for: "I am new, or lost the thread; connect again"
MAX_PAYLOAD = 1 << 20
MAX_MESSAGE = 64 << 10
WINDOW = 4 << 20
LEAST_CHARGE = 256  # what a tiny frame costs, so that a window also bounds the number of queued frames

HEADER = Struct(">IIB")
REFERENCE = Struct(">QII")
COUNT = Struct(">I")

_LIMITS = {
    HELLO: len(MAGIC) + NONCE_SIZE, OPEN: MAX_PAYLOAD, DATA: MAX_PAYLOAD, DATA_ERR: MAX_PAYLOAD, CREDIT: COUNT.size,
    END: 0, RESET: MAX_MESSAGE, MSG: MAX_MESSAGE, REF: REFERENCE.size,
}  # fmt: skip
_EXACT = frozenset((HELLO, CREDIT, END, REF))


class FrameError(Exception):
    """Bytes that are no frame. The decoder that raised it raises it for ever: there is no way back into step."""

    code = "bad_request"


def encode(stream: int, kind: int, payload: bytes = b"") -> bytes:
    """One frame as bytes. Raises FrameError when the payload is longer than its kind allows."""
    return header(stream, kind, len(payload)) + payload


def header(stream: int, kind: int, length: int) -> bytes:
    """The header of a frame whose payload is written apart (large DATA, without a copy)."""
    _check(kind, length)
    return HEADER.pack(length, stream, kind)


def hello(nonce: bytes = NO_NONCE) -> bytes:
    """A whole HELLO frame."""
    return encode(0, HELLO, MAGIC + nonce)


def hello_nonce(payload: bytes) -> bytes:
    """The nonce of a HELLO's payload. Raises FrameError when the magic is another protocol's."""
    if payload[: len(MAGIC)] != MAGIC:
        raise FrameError("HELLO of another protocol")
    return payload[len(MAGIC) :]


def charge(kind: int, payload: bytes | memoryview) -> int:
    """What a frame takes from its stream's window, in bytes; 0 for kinds that are not flow-controlled."""
    if kind == REF:
        return max(int(REFERENCE.unpack(payload)[1]), LEAST_CHARGE)
    return max(len(payload), LEAST_CHARGE) if kind in (DATA, DATA_ERR, MSG) else 0


def reference(payload: bytes) -> tuple[int, int, int]:
    """(offset, length, crc32) of a REF. Raises FrameError when the length is 0 or above the cap."""
    offset, length, checksum = REFERENCE.unpack(payload)
    if not 0 < length <= MAX_PAYLOAD:
        raise FrameError(f"REF of {length} bytes")
    return offset, length, checksum


def _check(kind: int, length: int) -> None:
    limit = _LIMITS.get(kind)
    if limit is None:
        raise FrameError(f"frame of unknown kind {kind}")
    if length > limit or (kind in _EXACT and length != limit):
        raise FrameError(f"{NAMES[kind]} frame of {length} bytes, the limit is {limit}")


class Decoder:
    """Cuts a byte stream into frames. Holds at most one frame's worth of bytes beyond what was fed last."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0
        self._error: FrameError | None = None

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes in. Call `next` until it returns None before feeding more."""
        if self._error is None:
            self._buffer += data

    def next(self) -> tuple[int, int, bytes] | None:
        """The next (stream, kind, payload), or None when more bytes are needed. Raises FrameError for garbage."""
        if self._error is not None:
            raise self._error
        buffer, start = self._buffer, self._position
        body = start + HEADER.size
        if len(buffer) >= body:
            length, stream, kind = HEADER.unpack_from(buffer, start)
            try:
                _check(kind, length)
            except FrameError as error:
                self._error = error
                self._buffer = bytearray()
                raise
            if len(buffer) >= body + length:
                self._position = body + length
                return stream, kind, bytes(memoryview(buffer)[body : body + length])
        if start:
            del buffer[:start]
            self._position = 0
        return None

    def reset(self) -> None:
        """Forget everything, as at the start of a connection."""
        self._buffer = bytearray()
        self._position = 0
        self._error = None


class HelloFinder:
    """Throws away what an earlier session left in the pipe until the HELLO with our nonce comes by."""

    def __init__(self, nonce: bytes) -> None:
        self._wanted = hello(nonce)
        self._tail = b""

    def feed(self, data: bytes) -> bytes | None:
        """What follows the HELLO once it was seen, None before. Keeps less than one HELLO of memory."""
        joined = self._tail + data
        before, found, after = joined.partition(self._wanted)
        if found:
            return after
        self._tail = before[-(len(self._wanted) - 1) :]
        return None
