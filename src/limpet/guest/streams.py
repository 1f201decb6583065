"""One stream of the channel, seen from the host: credit both ways, bounded queues, typed ends."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from limpet import errors
from limpet.guest.intake import SLOT, Intake
from limpet_agent import frames

PATIENCE = 60.0  # seconds without any progress of a stream before it is given up
CHUNK = 256 << 10
_RETURN_AT = frames.WINDOW // 16


@dataclass(frozen=True, slots=True)
class Data:
    """Raw bytes from the guest; lane 1 is standard output (or the only lane), 2 standard error."""

    lane: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Message:
    """A control message from the guest: some JSON object, to be validated by whoever wants something of it."""

    body: dict[str, Any]


class Wire(Protocol):
    """What a stream needs of its channel."""

    intake: Intake | None

    def transmit(self, stream: int, kind: int, payload: bytes | memoryview = b"") -> None:
        """Send one frame. Raises Unavailable when the channel is closed."""

    async def drained(self) -> None:
        """Wait until the guest has taken most of what was sent."""

    def forget(self, stream: Stream) -> None:
        """The stream is over."""


def nonsense(what: str) -> errors.Unavailable:
    """The error for a guest that does not keep to the protocol."""
    return errors.Unavailable(f"the guest agent answered nonsense: {what}", hint="limpet restart NAME")


class Stream:
    """A conversation with the agent. Iterate it for what the guest sends; leave it with `reset` or to its end."""

    def __init__(self, wire: Wire, number: int, op: str) -> None:
        self.number = number
        self.op = op
        self.patience: float | None = PATIENCE  # None: silence is normal (a command that prints nothing)
        self._wire = wire
        self._inbox: deque[tuple[int, bytes]] = deque()
        self._arrived = asyncio.Event()
        self._window = frames.WINDOW  # what the guest may still send
        self._owed = 0
        self._credit = frames.WINDOW
        self._more_credit = asyncio.Event()
        self._slots: deque[tuple[int, int | None]] = deque()  # what was sent and not yet credited: charge, slot
        self._ended_here = self._ended_there = False
        self._error: errors.LimpetError | None = None

    # -- sending

    async def send(self, data: bytes | memoryview) -> None:
        """Send raw bytes as DATA; waits for credit. Raises the error that ended the stream, if one did."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            await self._send_frame(frames.DATA, view[start : start + CHUNK])

    async def send_bulk(self, data: bytes | memoryview) -> None:
        """Send raw bytes through the intake disk, or as DATA when there is none or it is not worth it."""
        intake = self._wire.intake
        if intake is None or len(data) < 16 << 10:
            await self.send(data)
            return
        view = memoryview(data)
        for start in range(0, len(view), SLOT):
            piece = view[start : start + SLOT]
            await self._spend(len(piece))
            slot = await self._bounded(intake.take(), "room on the intake disk")
            try:
                offset, checksum = intake.write(slot, piece)
                self._check()
                self._wire.transmit(self.number, frames.REF, frames.REFERENCE.pack(offset, len(piece), checksum))
            except BaseException:
                intake.give_back(slot)
                raise
            self._slots.append((max(len(piece), frames.LEAST_CHARGE), slot))

    async def send_message(self, message: dict[str, Any]) -> None:
        """Send a control message (at most 64 KiB of JSON)."""
        payload = json.dumps(message).encode()
        if len(payload) > frames.MAX_MESSAGE:
            raise errors.BadRequest("the message is too long for the channel")
        await self._send_frame(frames.MSG, payload)

    async def end(self) -> None:
        """Send no more. Does nothing when the stream is over."""
        if not self._ended_here and self._error is None:
            self._ended_here = True
            self._wire.transmit(self.number, frames.END)
            self._maybe_over()

    async def reset(self, error: errors.LimpetError | None = None) -> None:
        """Give the stream up; the guest is told, and whoever waits on it gets the error."""
        self.abort(error or errors.Unavailable(f"{self.op} was given up"))

    def abort(self, error: errors.LimpetError) -> None:
        """`reset` for callers that cannot wait."""
        if self._error is None and not (self._ended_here and self._ended_there):
            body = json.dumps({"code": error.code, "message": error.message[:1000]}).encode()
            try:
                self._wire.transmit(self.number, frames.RESET, body)
            except errors.Unavailable:
                pass
        self.fail(error)

    async def _send_frame(self, kind: int, payload: bytes | memoryview) -> None:
        await self._spend(len(payload))
        self._wire.transmit(self.number, kind, payload)
        self._slots.append((max(len(payload), frames.LEAST_CHARGE), None))
        await self._bounded(self._wire.drained(), "the guest to read")

    async def _spend(self, size: int) -> None:
        charge = max(size, frames.LEAST_CHARGE)
        self._check()
        while self._credit < charge:
            self._more_credit.clear()
            await self._bounded(self._more_credit.wait(), "the guest to take bytes")
            self._check()
        self._credit -= charge

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._ended_here:
            raise errors.Internal(f"{self.op}: sending after the end")

    # -- receiving

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Data | Message:
        item = await self.receive()
        if item is None:
            raise StopAsyncIteration
        return item

    async def receive(self) -> Data | Message | None:
        """The next piece, None after the guest's END. Raises the error that ended the stream, if one did."""
        while not self._inbox:
            if self._error is not None:
                raise self._error
            if self._ended_there:
                return None
            self._arrived.clear()
            await self._bounded(self._arrived.wait(), "an answer of the guest")
        kind, payload = self._inbox.popleft()
        self._return_credit(frames.charge(kind, payload))
        if kind == frames.MSG:
            return Message(self._parse(payload))
        return Data(1 if kind == frames.DATA else 2, payload)

    async def broken(self) -> NoReturn:
        """Wait for the error that ends the stream, also after the guest's END; for ever when none does."""
        while self._error is None:
            self._arrived.clear()
            await self._arrived.wait()
        raise self._error

    async def message(self) -> dict[str, Any]:
        """The next piece, which has to be a control message."""
        item = await self.receive()
        if isinstance(item, Message):
            return item.body
        error = nonsense(f"no message where {self.op} needs one")
        self.abort(error)
        raise error

    def _parse(self, payload: bytes) -> dict[str, Any]:
        try:
            return parse_object(payload)
        except ValueError as wrong:
            error = nonsense(str(wrong))
            self.abort(error)
            raise error from None

    def _return_credit(self, charge: int) -> None:
        self._window += charge
        self._owed += charge
        if self._owed >= _RETURN_AT and not self._ended_there and self._error is None:
            self._wire.transmit(self.number, frames.CREDIT, frames.COUNT.pack(self._owed))
            self._owed = 0

    async def _bounded(self, wait: Any, what: str) -> Any:
        if self.patience is None:
            return await wait
        try:
            async with asyncio.timeout(self.patience):
                return await wait
        except TimeoutError:
            error = errors.Unavailable(
                f"{self.op}: waited {self.patience:g} s for {what}", hint="see: limpet logs NAME --source agent"
            )
            self.abort(error)
            raise error from None

    # -- for the channel

    def arrived(self, kind: int, payload: bytes) -> None:
        """A frame of this stream. Whatever breaks the rules ends the stream."""
        if kind == frames.CREDIT:
            self._credited(frames.COUNT.unpack(payload)[0])
        elif kind == frames.RESET:
            self.fail(_told(payload))
        elif self._ended_there:
            self.abort(nonsense(f"{frames.NAMES[kind]} after END"))
        elif kind == frames.END:
            self._ended_there = True
            self._arrived.set()
            self._maybe_over()
        elif kind in (frames.DATA, frames.DATA_ERR, frames.MSG):
            self._window -= frames.charge(kind, payload)
            if self._window < 0:
                self.abort(nonsense("more bytes than the window allows"))
                return
            self._inbox.append((kind, payload))
            self._arrived.set()
        else:
            self.abort(nonsense(f"unexpected {frames.NAMES[kind]}"))

    def fail(self, error: errors.LimpetError) -> None:
        """The stream is over with an error."""
        if self._error is None:
            self._error = error
            self._arrived.set()
            self._more_credit.set()
            self._over()

    def _credited(self, count: int) -> None:
        self._credit += count
        if self._credit > frames.WINDOW:
            self.abort(nonsense("more credit than was spent"))
            return
        while self._slots and self._slots[0][0] <= count:
            charge, slot = self._slots.popleft()
            count -= charge
            self._free(slot)
        if count and self._slots:
            charge, slot = self._slots[0]
            self._slots[0] = (charge - count, slot)
        self._more_credit.set()

    def _free(self, slot: int | None) -> None:
        if slot is not None and self._wire.intake is not None:
            self._wire.intake.give_back(slot)

    def _maybe_over(self) -> None:
        if self._ended_here and self._ended_there:
            self._over()

    def _over(self) -> None:
        while self._slots:
            self._free(self._slots.popleft()[1])
        self._wire.forget(self)


def parse_object(payload: bytes) -> dict[str, Any]:
    """The JSON object in `payload`. Raises ValueError for anything else, however deep or strange."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        raise ValueError("a message that is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("a message that is not a JSON object")
    return value


def _told(payload: bytes) -> errors.LimpetError:
    try:
        body = parse_object(payload[: 16 << 10])
    except ValueError:
        return nonsense("a reset without a reason")
    for key, value in body.items():
        if isinstance(value, str):
            body[key] = value[:4096]
    return errors.from_dict(body)
