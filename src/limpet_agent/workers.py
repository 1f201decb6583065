"""The blocking face of a stream, for operations that run in a thread of their own."""

from __future__ import annotations

from collections import deque

from limpet_agent import frames
from limpet_agent.faults import Fault, Gone
from limpet_agent.streams import HIGH_WATER, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from mmap import mmap
    from typing import Any


class Worker:
    """The blocking face of a stream, for an operation that runs in a thread of its own."""

    def __init__(self, stream: Stream, post: Callable[[Callable[[], None]], None], wake: Any) -> None:
        self._stream = stream
        self._post = post
        self._wake = wake  # a lock used as a binary semaphore: released by the loop, acquired by the thread
        self._inbox: deque[tuple[int, int, bytes]] = deque()
        self._owed = 0
        self._buffer: mmap | None = None
        self._posted = 0  # counted by the thread
        self._queued = 0  # counted by the loop
        stream.on_data = lambda charge, data: self._arrived(charge, frames.DATA, data)
        stream.on_reference = lambda charge, data: self._arrived(charge, frames.REF, data)
        stream.on_end = stream.on_gone = stream.on_writable = self._stir

    def receive(self) -> bytes | memoryview | None:
        """The next piece of what the host sends, or None at its end; valid until the next call. Raises Gone."""
        self._settle()
        while not self._inbox:
            if not self._stream.open:
                raise Gone
            if self._stream.ended and not self._inbox:
                return None
            self._wake.acquire()
        charge, kind, data = self._inbox.popleft()
        self._owed = charge
        if kind != frames.REF:
            return data
        intake = self._stream.intake()
        if self._buffer is None:
            self._buffer = intake.buffer()
        return intake.fetch(data, self._buffer)

    def send(self, data: bytes | memoryview) -> None:
        """Queue at most one frame of bytes (not to be changed afterwards); waits while the host is behind.
        Raises Gone."""
        self._queue(len(data), lambda: self._stream.send(data))

    def send_message(self, message: dict[str, Any]) -> None:
        """Queue a control message; waits while the host is behind. Raises Gone."""
        self._queue(frames.LEAST_CHARGE, lambda: self._stream.send_message(message))

    def _queue(self, size: int, call: Callable[[], None]) -> None:
        while self._posted - self._queued > HIGH_WATER or not self._stream.room:
            if not self._stream.open:
                raise Gone
            self._wake.acquire()
        self._posted += size

        def run() -> None:
            self._queued += size
            call()
            self._stir()

        self._post(run)

    def finish(self) -> None:
        """Send no more."""
        self._settle()
        self._post(self._stream.end)

    def fail(self, fault: Fault) -> None:
        """End the stream with an error."""
        self._post(lambda: self._stream.reset(fault))

    def _settle(self) -> None:
        if self._owed:
            charge, self._owed = self._owed, 0
            self._post(lambda: self._stream.took(charge))

    def _arrived(self, charge: int, kind: int, data: bytes) -> None:
        self._inbox.append((charge, kind, data))
        self._stir()

    def _stir(self) -> None:
        if self._wake.locked():
            self._wake.release()
