"""Who uses the Docker API before dockerd is there waits, and is served; nobody waits for what will not come."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from limpet_agent import prerequisites, probing
from limpet_agent.config import Config
from limpet_agent.doorstep import Doorstep
from limpet_agent.ensuring import Attempt
from limpet_agent.faults import Fault
from limpet_agent.loop import Loop
from limpet_agent.runtime import Runtime
from limpet_agent.services import Service

# What dockerd does with `--host=fd://`, for one ping after the other
SERVER = """
import contextlib, os, socket
assert os.environ["LISTEN_FDS"] == "1" and int(os.environ["LISTEN_PID"]) == os.getpid()
listener = socket.socket(fileno=3)
while True:
    client, _ = listener.accept()
    with client, contextlib.suppress(OSError):
        if client.recv(1000):
            client.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\nOK")
"""


def _service(root: Path, doorstep: Doorstep, program: str) -> Service:
    return Service(
        "dockerd", doorstep.path, probing.ping_docker, lambda: [sys.executable, "-c", program],
        str(root / "run"), str(root / "state"), 10.0, doorstep,
    )  # fmt: skip


def _client(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(path)
    return client


def test_a_client_that_came_too_early_is_served_by_the_service(tmp_path: Path) -> None:
    """RUN-1, RUN-6"""
    doorstep = Doorstep(str(tmp_path / "docker.sock"))
    service = _service(tmp_path, doorstep, SERVER)
    doorstep.open()
    early = _client(doorstep.path)
    early.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
    assert service.health().reason == "is about to be started"
    assert service.start(Attempt())
    doorstep.close(served=True)
    assert early.recv(1000).endswith(b"OK")
    assert service.health().state == "ready"
    pid = service.noted()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while service.noted():
        pass
    with pytest.raises(ConnectionRefusedError):  # dockerd alone had it
        _client(doorstep.path)


def _runtime(root: Path, service: Service, doorstep: Doorstep) -> Runtime:
    config = Config(str(root / "chan"), str(root), str(root), None)
    loop = Loop(lambda error: (_ for _ in ()).throw(error))
    runtime = Runtime(loop, config, lambda _event, **_details: None, doorstep)
    runtime.services = [service]
    return runtime


def test_a_service_that_was_given_up_too_early_can_be_reached_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-1: the socket that it listens on keeps its name, so that a retry finds it."""
    monkeypatch.setattr(prerequisites, "prepare", lambda _config: None)
    doorstep = Doorstep(str(tmp_path / "docker.sock"))
    service = _service(tmp_path, doorstep, "import time; time.sleep(4)" + SERVER)
    service.patience = 0.2
    runtime = _runtime(tmp_path, service, doorstep)
    try:
        with pytest.raises(Fault, match="does not answer"):
            runtime._ensuring.ensure()
        service.patience = 10
        assert runtime._ensuring.ensure().how in ("started", "reused")
        assert service.health().state == "ready"
    finally:
        service.stop(1)


def test_going_on_does_not_take_the_socket_from_a_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-1: a daemon that begins anew in the midst of one tells all its guests to go on."""
    preparing, prepared = threading.Event(), threading.Event()
    doorstep = Doorstep(str(tmp_path / "docker.sock"))
    service = _service(tmp_path, doorstep, SERVER)
    runtime = _runtime(tmp_path, service, doorstep)

    def prepare(_config: Config) -> None:
        doorstep.open()
        preparing.set()
        prepared.wait(10)

    monkeypatch.setattr(prerequisites, "prepare", prepare)
    runtime._ensuring.begin()
    assert preparing.wait(10)
    runtime.come_back()
    assert doorstep.fd >= 0
    prepared.set()
    try:
        assert runtime._ensuring.ensure().how in ("started", "reused")
    finally:
        service.stop(1)


def test_who_waited_for_a_start_that_failed_is_turned_away(tmp_path: Path) -> None:
    """RUN-1"""
    doorstep = Doorstep(str(tmp_path / "docker.sock"))
    doorstep.open()
    early = _client(doorstep.path)
    doorstep.close(served=False)
    with pytest.raises(ConnectionResetError):
        early.recv(1)
    assert not os.path.exists(doorstep.path)


def test_a_socket_that_nobody_serves_is_replaced_and_one_that_is_served_stays(tmp_path: Path) -> None:
    """RUN-5"""
    path = str(tmp_path / "docker.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.listen()
    doorstep = Doorstep(path)
    doorstep.open()
    assert doorstep.fd == -1
    stale.close()
    doorstep.open()
    assert doorstep.fd >= 0
    _client(path).close()
    assert oct(os.stat(path).st_mode & 0o777) == "0o660"
    doorstep.close(served=False)


def test_a_service_that_lost_the_name_of_its_socket_is_started_anew(tmp_path: Path) -> None:
    """RUN-1: it runs and nobody can reach it"""
    doorstep = Doorstep(str(tmp_path / "docker.sock"))
    service = _service(tmp_path, doorstep, SERVER)
    doorstep.open()
    assert service.start(Attempt())
    doorstep.close(served=True)
    before = service.noted()
    os.unlink(doorstep.path)
    doorstep.open()
    assert service.start(Attempt())
    doorstep.close(served=True)
    after = service.noted()
    assert after and after != before
    assert service.health().state == "ready"
    os.kill(after, signal.SIGKILL)
