"""Guest side of the channel: many streams on one link, each with its own credit; see frames.py for the wire.

Only the loop's thread touches the link. It sends one frame of one stream, then one of the next, so that a long
transfer delays a short answer by one frame at most. A frame that makes no sense resets its stream; bytes that are
no frames at all make the agent ask for a new connection (`HELLO` without nonce) and ignore the rest of this one.
"""

from __future__ import annotations

from collections import deque

from limpet_agent import codec, frames
from limpet_agent.faults import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from limpet_agent.intake import Intake
    from limpet_agent.links import Link

    Opened = Callable[["Stream", dict[str, Any]], None]

CHUNK = 256 << 10  # the size of DATA frames: large enough to be cheap, small enough to let others in between
HIGH_WATER = 2 * CHUNK
_RETURN_AT = frames.WINDOW // 16
_SMALL = 4096  # payloads up to here are copied together
_BATCH = 16 << 10


class Stream:
    """One conversation. The handlers are called in the loop's thread; replace those that matter."""

    def __init__(self, mux: Mux, number: int) -> None:
        self.number = number
        self.op_id: str | None = None
        self.open = True
        self.ended = False  # the host sends no more
        self.on_data: Callable[[int, bytes], None] = lambda _charge, _data: None
        self.on_reference: Callable[[int, bytes], None] = self._resolve
        self.on_message: Callable[[dict[str, Any]], None] = lambda _message: None
        self.on_end: Callable[[], None] = lambda: None
        self.on_writable: Callable[[], None] = lambda: None
        self.on_gone: Callable[[], None] = lambda: None
        self._mux = mux
        self._outbox: deque[tuple[int, bytes | memoryview]] = deque()
        self._queued = 0
        self._credit = frames.WINDOW
        self._window = frames.WINDOW  # what the host may still send
        self._owed = 0  # taken by us, not yet returned as credit
        self._finished = False

    @property
    def room(self) -> bool:
        """Whether more should be queued now; `on_writable` is called when there is room again."""
        return self.open and self._queued < HIGH_WATER

    def send(self, data: bytes | memoryview, kind: int = frames.DATA) -> None:
        """Queue raw bytes (at most one frame of them)."""
        self._put(kind, data)

    def send_message(self, message: dict[str, Any]) -> None:
        """Queue a control message."""
        self._put(frames.MSG, codec.dumps(message))

    def end(self) -> None:
        """Send no more after what is queued."""
        if self.open and not self._finished:
            self._finished = True
            self._put(frames.END, b"")

    def answer(self, message: dict[str, Any]) -> None:
        """The whole answer of a short operation."""
        self.send_message(message)
        self.end()

    def reset(self, fault: Fault) -> None:
        """End the stream with an error."""
        if self.open:
            self._mux.drop(self)
            self._mux.control(self.number, frames.RESET, codec.dumps(fault.to_dict()))

    def break_off(self, fault: Fault) -> None:
        """End the stream with an error, after what is queued."""
        if self.open and not self._finished:
            self._finished = True
            self._put(frames.RESET, codec.dumps(fault.to_dict()))

    def took(self, charge: int, *, at_once: bool = False) -> None:
        """The consumer is done with bytes that cost `charge`: let the host send as many more. `at_once`: tell it now,
        though it be little: references keep slots of the intake disk from others, on a stream that may then be idle."""
        self._window += charge
        self._owed += charge
        if self.open and (at_once or (self._owed >= _RETURN_AT and not self.ended)):
            self._mux.control(self.number, frames.CREDIT, frames.COUNT.pack(self._owed))
            self._owed = 0

    def _put(self, kind: int, payload: bytes | memoryview) -> None:
        if self.open:
            self._outbox.append((kind, payload))
            self._queued += len(payload)
            self._mux.ready(self)

    def intake(self) -> Intake:
        """The intake disk."""
        return self._mux.intake()

    def _resolve(self, charge: int, payload: bytes) -> None:
        intake = self._mux.intake()
        self.on_data(charge, bytes(intake.fetch(payload, intake.buffer())))

    def next_frame(self) -> tuple[int, bytes | memoryview] | None:
        """What to send now, as the credit allows. For the mux only."""
        if not self._outbox:
            return None
        kind, payload = self._outbox[0]
        cost = frames.charge(kind, payload)
        if cost > self._credit:
            return None
        self._outbox.popleft()
        self._credit -= cost
        self._queued -= len(payload)
        return kind, payload

    def refill(self) -> None:
        """Ask the producer for more when little is left. For the mux only."""
        if self.room and not self._finished:
            self.on_writable()

    def arrived(self, kind: int, payload: bytes) -> None:
        """A frame of this stream. For the mux only. Raises Fault when it breaks the rules."""
        if kind == frames.CREDIT:
            self._credit += frames.COUNT.unpack(payload)[0]
            if self._credit > frames.WINDOW:
                raise Fault("bad_request", "more credit than was spent")
            self._mux.ready(self)
            return
        if self.ended:
            raise Fault("bad_request", f"{frames.NAMES[kind]} after END")
        cost = frames.charge(kind, payload)
        self._window -= cost
        if self._window < 0:
            raise Fault("bad_request", "more bytes than the window allows")
        if kind == frames.DATA:
            self.on_data(cost, payload)
        elif kind == frames.REF:
            self.on_reference(cost, payload)
        elif kind == frames.MSG:
            self.took(cost)
            self.on_message(codec.loads(payload))
        elif kind == frames.END:
            self.ended = True
            self.on_end()
        else:
            raise Fault("bad_request", f"unexpected {frames.NAMES[kind]}")

    def sent_all(self) -> bool:
        """Whether our END has gone out."""
        return self._finished and not self._outbox


