"""The guest's side of the channel: what a host is told when its streams are gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from limpet_agent import codec, frames
from limpet_agent.intake import Intake
from limpet_agent.streams import Mux, Stream


class Pipe:
    """A link without a device: what was written is kept."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.received: Callable[[bytes], None]
        self.writable: Callable[[], None]
        self.lost: Callable[[], None]

    def write(self, buffers: list[bytes | memoryview]) -> int:
        data = b"".join(buffers)
        self.written += data
        return len(data)


def _greetings(data: bytes) -> list[bytes]:
    """The nonces of the HELLOs in some bytes."""
    decoder = frames.Decoder()
    decoder.feed(data)
    found = []
    while (frame := decoder.next()) is not None:
        if frame[1] == frames.HELLO:
            found.append(frames.hello_nonce(frame[2]))
    return found


def test_a_host_whose_predecessor_is_only_now_seen_to_leave_hears_that_its_streams_are_gone() -> None:
    """GST-2: a virtio port tells of its host in messages of their own, which may come after the next one's bytes"""
    pipe = Pipe()
    opened: list[Stream] = []

    def open_stream(stream: Stream, _params: dict[str, Any]) -> None:
        opened.append(stream)

    mux = Mux(pipe, open_stream, lambda: Intake(None), lambda *_a, **_k: None)  # type: ignore[arg-type]
    nonce = b"n" * 16
    pipe.received(frames.hello(nonce))
    pipe.received(frames.encode(1, frames.OPEN, codec.dumps({"op": "ping"})))
    mux.flush()
    assert _greetings(bytes(pipe.written))[-1] == nonce
    pipe.written.clear()
    pipe.lost()
    mux.flush()
    assert not opened[0].open
    [greeting] = _greetings(bytes(pipe.written))
    assert greeting != nonce
