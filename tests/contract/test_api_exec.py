"""Commands over web sockets: messages, back-pressure both ways, errors (GST-1, GST-5, GST-6)."""

from __future__ import annotations

import contextlib
import json
import socket as socket_module
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, unix_connect

from tests.contract.local_server import HEADERS, Running, running
from tests.contract.local_services import CHUNK, PlayedSession


@contextlib.contextmanager
def connect(server: Running, path: str, headers: dict[str, str] | None = None) -> Iterator[ClientConnection]:
    uri = f"ws://limpet/v1/sandboxes/{path}"
    sent = HEADERS if headers is None else headers
    with unix_connect(
        str(server.socket), uri, additional_headers=sent, compression=None, max_size=None, close_timeout=1
    ) as socket:
        yield socket


@contextlib.contextmanager
def run(server: Running, *argv: str, name: str = "web") -> Iterator[ClientConnection]:
    with connect(server, f"{name}/exec") as socket:
        socket.send(json.dumps({"argv": argv}))
        yield socket


def receive(socket: ClientConnection) -> Any:
    message = socket.recv(timeout=10)
    return json.loads(message) if isinstance(message, str) else message


def everything(socket: ClientConnection) -> list[Any]:
    found = []
    while True:
        try:
            found.append(receive(socket))
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            return [*found, closed.rcvd.code]


def wait_until_detached(session: PlayedSession) -> None:
    deadline = time.monotonic() + 10
    while not session.detached.is_set():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def until_stable(counter: list[int]) -> int:
    """The value of a counter that does not move any more."""
    seen = -1
    while seen != counter[0]:
        seen = counter[0]
        time.sleep(0.2)
    return seen


def test_command_tells_start_output_by_lane_and_exit(server: Running) -> None:
    """GST-5"""
    with run(server, "split") as socket:
        started, out, err, *bulk, ended, code = everything(socket)
    assert started == {"started": {"id": "ex_1", "pid": 42}}
    assert (out, err) == (b"\x01out", b"\x02err")
    assert [len(part) - 1 for part in bulk] == [CHUNK, CHUNK, 600_000 - 2 * CHUNK]
    assert {part[0] for part in bulk} == {1}
    assert (ended["exit"]["exit_code"], code) == (7, 1000)
    wait_until_detached(server.execs.sessions[-1])


def test_dropped_output_is_told(server: Running) -> None:
    """GST-6"""
    with run(server, "lost") as socket:
        _, gap, *_ = everything(socket)
    assert gap == {"gap": {"lane": "stderr", "from": 10, "to": 30}}


def test_input_resize_and_signals_arrive_in_order_and_eof_ends(server: Running) -> None:
    """GST-5"""
    with run(server, "cat") as socket:
        receive(socket)
        socket.send(b"hello")
        socket.send(json.dumps({"resize": [30, 100]}))
        socket.send(json.dumps({"signal": "INT"}))
        assert [receive(socket) for _ in range(3)] == [b"\x01hello", b"\x0130x100", b"\x01INT"]
        socket.send(json.dumps({"eof": True}))
        assert receive(socket)["exit"]["exit_code"] == 7


def test_client_that_does_not_read_holds_the_command_back(server: Running) -> None:
    """GST-1"""
    server.execs.pulled[0] = 0
    with run(server, "flood") as socket:
        receive(socket)
        stalled = until_stable(server.execs.pulled)
        assert stalled < 40 * CHUNK  # the client's and the kernel's buffers, and one message on its way
        for _ in range(200):
            assert len(receive(socket)) == CHUNK + 1
        assert server.execs.pulled[0] > stalled
    wait_until_detached(server.execs.sessions[-1])


def test_command_that_does_not_read_holds_the_client_back_until_it_goes(server: Running) -> None:
    """GST-1, GST-6: what waits for the command's input is bounded, and a client that goes meanwhile is noticed."""
    sent = [0]

    def feed(socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                socket.send(bytes(CHUNK))
                sent[0] += CHUNK

    with run(server, "sleep") as socket:
        receive(socket)
        feeding = threading.Thread(target=feed, args=(socket,))
        feeding.start()
        assert until_stable(sent) < 16 << 20
        socket.socket.shutdown(socket_module.SHUT_RDWR)
        feeding.join(10)
    wait_until_detached(server.execs.sessions[-1])


def test_client_that_goes_detaches_and_never_ends_the_command(server: Running) -> None:
    """GST-6"""
    with run(server, "sleep") as socket:
        receive(socket)
    session = server.execs.sessions[-1]
    wait_until_detached(session)
    assert session.heard == []


def test_attach_passes_offsets_and_leaves_out_a_lane(server: Running) -> None:
    """GST-6"""
    with connect(server, "web/execs/ex_9/attach?stdout=5&stdin=1&steal=1") as socket:
        everything(socket)
    assert server.execs.attached[-1] == ("web", "ex_9", 5, None, True, True)


@pytest.mark.parametrize(
    ("path", "first", "code", "message"),
    [
        ("wev/exec", '{"argv": ["true"]}', "not_found", "no sandbox named 'wev'"),
        ("web/exec", '{"argv": []}', "bad_request", "argv"),
        ("web/exec", '{"argv": ["x"], "usr": "root"}', "bad_request", "unknown key 'usr'"),
        ("web/exec", "rubbish", "bad_request", "not JSON"),
        ("web/exec", b"binary", "bad_request", "must be an ExecRequest as text"),
        ("web/exec?strat=1", None, "bad_request", "unknown key 'strat'"),
        ("web/execs/x/attach?stdout=-1", None, "bad_request", "stdout should be"),
        ("web/exec", '{"argv": ["bug"]}', "internal", "ZeroDivisionError: a bug"),
    ],
)
def test_error_is_told_in_a_message_with_the_operation_id(
    server: Running, path: str, first: str | bytes | None, code: str, message: str
) -> None:
    """VM-15"""
    with connect(server, path) as socket:
        assert socket.response is not None
        if first is not None:
            socket.send(first)
        found, closed = everything(socket)
        assert found["error"]["code"] == code
        assert message in found["error"]["message"]
        assert found["error"]["op_id"] == socket.response.headers["Limpet-Op-Id"]
        assert closed == (1011 if code == "internal" else 1000)


def test_error_in_the_middle_is_told_after_the_output_before_it(server: Running) -> None:
    with run(server, "breaks") as socket:
        started, failed, code = everything(socket)
    assert "started" in started
    assert (failed["error"]["code"], failed["error"]["hint"]) == ("failed_precondition", "limpet start NAME")
    assert code == 1000


def test_bad_message_from_the_client_ends_in_an_error(server: Running) -> None:
    with run(server, "cat") as socket:
        receive(socket)
        socket.send('{"resise": [1, 2]}')
        assert receive(socket)["error"]["hint"] == "did you mean 'resize'?"


def test_other_protocol_is_refused_on_a_web_socket_too(server: Running) -> None:
    with connect(server, "web/exec", headers={"Limpet-Protocol": "2"}) as socket:
        assert receive(socket)["error"]["code"] == "failed_precondition"


def test_shutdown_lets_clients_go() -> None:
    with running() as other:
        with contextlib.ExitStack() as clients:
            socket = clients.enter_context(run(other, "sleep"))
            receive(socket)
            client = clients.enter_context(other.client())
            events = clients.enter_context(client.stream("GET", "/v1/events?follow=1"))
            other.end()
            assert everything(socket) == [1012]  # RFC 6455 registry: service restart
            assert list(events.iter_lines()) == []
        wait_until_detached(other.execs.sessions[-1])
