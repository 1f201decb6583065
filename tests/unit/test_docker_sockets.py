"""The Docker API of a sandbox as a client of it meets it. The guest is the real agent as an ordinary process; what
stands for dockerd answers every request with its path."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from limpet import errors, sockets
from limpet.models import State
from limpet.paths import SandboxPaths
from limpet.services import dockersockets
from limpet.services.dockersockets import DockerSockets
from limpet.services.live import LiveVM
from tests.unit.relay_kit import World, serving, world

HINT = "limpet create --image docker"


@pytest.fixture(scope="module")
def box() -> Iterator[World]:
    with world() as found:
        yield found


class Engine:
    """A Docker engine in the guest, that is started by being asked for; or not, and why."""

    def __init__(self, box: World) -> None:
        self.path = box.guest.root / "engine.sock"
        self.path.unlink(missing_ok=True)
        self.asked = 0
        self.failure: errors.LimpetError | None = None
        self._running = contextlib.ExitStack()

    async def ensure(self, _vm: LiveVM) -> None:
        self.asked += 1
        await asyncio.sleep(0.05)
        if self.failure is not None:
            raise self.failure
        if not self.path.exists():
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.path))
            listener.listen(64)
            self._running.enter_context(serving(listener, _answer))

    def stop(self) -> None:
        self._running.close()
        self.path.unlink(missing_ok=True)


def _answer(connection: socket.socket) -> None:
    asked = b""
    while data := connection.recv(4096):
        asked += data
        if asked.endswith(b"\r\n\r\n"):
            path = asked.split(b" ")[1]
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(path), path))
            asked = b""


@pytest.fixture
def engine(box: World) -> Iterator[Engine]:
    found = Engine(box)
    try:
        yield found
    finally:
        found.stop()


@contextlib.asynccontextmanager
async def opened(box: World, engine: Engine, vm: LiveVM) -> AsyncIterator[DockerSockets]:
    found = DockerSockets(box.host.records, engine.ensure, in_guest=str(engine.path))
    await found.open(vm)
    try:
        yield found
    finally:
        await found.close(vm.sandbox_id)


class _Client(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("docker", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self._path))


def ask(vm: LiveVM, path: str = "/_ping", method: str = "GET") -> tuple[int, bytes]:
    client = _Client(vm.files.docker_socket)
    with contextlib.closing(client):
        client.request(method, path)
        answer = client.getresponse()
        return answer.status, answer.read()


async def asked(vm: LiveVM, path: str = "/_ping", method: str = "GET") -> tuple[int, bytes]:
    return await asyncio.to_thread(ask, vm, path, method)


def answered(vm: LiveVM, request: bytes) -> bytes:
    """All that is answered to these bytes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(vm.files.docker_socket))
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(4096), b""))


def test_first_use_starts_the_engine_and_later_use_does_not(box: World, engine: Engine) -> None:
    """RUN-6"""

    async def work(vm: LiveVM) -> None:
        async with opened(box, engine, vm):
            assert await asked(vm, "/v1.41/info") == (200, b"/v1.41/info")
            assert await asked(vm) == (200, b"/_ping")
            assert engine.asked == 1

    box.run(work)


def test_twenty_first_clients_at_once_are_all_served(box: World, engine: Engine) -> None:
    """RUN-1, RUN-6"""

    async def work(vm: LiveVM) -> None:
        async with opened(box, engine, vm):
            answers = await asyncio.gather(*(asked(vm, f"/{number}") for number in range(20)))
            assert answers == [(200, f"/{number}".encode()) for number in range(20)]

    box.run(work)


