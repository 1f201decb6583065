"""The channel: one Unix socket to the guest's virtio port, many streams on it. See limpet_agent.frames for the wire.

    connecting ── HELLO with our nonce ──▶ open ── end of file, garbage, silence, a strange HELLO ──▶ closed

A channel is never repaired: whoever needs the guest connects anew, which also makes the agent drop the old streams.
What the guest can make us hold is bounded: 4 MiB for each stream that *we* opened, and one frame. What it can make
us do is bounded: a few frames per turn of the event loop, and a channel that sends thousands of useless ones is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from limpet import errors, log
from limpet.guest.intake import Intake
from limpet.guest.streams import Data, Message, Stream, nonsense
from limpet.names import new_id
from limpet_agent import frames

__all__ = ["Channel", "Data", "Message", "Stream"]

_HELLO_PATIENCE = 1.0  # seconds for one attempt; longer ones only when asked for
_PAUSE = 0.2  # between attempts: the guest has to see that the port was closed
_FRAMES_PER_TURN = 256
_SMALL = 4096  # payloads up to here are copied together
_USELESS = 1 << 16  # frames in a row that belong to no stream
_HIGH_WATER = 1 << 20  # of bytes that the guest has not read
_SILENCE = 5.0  # seconds of silence, with streams open, after which the guest is asked whether it lives
_LAST_CHANCE = 10.0


class Channel(asyncio.Protocol):
    """A session with the guest agent. Make one with `connect`."""

    def __init__(self, intake: Intake | None) -> None:
        self.closed = asyncio.Event()
        self.intake = intake
        self.reason: errors.LimpetError | None = None
        self._nonce = os.urandom(frames.NONCE_SIZE)
        self._finder: frames.HelloFinder | None = frames.HelloFinder(self._nonce)
        self._decoder = frames.Decoder()
        self._hello: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, Stream] = {}
        self._next = 1
        self._useless = 0
        self._small = bytearray()
        self._heard = asyncio.get_running_loop().time()
        self._asked: float | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._watchdog: asyncio.TimerHandle | None = None

    @classmethod
    async def connect(
        cls, path: Path, *, intake: Path | None = None, timeout: float = 10.0, attempt: float = _HELLO_PATIENCE
    ) -> Channel:
        """A session over the socket at `path`, within `timeout` seconds. `attempt` bounds one try: give a booting
        guest a long one. Raises Unavailable."""
        deadline = asyncio.get_running_loop().time() + timeout
        failure = "nothing was tried"
        while (left := deadline - asyncio.get_running_loop().time()) > 0:
            channel = cls(Intake(intake) if intake is not None else None)
            try:
                async with asyncio.timeout(min(left, attempt)):
                    await channel._begin(path)
                return channel
            except TimeoutError:
                failure = "no answer"
            except OSError as error:
                failure = error.strerror or str(error)
            except errors.Unavailable as error:
                failure = error.message
            finally:
                if not channel.opened:
                    await channel.close()
            await asyncio.sleep(min(_PAUSE, max(deadline - asyncio.get_running_loop().time(), 0)))
        raise errors.Unavailable(
            f"the guest agent cannot be reached ({failure}, tried for {timeout:g} s)",
            hint="see: limpet logs NAME --source console",
        )

    @property
    def opened(self) -> bool:
        """Whether requests can be made."""
        return self._finder is None and not self.closed.is_set()

    async def _begin(self, path: Path) -> None:
        await asyncio.get_running_loop().create_unix_connection(lambda: self, str(path))
        assert self._transport is not None
        self._transport.write(frames.hello(self._nonce))
        await self._hello
        self._watch()

    async def open(self, op: str, **params: Any) -> Stream:
        """Begin an operation. Raises Unavailable when the channel is closed, BadRequest when it is too long to send."""
        self._check()
        request = json.dumps({"op": op, "op_id": log.current_op() or new_id("op"), **params}).encode()
        if len(request) > frames.MAX_PAYLOAD:
            raise errors.BadRequest(f"the request is {len(request) >> 10} KiB long, the limit is 1024")
        stream = Stream(self, self._next, op)
        self._next += 2
        self._streams[stream.number] = stream
        self.transmit(stream.number, frames.OPEN, request)
        return stream

    async def close(self, reason: errors.LimpetError | None = None) -> None:
        """End the session; every stream fails with `reason`. Commands in the guest live on."""
        self._shut(reason or errors.Unavailable("the channel to the guest was closed"))

    # -- for streams

    def transmit(self, stream: int, kind: int, payload: bytes | memoryview = b"") -> None:
        """Send one frame."""
        self._check()
        assert self._transport is not None
        head = frames.header(stream, kind, len(payload))
        if len(payload) > _SMALL:
            self._flush()
            self._transport.writelines([head, payload])
            return
        if not self._small:
            asyncio.get_running_loop().call_soon(self._flush)
        self._small += head
        self._small += payload

    def _flush(self) -> None:
        """Small frames of one turn of the loop leave together: the guest wakes up once for them."""
        if self._small and self._transport is not None:
            self._transport.write(bytes(self._small))
            self._small.clear()

    async def drained(self) -> None:
        """Wait until the guest has taken most of what was sent."""
        await self._writable.wait()

    def forget(self, stream: Stream) -> None:
        """The stream is over."""
        self._streams.pop(stream.number, None)

    def _check(self) -> None:
        if self.closed.is_set() or self._transport is None:
            raise self.reason or errors.Unavailable("the channel to the guest is closed")

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        if self.closed.is_set():
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The machine went away, or we closed."""
        self._shut(errors.Unavailable("the connection to the guest was lost", hint="limpet ls tells whether it runs"))

    def pause_writing(self) -> None:
        """The guest reads slowly."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The guest has read."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Bytes from the guest."""
        self._heard = asyncio.get_running_loop().time()
        self._asked = None
        if self._finder is not None:
            rest = self._finder.feed(data)
            if rest is None:
                return
            self._finder = None
            if not self._hello.done():
                self._hello.set_result(None)
            data = rest
        self._decoder.feed(data)
        self._process()

    def _process(self) -> None:
        """Handle a few frames; when there are more, let others have a turn first."""
        if self.closed.is_set() or self._transport is None:
            return
        try:
            for _ in range(_FRAMES_PER_TURN):
                frame = self._decoder.next()
                if frame is None:
                    self._transport.resume_reading()
                    return
                self._handle(*frame)
                if self.closed.is_set():
                    return
        except frames.FrameError as error:
            self._shut(nonsense(str(error)))
            return
        self._transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._process)

    def _handle(self, number: int, kind: int, payload: bytes) -> None:
        if kind == frames.HELLO:
            self._shut(errors.Unavailable("the guest agent was restarted", hint="try again"))
            return
        stream = self._streams.get(number)
        if stream is None:  # of a stream that we gave up, or that never was
            self._useless += 1
            if self._useless > _USELESS:
                self._shut(nonsense("nothing but frames that belong to no stream"))
            return
        self._useless = 0
        stream.arrived(kind, payload)

    # -- liveness

    def _watch(self) -> None:
        """While streams are open, silence is looked into: a mute guest must not leave anyone waiting for ever."""
        if self.closed.is_set():
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        if not self._streams:
            self._asked = None
        elif self._asked is not None and now - self._asked > _LAST_CHANCE:
            self._shut(errors.Unavailable("the guest agent does not answer", hint="limpet restart NAME"))
            return
        elif self._asked is None and now - self._heard > _SILENCE:
            self._asked = now
            self._ask()
        self._watchdog = loop.call_later(_SILENCE / 2, self._watch)

    def _ask(self) -> None:
        number, self._next = self._next, self._next + 2
        with contextlib.suppress(errors.Unavailable):
            self.transmit(number, frames.OPEN, b'{"op":"ping"}')
            self.transmit(number, frames.END)

    def _shut(self, reason: errors.LimpetError) -> None:
        if self.closed.is_set():
            return
        self.reason = reason
        self.closed.set()
        self._small.clear()
        self._writable.set()
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not self._hello.done():
            self._hello.set_exception(reason)
            self._hello.exception()  # nobody has to be waiting for it
        for stream in list(self._streams.values()):
            stream.fail(reason)
        self._streams.clear()
        if self._transport is not None:
            self._transport.abort()
        if self.intake is not None:
            self.intake.close()
