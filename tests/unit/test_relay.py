"""Connections that go on in a guest: every byte, both half-closes, and every way in which one may break off. The guest
is the real agent as an ordinary process."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import select
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from limpet import errors, sockets
from limpet.guest import Agent
from limpet.models import PortMapping
from limpet.services import relay
from limpet.services.live import LiveVM
from limpet.services.relay import Listener
from tests.unit.relay_kit import Reply, World, closing, read_all, serving, world

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Dial = Callable[[LiveVM], AbstractAsyncContextManager[Connection]]


@pytest.fixture(scope="module")
def box() -> Iterator[World]:
    with world() as found:
        yield found


@contextlib.contextmanager
def tcp(box: World, reply: Reply) -> Iterator[Dial]:
    """A published port."""
    listener = socket.create_server(("127.0.0.1", 0))
    guest = listener.getsockname()[1]

    @asynccontextmanager
    async def dial(vm: LiveVM) -> AsyncIterator[Connection]:
        published = box.host.ports.of(vm.sandbox_id)
        given = published[0] if published else await box.host.ports.publish(vm, PortMapping(host=0, guest=guest))
        async with closing(asyncio.open_connection("127.0.0.1", given.host)) as connection:
            yield connection

    with serving(listener, reply):
        yield dial


@contextlib.contextmanager
def unix(box: World, reply: Reply) -> Iterator[Dial]:
    """A Unix socket in the guest behind one on the host."""
    inside, outside = box.guest.root / "inside", box.guest.root / "outside"
    inside.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(inside))
    listener.listen(64)
    listening: Listener | None = None

    @asynccontextmanager
    async def dial(vm: LiveVM) -> AsyncIterator[Connection]:
        nonlocal listening

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await relay.carry(reader, writer, await (await vm.agent()).connect_unix(str(inside)))

        if listening is None:
            listening = await Listener.start(sockets.listen(outside), serve)
            box.at_end(listening.close)
        async with closing(asyncio.open_unix_connection(outside)) as connection:
            yield connection

    with serving(listener, reply):
        yield dial


both = pytest.mark.parametrize("kind", [tcp, unix])
Kind = Callable[[World, Reply], AbstractAsyncContextManager[Dial]]


@both
def test_every_byte_arrives_both_ways_and_each_side_may_end_first(box: World, kind: Kind) -> None:
    """RUN-6, GST-10"""
    upload, answer = os.urandom(20_000_003), os.urandom(5_000_001)

    def reply(connection: socket.socket) -> None:
        connection.sendall(hashlib.sha256(read_all(connection)).digest() + answer)

    async def work(vm: LiveVM) -> None:
        async with dial(vm) as (reader, writer):
            writer.write(upload)
            writer.write_eof()
            assert await reader.readexactly(32) == hashlib.sha256(upload).digest()
            assert await reader.read(-1) == answer

    with kind(box, reply) as dial:  # type: ignore[attr-defined]
        box.run(work)


@both
def test_a_conversation_is_not_held_back(box: World, kind: Kind) -> None:
    """RUN-6: what a terminal sends byte by byte comes back byte by byte."""

    def reply(connection: socket.socket) -> None:
        while data := connection.recv(100):
            connection.sendall(data)

    async def work(vm: LiveVM) -> None:
        async with dial(vm) as (reader, writer):
            for number in range(200):
                writer.write(b"%3d" % number)
                assert await reader.readexactly(3) == b"%3d" % number

    with kind(box, reply) as dial:  # type: ignore[attr-defined]
        box.run(work)


@both
def test_twenty_clients_at_once_each_get_their_own_bytes(box: World, kind: Kind) -> None:
    """RUN-6"""

    def reply(connection: socket.socket) -> None:
        connection.sendall(hashlib.sha256(read_all(connection)).hexdigest().encode())

    async def work(vm: LiveVM) -> None:
        async def one() -> None:
            async with dial(vm) as (reader, writer):
                data = os.urandom(500_000)
                writer.write(data)
                writer.write_eof()
                assert (await reader.read(-1)).decode() == hashlib.sha256(data).hexdigest()

        async with dial(vm):  # the listener is there
            await asyncio.gather(*(one() for _ in range(20)))

    with kind(box, reply) as dial:  # type: ignore[attr-defined]
        box.run(work)


@both
def test_connections_that_have_fallen_silent_keep_nothing_from_others(box: World, kind: Kind) -> None:
    """RUN-6: the intake disk here has 16 slots, and each of the silent ones has used one, half of them to the end."""
    done = threading.Event()

    def reply(connection: socket.socket) -> None:
        left = 100_000  # (a socket with a timeout knows no MSG_WAITALL)
        while left and (data := connection.recv(min(left, 1000))):
            left -= len(data)
        connection.sendall(b".")
        if len(read_all(connection)) == 3_000_000:
            connection.sendall(b"all")
            done.set()
        done.wait(20)

    async def work(vm: LiveVM) -> None:
        async with contextlib.AsyncExitStack() as silent, asyncio.timeout(8):
            for number in range(20):
                reader, writer = await silent.enter_async_context(dial(vm))
                writer.write(bytes(100_000))
                if number % 2:
                    writer.write_eof()
                assert await reader.readexactly(1) == b"."
            async with dial(vm) as (reader, writer):
                writer.write(bytes(3_100_000))
                writer.write_eof()
                assert await reader.read(-1) == b".all"

    with kind(box, reply) as dial:  # type: ignore[attr-defined]
        box.run(work)


def test_what_a_server_does_not_take_keeps_nothing_from_others(box: World) -> None:
    """RUN-6: it listens no more and goes on talking; what is on its way to it then goes nowhere, slots come back."""
    done = threading.Event()

    def reply(connection: socket.socket) -> None:
        if connection.recv(1) == b"-":
            connection.shutdown(socket.SHUT_RD)
            connection.sendall(b".")
            done.wait(20)
        elif len(read_all(connection)) == 3_000_000:
            connection.sendall(b"all")

    async def work(vm: LiveVM) -> None:
        async with contextlib.AsyncExitStack() as unheard, asyncio.timeout(8):
            writers = []
            for _ in range(20):
                reader, writer = await unheard.enter_async_context(dial(vm))
                writer.write(b"-")
                assert await reader.readexactly(1) == b"."
                writers.append(writer)
            for _ in range(2):  # the first finds out, the second meets one that knows
                for writer in writers:
                    writer.write(bytes(100_000))
                await asyncio.sleep(0.2)
            async with dial(vm) as (reader, writer):
                writer.write(b"?" + bytes(3_000_000))
                writer.write_eof()
                assert await reader.read(-1) == b"all"

    try:
        with unix(box, reply) as dial:
            box.run(work)
    finally:
        done.set()


@both
def test_a_client_that_reads_slowly_holds_the_guest_back_and_nobody_else(box: World, kind: Kind) -> None:
    """RUN-6: what is under way to it is bounded, and the host's memory with it."""
    sent = [0]

    def reply(connection: socket.socket) -> None:
        if connection.recv(1) == b"?":
            connection.sendall(b"!")
            return
        while True:
            sent[0] += connection.send(bytes(1 << 16))

    async def work(vm: LiveVM) -> None:
        async with dial(vm) as (_, writer):
            tracemalloc.start()
            writer.write(b"x")
            before = -1
            while sent[0] != before:
                before = sent[0]
                await asyncio.sleep(0.5)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert 4 << 20 < sent[0] < 24 << 20
            assert peak < 12 << 20
            async with dial(vm) as (other, asking):
                asking.write(b"?")
                assert await asyncio.wait_for(other.read(-1), 2) == b"!"

    with kind(box, reply) as dial:  # type: ignore[attr-defined]
        box.run(work)