class Mux:
    """All streams of one session. `opened(stream, parameters)` starts the operation that an OPEN asks for."""

    def __init__(self, link: Link, opened: Opened, intake: Callable[[], Intake], log: Callable[..., None]) -> None:
        self._link = link
        self._opened = opened
        self._log = log
        self.intake = intake
        self._streams: dict[int, Stream] = {}
        self._decoder = frames.Decoder()
        self._control: deque[bytes] = deque([frames.hello()])  # announce that this agent is a new one
        self._ready: deque[Stream] = deque()
        self._pending: list[bytes | memoryview] = []
        self._deaf = False  # out of step: ignore input until the host connects anew
        link.received, link.writable, link.lost = self._received, self.flush, self._lost

    def __len__(self) -> int:
        return len(self._streams)

    def control(self, number: int, kind: int, payload: bytes) -> None:
        """Send a frame ahead of all data."""
        self._control.append(frames.encode(number, kind, payload))

    def ready(self, stream: Stream) -> None:
        """The stream may have something to send."""
        if stream not in self._ready:
            self._ready.append(stream)

    def drop(self, stream: Stream) -> None:
        """Forget a stream and tell its consumer."""
        stream.open = False
        self._streams.pop(stream.number, None)
        stream.on_gone()

    def flush(self) -> None:
        """Write until the link is full or nothing is left. Called at the end of every turn of the loop, so that the
        small frames of one turn go out in one write: each is an exit from the virtual machine."""
        while self._pending or self._fetch():
            taken = self._link.write(self._pending)
            if not taken:
                return
            self._advance(taken)

    def _advance(self, taken: int) -> None:
        while taken:
            first = self._pending[0]
            if taken < len(first):
                self._pending[0] = memoryview(first)[taken:]
                return
            taken -= len(first)
            del self._pending[0]

    def _fetch(self) -> bool:
        """Put the next frame, or several small ones, into `_pending`."""
        small = bytearray()
        while len(small) < _BATCH:
            if self._control:
                small += self._control.popleft()
                continue
            frame = self._next_of_streams()
            if frame is None:
                break
            head, payload = frame
            if len(payload) > _SMALL:
                self._pending += [bytes(small) + head, payload]
                return True
            small += head
            small += payload
        if small:
            self._pending.append(bytes(small))
        return bool(small)

    def _next_of_streams(self) -> tuple[bytes, bytes | memoryview] | None:
        while self._ready:
            stream = self._ready.popleft()
            if not stream.open:
                continue
            frame = stream.next_frame()
            stream.refill()
            if frame is None:
                continue
            kind, payload = frame
            if stream.sent_all():
                if stream.ended or kind == frames.RESET:
                    self.drop(stream)
            elif stream not in self._ready:
                self._ready.append(stream)
            return frames.header(stream.number, kind, len(payload)), payload
        return None

    def _received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._decoder.feed(data)
        try:
            while (frame := self._decoder.next()) is not None:
                self._handle(*frame)
        except frames.FrameError as error:
            self._log("channel out of step", error=str(error))
            self._deaf = True
            self._drop_all()
            self._control.append(frames.hello())

    def _handle(self, number: int, kind: int, payload: bytes) -> None:
        if kind == frames.HELLO:
            self._begin(frames.hello_nonce(payload))
            return
        stream = self._streams.get(number)
        try:
            if kind == frames.OPEN:
                self._open(number, payload)
            elif stream is not None and kind == frames.RESET:
                self.drop(stream)
            elif stream is not None:
                stream.arrived(kind, payload)
                if stream.ended and stream.sent_all() and stream.open:
                    self.drop(stream)
        except Fault as fault:
            self._refuse(number, fault)
        except Exception as error:  # a bug of ours must not take the other frames along
            self._log("frame failed", error=repr(error))
            self._refuse(number, Fault("internal", f"the guest agent failed: {error!r}"))

    def _refuse(self, number: int, fault: Fault) -> None:
        if (victim := self._streams.get(number)) is not None:
            victim.reset(fault)
        else:
            self.control(number, frames.RESET, codec.dumps(fault.to_dict()))

    def _open(self, number: int, payload: bytes) -> None:
        if number in self._streams or number % 2 == 0:
            raise Fault("bad_request", f"stream {number} cannot be opened")
        stream = Stream(self, number)
        self._streams[number] = stream
        self._opened(stream, codec.loads(payload))

    def _begin(self, nonce: bytes) -> None:
        self._drop_all()
        self._pending.clear()  # a frame cut short; the host looks for our HELLO
        self._control.clear()
        self._control.append(frames.hello(nonce))
        self._link.begun()
        self._log("session")

    def _lost(self) -> None:
        self._decoder.reset()
        self._deaf = False
        self._drop_all()
        self._pending.clear()
        self._control.clear()

    def _drop_all(self) -> None:
        self._ready.clear()
        for stream in list(self._streams.values()):
            self.drop(stream)