def test_an_engine_that_does_not_start_is_told_in_the_words_of_the_docker_api(box: World, engine: Engine) -> None:
    """RUN-3, RUN-6: a client asks with HEAD first, whose answer has no body; for one command it asks only once here."""
    engine.failure = errors.FailedPrecondition("the image lacks dockerd, runc", hint=HINT)

    async def work(vm: LiveVM) -> None:
        async with opened(box, engine, vm):
            assert (await asyncio.to_thread(answered, vm, b"HEAD /_ping HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")
            assert await asked(vm, method="HEAD") == (503, b"")
            status, body = await asked(vm, "/v1.41/containers/json")
            assert status == 503
            assert json.loads(body) == {"message": f"limpet: the image lacks dockerd, runc ({HINT})"}
            assert engine.asked == 1

    box.run(work)


def test_a_start_that_failed_is_tried_again(box: World, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-1"""
    monkeypatch.setattr(dockersockets, "_STILL_TRUE", 0.0)
    engine.failure = errors.DeadlineExceeded("dockerd did not answer within 60 s")

    async def work(vm: LiveVM) -> None:
        async with opened(box, engine, vm):
            assert (await asked(vm))[0] == 503
            engine.failure = None
            assert (await asked(vm))[0] == 200

    box.run(work)


def test_an_upload_that_is_refused_is_told_why(box: World, engine: Engine) -> None:
    """RUN-6: the client gets its answer although it has not sent all."""
    engine.failure = errors.FailedPrecondition("no data disk")

    async def work(vm: LiveVM) -> None:
        upload = b"POST /build HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + bytes(3 << 20)
        async with opened(box, engine, vm):
            assert b'{"message": "limpet: no data disk"}' in await asyncio.to_thread(answered, vm, upload)

    box.run(work)


@pytest.mark.parametrize("said", [b"GET /_ping", b"\xff" * 2_000_000])
def test_a_client_that_speaks_no_http_is_let_go(
    box: World, engine: Engine, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-6"""
    monkeypatch.setattr(dockersockets, "_ASKED", 0.2)
    engine.failure = errors.FailedPrecondition("no data disk")

    def speak(vm: LiveVM) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(vm.files.docker_socket))
            with contextlib.suppress(ConnectionError):
                client.sendall(said)
                assert client.recv(1) == b""

    async def work(vm: LiveVM) -> None:
        async with opened(box, engine, vm):
            await asyncio.to_thread(speak, vm)

    box.run(work)


@pytest.mark.parametrize(("state", "remedy"), [(State.PAUSED, "resume"), (State.STOPPING, "start")])
def test_a_sandbox_that_is_paused_or_stopping_says_so_and_starts_no_engine(
    box: World, engine: Engine, state: State, remedy: str
) -> None:
    """RUN-5, RUN-6: a client that asks again and again must not bring back what a stop has just ended."""
    box.host.records.update(box.record.id, state=state)

    async def work(vm: LiveVM) -> None:
        async with opened(box, engine, vm):
            status, body = await asked(vm)
            assert status == 503
            assert json.loads(body)["message"] == f"limpet: box is {state.value} (limpet {remedy} box)"
            assert engine.asked == 0

    try:
        box.run(work)
    finally:
        box.host.records.update(box.record.id, state=State.RUNNING)


def test_a_guest_that_cannot_be_reached_is_told_in_bounded_time(
    box: World, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-6"""
    monkeypatch.setattr(dockersockets, "_REACH", 0.5)
    engine.failure = errors.Unavailable("the guest's agent did not answer within 15 s")

    async def work(vm: LiveVM) -> None:
        vm.files = replace(vm.files, root=vm.files.root / "nowhere")
        async with opened(box, engine, vm):
            began = time.monotonic()
            assert (await asked(vm))[0] == 503
            assert time.monotonic() - began < 3

    box.run(work)


def test_the_socket_is_the_owners_alone_and_replaces_a_stale_one(box: World, engine: Engine) -> None:
    """RUN-6, SEC-6: a daemon that was killed leaves its file."""

    async def work(vm: LiveVM) -> None:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(vm.files.docker_socket))
        async with opened(box, engine, vm):
            mode = vm.files.docker_socket.stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            assert (await asked(vm))[0] == 200
            assert not list(vm.files.sockets.glob(f".{os.getpid()}"))

    box.run(work)


def test_a_stranger_that_reaches_the_socket_is_not_served(
    box: World, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-6, SEC-6: whatever became of the file's mode."""
    monkeypatch.setattr(sockets, "peer", lambda _connection: os.getuid() + 1)

    async def work(vm: LiveVM) -> None:
        async with opened(box, engine, vm):
            with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
                await asked(vm)
            assert engine.asked == 0

    box.run(work)


def test_a_sandbox_that_stops_takes_socket_and_connections_with_it(box: World, engine: Engine) -> None:
    """RUN-6"""

    async def work(vm: LiveVM) -> None:
        async with opened(box, engine, vm) as found:
            reader, writer = await asyncio.open_unix_connection(vm.files.docker_socket)
            writer.write(b"GET /events HTTP/1.1\r\n\r\n")
            await reader.readuntil(b"/events")
            assert vm.idle_seconds == 0
            await found.close(vm.sandbox_id)
            assert await asyncio.wait_for(reader.read(-1), 2) == b""
            writer.transport.abort()
            assert not vm.files.docker_socket.exists()
            await asyncio.sleep(0.05)
            assert vm.idle_seconds > 0

    box.run(work)


def test_a_client_that_waits_for_a_start_does_not_hold_up_a_stop(box: World, engine: Engine) -> None:
    """RUN-6"""

    async def never(_vm: LiveVM) -> None:
        await asyncio.sleep(60)

    async def work(vm: LiveVM) -> None:
        found = DockerSockets(box.host.records, never, in_guest=str(engine.path))
        await found.open(vm)
        reader, writer = await asyncio.open_unix_connection(vm.files.docker_socket)
        await asyncio.sleep(0.2)
        async with asyncio.timeout(2):
            await found.close(vm.sandbox_id)
        assert await asyncio.wait_for(reader.read(-1), 2) == b""
        writer.transport.abort()

    box.run(work)


def test_a_sandbox_runs_although_its_socket_cannot_be_made(box: World, engine: Engine, tmp_path: Path) -> None:
    """RUN-6"""

    async def work(vm: LiveVM) -> None:
        vm.files = SandboxPaths(tmp_path, tmp_path / "absent")
        async with opened(box, engine, vm):
            assert not vm.files.docker_socket.exists()

    box.run(work)
