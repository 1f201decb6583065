"""What a call over its socket tells of a service: of one that answers, one that does not, one that talks nonsense."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limpet_agent import codec, engine, probing
from limpet_agent.faults import Fault

_PONG = b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nOK"
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
_SERVING = _SETTINGS + b"\0\0\3\1\4\0\0\0\1\x88\x88\x88" + b"\0\0\7\0\0\0\0\0\1\0\0\0\0\2\x08\1"
_NOT_SERVING = _SETTINGS + b"\0\0\7\0\0\0\0\0\1\0\0\0\0\2\x08\2"
_UNKNOWN = _SETTINGS + b"\0\0\3\1\5\0\0\0\1\x88\x88\x88"


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[[bytes | None], str]]:
    """Listeners that answer every call with the same bytes, or (None) take it and stay silent; their paths."""
    open_ones: list[socket.socket] = []

    def serve(listener: socket.socket, answer: bytes | None) -> None:
        while True:
            try:
                peer = listener.accept()[0]
            except OSError:
                return
            open_ones.append(peer)
            if answer is not None:
                peer.recv(4096)
                peer.sendall(answer)
                peer.shutdown(socket.SHUT_WR)

    def listen(answer: bytes | None) -> str:
        path = str(tmp_path / f"s{len(open_ones)}")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(5)
        open_ones.append(listener)
        threading.Thread(target=serve, args=(listener, answer), daemon=True).start()
        return path

    yield listen
    for each in open_ones:
        with_shutdown(each)


def with_shutdown(each: socket.socket) -> None:
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    each.close()


def seen(path: str, ask: Callable[[probing.Call], str | None] = probing.ping_docker) -> tuple[str, str | None]:
    health = probing.look(path, ask)
    return health.state, health.reason


# -- status: what a look sees


def test_a_service_that_answers_is_ready_and_known_by_its_pid(answering: Callable[[bytes | None], str]) -> None:
    """RUN-5"""
    health = probing.look(answering(_PONG), probing.ping_docker)
    assert (health.state, health.reason, health.pid) == ("ready", None, os.getpid())
    assert seen(answering(_SERVING), probing.check_grpc) == ("ready", None)


def test_a_service_without_a_socket_is_not_ready(tmp_path: Path) -> None:
    """RUN-5"""
    assert seen(str(tmp_path / "none")) == ("not_ready", None)
    assert seen(str(tmp_path / "no" / "directory")) == ("not_ready", None)


def test_a_socket_that_nobody_listens_on_is_told(tmp_path: Path) -> None:
    """RUN-5: what a killed service leaves."""
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "left"))
    left.close()
    assert seen(str(tmp_path / "left")) == ("not_ready", "socket exists but nobody listens")


@pytest.mark.parametrize("ask", [probing.ping_docker, probing.check_grpc])
@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1", b"\0\0", b"\0\0\7\0\0\0\0\0\1\0"])
def test_a_silent_service_is_an_error_within_the_limit(
    answering: Callable[[bytes | None], str], monkeypatch: pytest.MonkeyPatch, answer: bytes | None,
    ask: Callable[[probing.Call], str | None],
) -> None:  # fmt: skip
    """RUN-5: silent, hung up at once, or in the middle of its answer."""
    monkeypatch.setattr(probing, "PATIENCE", 0.2)
    path = answering(answer)
    began = time.monotonic()
    assert seen(path, ask) == ("error", "socket exists but does not answer")
    assert time.monotonic() - began < 1


def test_a_service_that_drips_is_cut_off(answering: Callable[[bytes | None], str], tmp_path: Path) -> None:
    """RUN-5: the limit is for the whole call, not for each byte of it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "drip"))
    listener.listen(1)

    def drip() -> None:
        peer = listener.accept()[0]
        try:
            while True:
                peer.sendall(b"H")
                time.sleep(0.05)
        except OSError:
            peer.close()

    threading.Thread(target=drip, daemon=True).start()
    began = time.monotonic()
    assert seen(str(tmp_path / "drip"))[0] == "error"
    assert time.monotonic() - began < probing.PATIENCE + 1
    listener.close()


def test_a_wrong_answer_is_an_error_that_says_so(answering: Callable[[bytes | None], str]) -> None:
    """RUN-5"""
    assert seen(answering(b"HTTP/1.1 500 No\r\n\r\nno")) == ("error", "answers a ping with HTTP 500")
    assert seen(answering(b"HTTP/1.1 200 OK\r\n\r\nwhat")) == ("error", "answers a ping with HTTP 200")
    assert seen(answering(_NOT_SERVING), probing.check_grpc) == ("error", "says that it is not serving")
    assert seen(answering(_UNKNOWN), probing.check_grpc) == ("error", "does not answer a health check")
    huge = b"\xff\xff\xff\0\0\0\0\0\1"
    assert seen(answering(huge), probing.check_grpc)[0] == "error"


def test_a_listener_whose_queue_is_full_is_an_error(tmp_path: Path) -> None:
    """RUN-5: a service that hangs, and many who wait for it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "full"))
    listener.listen(0)
    waiting = []
    for _ in range(8):
        peer = socket.socket(socket.AF_UNIX)
        peer.setblocking(False)
        try:
            peer.connect(str(tmp_path / "full"))
        except BlockingIOError:
            pass
        waiting.append(peer)
    assert seen(str(tmp_path / "full")) == ("error", "socket exists but does not answer")
    for each in [*waiting, listener]:
        each.close()


# -- what a ready one is asked


def test_containers_are_told_as_the_host_wants_them(answering: Callable[[bytes | None], str]) -> None:
    """RUN-6: running ones first; ports that lead nowhere are none; what is missing is no failure."""
    port = {"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"}
    found = [
        {"Id": "a" * 64, "Names": ["/old"], "Image": "x", "State": "exited"},
        {"Id": "b" * 64, "Names": ["/web"], "Image": "y", "State": "running",
         "Ports": [port, {"PrivatePort": 443, "Type": "tcp"}] + [port] * 1000},
    ]  # fmt: skip
    told = engine.containers(answering(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(found).encode()))
    assert [(each["name"], each["image"], each["state"]) for each in told] == [
        ("web", "y", "running"), ("old", "x", "exited"),
    ]  # fmt: skip
    assert told[0]["ports"][0] == {"ip": "0.0.0.0", "public": 8080, "private": 80, "protocol": "tcp"}
    assert {bound["private"] for bound in told[0]["ports"]} == {80} and told[1]["ports"] == []
    assert len(codec.dumps(told[0])) < 64 << 10


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 500 No\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n{", b"SSH-2.0\r\n\r\n"])
def test_an_engine_that_answers_nonsense_has_no_version_and_no_containers(
    answering: Callable[[bytes | None], str], answer: bytes
) -> None:  # fmt: skip
    """RUN-5"""
    path = answering(answer)
    assert engine.version(path) is None
    with pytest.raises(Fault):
        engine.containers(path)
