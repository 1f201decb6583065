"""A guest that lies, floods, stalls and breaks off: each ends in a typed error, the host survives in bounded memory."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from limpet import errors
from limpet.guest import Agent, Channel
from limpet.guest import mux as mux_module
from limpet.guest import streams as streams_module
from limpet.services import relay
from limpet_agent import frames

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _with_guest(script: Script, work: Callable[[Channel], Awaitable[None]], *, greet: bool = True) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if greet:
                writer.write(await reader.readexactly(frames.HEADER.size + 24))
            await script(reader, writer)
            await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        path = Path(directory) / "chan"
        server = await asyncio.start_unix_server(serve, path)
        async with asyncio.timeout(20):
            try:
                channel = await Channel.connect(path, timeout=1.5, attempt=0.4)
                try:
                    await work(channel)
                finally:
                    await channel.close()
            finally:
                server.close()
                await asyncio.sleep(0)


async def _request(reader: asyncio.StreamReader) -> int:
    """The stream of the next OPEN."""
    while True:
        length, stream, kind = frames.HEADER.unpack(await reader.readexactly(frames.HEADER.size))
        await reader.readexactly(length)
        if kind == frames.OPEN:
            return int(stream)


def _answering(*answers: tuple[int, bytes]) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = await _request(reader)
        for kind, payload in answers:
            writer.write(frames.encode(stream, kind, payload))

    return script


def _raw(data: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _request(reader)
        writer.write(data)

    return script


def _must_fail(script: Script, kind: type[errors.LimpetError] = errors.Unavailable, match: str = "nonsense") -> None:
    async def work(channel: Channel) -> None:
        with pytest.raises(kind, match=match):
            await Agent(channel).ping(timeout=0.5)

    asyncio.run(_with_guest(script, work))


@pytest.mark.parametrize(
    "hello", [b"", b"\0" * 5000, frames.hello(b"x" * 16), frames.hello()[:20], b"HTTP/1.1 200 OK\r\n"]
)
def test_a_guest_that_does_not_greet_is_given_up(hello: bytes) -> None:
    """GST-2"""

    async def script(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(hello)

    async def work(_channel: Channel) -> None:
        raise AssertionError("connected")

    with pytest.raises(errors.Unavailable, match="cannot be reached"):
        asyncio.run(_with_guest(script, work, greet=False))


@pytest.mark.parametrize(
    "data",
    [
        frames.HEADER.pack(0xFFFFFFFF, 1, frames.DATA),
        frames.HEADER.pack((1 << 20) + 1, 1, frames.DATA),
        frames.HEADER.pack((1 << 16) + 1, 1, frames.MSG),
        frames.HEADER.pack(0, 1, 0),
        frames.HEADER.pack(0, 1, 200),
        frames.HEADER.pack(3, 1, frames.CREDIT) + b"abc",
        b"\xff" * 5000,
    ],
)
def test_bytes_that_are_no_frames_close_the_channel(data: bytes) -> None:
    """GST-2"""
    _must_fail(_raw(data))


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"[" * 60_000, b"{}", b'{"version": 1}',
        b'{"version": "x", "protocol": "a"}',
        json.dumps({"version": "v" * 9000, "protocol": 1, "boot_id": "", "time_ns": 1, "agent_pid": 1,
                    "agent_starts": 1, "uptime": 1, "data": ""}).encode(),
    ],
)  # fmt: skip
def test_an_answer_of_the_wrong_shape_is_a_typed_error(payload: bytes) -> None:
    """GST-2"""
    _must_fail(_answering((frames.MSG, payload)))


@pytest.mark.parametrize(
    "answers",
    [
        [(frames.DATA, b"x")],
        [(frames.END, b"")],
        [(frames.REF, bytes(16))],
        [(frames.OPEN, b"{}")],
        [(frames.CREDIT, b"\xff\xff\xff\xff")],
    ],
)
def test_a_frame_out_of_place_ends_the_stream(answers: list[tuple[int, bytes]]) -> None:
    """GST-2"""
    _must_fail(_answering(*answers))


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b'{"code": "not_found", "message": "no"}', errors.NotFound),
        (b'{"code": "made_up", "message": "no"}', errors.Internal),
        (b'{"code": 5, "message": []}', errors.Internal),
        (b"garbage", errors.Unavailable),
    ],
)
def test_a_reset_becomes_an_error_whatever_is_in_it(payload: bytes, kind: type[errors.LimpetError]) -> None:
    """GST-2"""
    _must_fail(_answering((frames.RESET, payload)), kind, match="no|unknown|reason")


def test_the_text_of_an_error_is_bounded() -> None:
    """GST-2"""
    body = json.dumps({"code": "not_found", "message": "m" * 15_000}).encode()

    async def work(channel: Channel) -> None:
        with pytest.raises(errors.NotFound) as caught:
            await Agent(channel).ping(timeout=0.5)
        assert len(caught.value.message) <= 4096

    asyncio.run(_with_guest(_answering((frames.RESET, body)), work))


def test_a_guest_that_never_answers_does_not_hang_the_caller() -> None:
    """GST-2"""
    _must_fail(_raw(b""), match="for an answer")


def test_a_guest_that_hangs_up_fails_every_request() -> None:
    """GST-2"""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _request(reader)
        writer.write(frames.header(1, frames.MSG, 500) + b"half")
        writer.close()

    _must_fail(script, match="was lost")


def test_a_mute_guest_is_noticed_also_when_silence_is_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    """GST-2"""
    monkeypatch.setattr(mux_module, "_SILENCE", 0.1)
    monkeypatch.setattr(mux_module, "_LAST_CHANCE", 0.2)

    async def work(channel: Channel) -> None:
        with pytest.raises(errors.Unavailable, match="does not answer"):
            await Agent(channel).wait("ex_1")

    asyncio.run(_with_guest(_raw(b""), work))


def test_more_bytes_than_the_window_end_the_stream_in_bounded_memory() -> None:
    """GST-2"""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = await _request(reader)
        frame = frames.encode(stream, frames.DATA, bytes(1 << 20))
        for _ in range(64):
            writer.write(frame)
            await writer.drain()

    async def work(channel: Channel) -> None:
        stream = await channel.open("fs.read", path="/x")
        await asyncio.sleep(0.5)  # nobody takes what comes
        with pytest.raises(errors.Unavailable, match="more bytes than the window"):
            while await stream.receive() is not None:
                pass

    asyncio.run(_with_guest(script, work))


def test_a_storm_of_tiny_frames_leaves_the_host_responsive_and_small() -> None:
    """GST-2"""
    flood = frames.encode(2, frames.RESET, b"{}") * 2000

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _request(reader)
        for _ in range(100):
            writer.write(flood)
            await writer.drain()

    async def work(channel: Channel) -> None:
        tracemalloc.start()
        with pytest.raises(errors.Unavailable, match="belong to no stream"):
            await Agent(channel).ping(timeout=10)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 << 20

    asyncio.run(_with_guest(script, work))


def test_a_frame_that_trickles_in_is_waited_for_only_so_long() -> None:
    """GST-2"""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = await _request(reader)
        writer.write(frames.header(stream, frames.MSG, 5000))
        for _ in range(100):
            writer.write(b" ")
            await asyncio.sleep(0.02)

    _must_fail(script, match="for an answer")


def test_an_uninvited_greeting_means_that_the_agent_is_a_new_one() -> None:
    """GST-9"""
    _must_fail(_raw(frames.hello()), match="restarted")


def test_credit_for_nothing_ends_the_stream() -> None:
    """GST-2"""

    async def work(channel: Channel) -> None:
        stream = await channel.open("fs.write", path="/x")
        with pytest.raises(errors.Unavailable, match="more credit"):
            for _ in range(100):
                await stream.send(b"x")
                await asyncio.sleep(0.01)

    asyncio.run(_with_guest(_answering((frames.CREDIT, frames.COUNT.pack(1 << 20))), work))


def test_a_guest_that_takes_nothing_holds_a_sender_only_so_long() -> None:
    """GST-2"""

    async def work(channel: Channel) -> None:
        stream = await channel.open("fs.write", path="/x")
        stream.patience = 0.3
        with pytest.raises(errors.Unavailable, match="for the guest to take bytes"):
            await stream.send(bytes(16 << 20))

    asyncio.run(_with_guest(_raw(b""), work))


@pytest.mark.parametrize(
    "events",
    [
        [{"started": {"id": 5, "pid": 1}}],
        [{"started": {"id": "ex_1", "pid": -1}}],
        [{"nothing": 1}],
        [{"started": {"id": "ex_1", "pid": 1}}, {"exit": {"id": "ex_1"}}],
        [{"started": {"id": "ex_1", "pid": 1}}, {"gap": {"lane": 5}}],
        [{"started": {"id": "ex_1", "pid": 1}}, None],
    ],
)
def test_a_command_whose_story_makes_no_sense_is_a_typed_error(events: list[dict[str, Any] | None]) -> None:
    """GST-2"""
    answers = [(frames.END, b"") if event is None else (frames.MSG, json.dumps(event).encode()) for event in events]

    async def work(channel: Channel) -> None:
        with pytest.raises(errors.Unavailable, match="nonsense"):
            async for _event in (await Agent(channel).exec(["true"])).events():
                pass

    asyncio.run(_with_guest(_answering(*answers), work))


@pytest.mark.parametrize(
    "answers",
    [
        [(frames.DATA, b"HTTP/1.1 200 OK\r\n\r\n")],
        [(frames.END, b"")],
        [(frames.MSG, b'{"connected": 1}')],
        [(frames.MSG, b'{"connected": false}')],
        [(frames.MSG, b"[]")],
        [(frames.RESET, b"garbage")],
        [],
    ],
)
def test_a_connection_into_the_guest_that_is_none_is_a_typed_error(
    answers: list[tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GST-2, RUN-6"""
    monkeypatch.setattr(streams_module, "PATIENCE", 0.3)

    async def work(channel: Channel) -> None:
        with pytest.raises(errors.Unavailable):
            await Agent(channel).connect_unix("/run/docker.sock")

    asyncio.run(_with_guest(_answering(*answers), work))