@pytest.mark.parametrize(("kind", "size"), [(tcp, 100), (unix, 5_200_000)])
def test_a_server_that_takes_no_more_has_its_last_words_heard(box: World, kind: Kind, size: int) -> None:
    """RUN-6: an engine that refuses an upload says so and closes, while the client still sends and does not yet read.
    Of a Unix socket, which loses nothing when it is closed, that is more than fits into the stream's window."""
    words = os.urandom(size)
    closed = threading.Event()

    def reply(connection: socket.socket) -> None:
        connection.recv(100_000)
        connection.sendall(words)
        time.sleep(0.2)
        connection.close()
        closed.set()

    async def work(vm: LiveVM) -> None:
        async with dial(vm) as (reader, writer):
            writer.write(bytes(30 << 20))
            assert await asyncio.to_thread(closed.wait, 10)
            assert await asyncio.wait_for(reader.readexactly(len(words)), 10) == words
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(-1), 10) == b""

    with kind(box, reply) as dial:  # type: ignore[attr-defined]
        box.run(work)


@both
def test_a_client_that_only_sends_no_more_is_waited_for(
    box: World, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-6: `docker run < file` ends its input long before the output comes."""
    monkeypatch.setattr(relay, "_LINGER", 0.1)

    def reply(connection: socket.socket) -> None:
        assert read_all(connection) == b"question"
        time.sleep(1)
        connection.sendall(b"answer")

    async def work(vm: LiveVM) -> None:
        async with dial(vm) as (reader, writer):
            writer.write(b"question")
            writer.write_eof()
            assert await reader.read(-1) == b"answer"

    with kind(box, reply) as dial:  # type: ignore[attr-defined]
        box.run(work)


def test_a_client_that_is_gone_altogether_ends_what_the_guest_does_for_it(
    box: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-6: a hijacked connection whose server takes the end of its input for just that."""
    monkeypatch.setattr(relay, "_LINGER", 0.1)
    ended = threading.Event()

    def reply(connection: socket.socket) -> None:
        assert read_all(connection) == b"last words"
        watch = select.poll()
        watch.register(connection, 0)
        if watch.poll(10_000):
            ended.set()

    async def work(vm: LiveVM) -> None:
        async with dial(vm) as (_, writer):
            writer.write(b"last words")
            await writer.drain()
        assert await asyncio.to_thread(ended.wait, 5)

    with unix(box, reply) as dial:
        box.run(work)


def test_a_client_that_resets_its_connection_at_once_leaves_nothing_behind(
    box: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-6: as whoever only looks whether a port is open does; the server behind it waits for a request."""
    ended = threading.Event()

    def reply(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            read_all(connection)
        ended.set()

    agent = LiveVM.agent

    async def late(vm: LiveVM, timeout: float = 10.0) -> Agent:
        await asyncio.sleep(0.3)  # the client is gone before its bytes can be carried
        return await agent(vm, timeout)

    monkeypatch.setattr(LiveVM, "agent", late)

    async def work(vm: LiveVM) -> None:
        async with dial(vm) as (_, writer):
            linger = struct.pack("ii", 1, 0)  # socket(7): a close is a reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        assert await asyncio.to_thread(ended.wait, 5)
        await asyncio.sleep(0.1)
        assert not vm._busy

    with tcp(box, reply) as dial:
        box.run(work)


def test_a_client_cut_off_in_an_answer_is_an_end_for_the_guest_too(box: World) -> None:
    """RUN-6: at once, for nothing can be told to it any more."""
    ended = threading.Event()

    def reply(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                connection.send(bytes(1 << 16))
        ended.set()

    async def work(vm: LiveVM) -> None:
        async with dial(vm) as (reader, _):
            await reader.readexactly(1 << 20)
        assert await asyncio.to_thread(ended.wait, 5)

    with unix(box, reply) as dial:
        box.run(work)


@both
def test_a_client_cut_off_in_an_upload_is_an_end_for_the_guest_too(
    box: World, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-6"""
    monkeypatch.setattr(relay, "_LINGER", 0.1)
    ended = threading.Event()

    def reply(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            read_all(connection)
        ended.set()

    async def work(vm: LiveVM) -> None:
        async with dial(vm) as (_, writer):
            writer.write(bytes(3 << 20))
            await asyncio.sleep(0.3)
        assert await asyncio.to_thread(ended.wait, 5)

    with kind(box, reply) as dial:  # type: ignore[attr-defined]
        box.run(work)


def test_closing_a_listener_is_quick_although_a_client_reads_nothing(box: World) -> None:
    """RUN-6: a stop does not wait for somebody's terminal."""

    def reply(connection: socket.socket) -> None:
        while True:
            connection.send(bytes(1 << 16))

    async def work(vm: LiveVM) -> None:
        async with dial(vm) as (reader, _):
            await asyncio.sleep(0.5)
            async with asyncio.timeout(2):
                await box.host.ports.withdraw(vm.sandbox_id)
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(-1), 5)

    with tcp(box, reply) as dial:
        box.run(work)


def test_a_host_port_that_is_taken_is_named(box: World) -> None:
    """CLI-5"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.AlreadyExists, match=f"port {port} of this host is in use"):
            box.run(lambda vm: box.host.ports.publish(vm, PortMapping(host=port, guest=80)))


@pytest.mark.parametrize("path", [None, 5, "", "docker.sock", "/a\0b", "/" + "x" * 107])
def test_a_path_that_cannot_be_one_is_refused(box: World, path: object) -> None:
    """RUN-6"""
    with pytest.raises(errors.BadRequest, match="absolute path"):
        box.guest.do(lambda agent: agent.connect_unix(path))  # type: ignore[arg-type]


@pytest.mark.parametrize("leftover", [False, True])
def test_a_socket_that_nobody_serves_is_unavailable(box: World, leftover: bool) -> None:
    """RUN-6: absent, or left behind by a server that died."""
    path = box.guest.root / "stale"
    path.unlink(missing_ok=True)
    if leftover:
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(path))
    with pytest.raises(errors.Unavailable, match="connection refused" if leftover else "nobody listens"):
        box.guest.do(lambda agent: agent.connect_unix(str(path)))


def test_a_server_that_is_slow_to_accept_is_waited_for(box: World) -> None:
    """RUN-6: a full backlog of a Unix socket refuses with EAGAIN; 20 clients of an engine that is busy meet it."""
    path = box.guest.root / "busy"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(path))
        listener.listen(0)
        _fill_backlog(path, waiting)
        accepter = threading.Timer(0.5, lambda: [listener.accept() for _ in range(2)])
        accepter.start()
        try:
            box.guest.do(lambda agent: agent.connect_unix(str(path)))
        finally:
            accepter.join()


def _fill_backlog(path: Path, waiting: contextlib.ExitStack) -> None:
    while True:
        client = waiting.enter_context(socket.socket(socket.AF_UNIX))
        client.setblocking(False)
        try:
            client.connect(str(path))
        except BlockingIOError:
            return