@pytest.mark.parametrize(
    "kinds", [[frames.DATA] * 64, [frames.MSG], [frames.CREDIT], [frames.REF], [frames.END, frames.DATA]]
)
def test_a_connection_whose_guest_breaks_the_rules_ends_in_bounded_memory(kinds: list[int]) -> None:
    """GST-2, RUN-6: the client reads nothing meanwhile; it gets what was right, and then the end."""
    payloads = {frames.DATA: bytes(1 << 20), frames.MSG: b"{}", frames.REF: bytes(16),
                frames.CREDIT: b"\xff\xff\xff\xff", frames.END: b""}  # fmt: skip

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = await _request(reader)
        writer.write(frames.encode(stream, frames.MSG, b'{"connected": true}'))
        for _ in range(4):
            for kind in kinds:
                writer.write(frames.encode(stream, kind, payloads[kind]))
                await writer.drain()

    async def work(channel: Channel) -> None:
        stream = await Agent(channel).connect_unix("/run/docker.sock")
        mine, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=mine)
            tracemalloc.start()
            carrying = asyncio.create_task(relay.carry(reader, writer, stream))
            await asyncio.sleep(0.3)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 12 << 20
            rest = asyncio.create_task(asyncio.to_thread(lambda: [*iter(lambda: theirs.recv(1 << 20), b"")]))
            with pytest.raises(errors.Unavailable, match="nonsense"):
                await carrying
            writer.transport.abort()
            await rest

    asyncio.run(_with_guest(script, work))
