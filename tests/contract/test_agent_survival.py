"""What the agent's death, a lost session and nonsense on the channel do to running commands: nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket

import pytest

from limpet import errors
from limpet.guest import Agent, Channel, Exit, Output
from limpet.models import ExecInfo
from limpet_agent import frames
from tests.contract.local_guest import LocalGuest


def _kill_agent(guest: LocalGuest) -> None:
    pid = guest.agent_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


async def _all(agent: Agent, ident: str) -> tuple[bytes, ExecInfo]:
    out = b""
    async for event in (await agent.attach(ident)).events():
        if isinstance(event, Output):
            out += event.data
        elif isinstance(event, Exit):
            return out, event.info
    raise AssertionError("no end")


def test_commands_outlive_the_agent_with_all_output_and_their_exit_code(guest: LocalGuest) -> None:
    """GST-9, GST-6"""

    async def start(agent: Agent) -> str:
        script = "echo before; read line; echo got $line; sleep 0.3; echo after; exit 7"
        started = await agent.exec_detached(["sh", "-c", script], stdin=True)
        await asyncio.sleep(0.1)
        return started.id

    ident = guest.do(start)
    first = guest.do(lambda agent: agent.ping())
    _kill_agent(guest)

    async def finish(agent: Agent) -> tuple[bytes, ExecInfo, int]:
        pong = await agent.ping()
        await agent.write_stdin(ident, b"word\n", eof=True)
        out, info = await _all(agent, ident)
        return out, info, pong.agent_starts

    out, info, starts = guest.do(finish)
    assert out == b"before\ngot word\nafter\n" and info.exit_code == 7 and starts == first.agent_starts + 1


def test_a_terminal_outlives_the_agent(guest: LocalGuest) -> None:
    """GST-9"""

    async def start(agent: Agent) -> str:
        started = await agent.exec_detached(["sh", "-c", "echo a; sleep 0.4; echo b; kill -9 $$"], tty=True)
        await asyncio.sleep(0.1)
        return started.id

    ident = guest.do(start)
    _kill_agent(guest)
    out, info = guest.do(lambda agent: _all(agent, ident))
    assert out == b"a\r\nb\r\n" and info.signal == signal.SIGKILL


def test_a_command_that_ends_while_there_is_no_agent_is_known_to_the_next(guest: LocalGuest) -> None:
    """GST-9"""
    ident = guest.do(lambda agent: agent.exec_detached(["sh", "-c", "echo x; sleep 0.15; exit 5"])).id
    pid = guest.agent_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    import time

    time.sleep(0.3)  # it ends unnoticed
    os.kill(pid, signal.SIGKILL)
    out, info = guest.do(lambda agent: _all(agent, ident))
    assert (out, info.exit_code) == (b"x\n", 5)


def test_the_host_is_told_at_once_that_the_agent_was_restarted(guest: LocalGuest) -> None:
    """GST-9"""

    async def work(agent: Agent) -> None:
        command = await agent.exec(["sleep", "20"])
        _kill_agent(guest)
        with pytest.raises(errors.Unavailable):
            async for _event in command.events():
                pass
        assert agent.channel.closed.is_set()
        async with guest.channel() as channel:
            await Agent(channel).signal(command.id, "KILL")

    guest.do(work)


def test_a_new_session_ends_the_streams_of_the_former_and_no_command(guest: LocalGuest) -> None:
    """GST-6"""

    async def work(agent: Agent) -> bytes:
        command = await agent.exec(["sh", "-c", "sleep 0.3; echo lived"])
        await agent.channel.close()
        async with guest.channel() as channel:
            return (await _all(Agent(channel), command.id))[0]

    assert guest.do(work) == b"lived\n"


def _raw(guest: LocalGuest) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(str(guest.socket))
    connection.sendall(frames.hello(b"n" * 16))
    got = b""
    while frames.hello(b"n" * 16) not in got:
        got += connection.recv(4096)
    return connection


def _answer(connection: socket.socket) -> tuple[int, int, bytes]:
    decoder = frames.Decoder()
    while (frame := decoder.next()) is None:
        decoder.feed(connection.recv(4096))
    return frame


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[]", b'"x"', b"{}", b'{"op": 7}', b"\xff\xff", b"[" * 60_000, b'{"op": "exec.start", "argv": "ls"}',
     b'{"op": "fs.read", "path": 1}', b'{"op": "fs.write", "path": "/tmp/x", "mode": "rwx"}',
     b'{"op": "ping", "time_ns": "now"}', b'{"op": "exec.attach", "id": {}}', b'{"op": "tcp.connect", "port": -1}'],
)  # fmt: skip
def test_a_malformed_request_gets_a_typed_error_and_ends_only_its_stream(guest: LocalGuest, payload: bytes) -> None:
    """GST-2"""
    with _raw(guest) as connection:
        pid = guest.agent_pid()
        connection.sendall(frames.encode(1, frames.OPEN, payload))
        stream, kind, body = _answer(connection)
        assert (stream, kind) == (1, frames.RESET) and json.loads(body)["code"] in errors.BY_CODE
        connection.sendall(frames.encode(3, frames.OPEN, b'{"op": "ping"}'))
        assert _answer(connection)[:2] == (3, frames.MSG)
    assert guest.agent_pid() == pid


def test_bytes_that_are_no_frames_cost_the_connection_and_nothing_else(guest: LocalGuest) -> None:
    """GST-2"""
    with _raw(guest) as connection:
        pid = guest.agent_pid()
        connection.sendall(b"\xff" * 100_000)
        assert _answer(connection) == (0, frames.HELLO, frames.MAGIC + frames.NO_NONCE)
    guest.do(lambda agent: agent.ping())
    assert guest.agent_pid() == pid


def test_a_reference_to_bytes_that_are_not_there_is_refused(guest: LocalGuest) -> None:
    """GST-2"""

    async def work(agent: Agent) -> None:
        stream = await agent.channel.open("fs.write", path=str(guest.files / "never"))
        agent.channel.transmit(stream.number, frames.REF, frames.REFERENCE.pack(0, 4096, 12345))
        await stream.end()
        with pytest.raises(errors.Internal, match="does not hold what was announced"):
            await stream.message()

    guest.do(work)
    assert not (guest.files / "never").exists()


def test_a_half_frame_of_a_dead_host_does_not_confuse_the_next(guest: LocalGuest) -> None:
    """GST-1"""
    with _raw(guest) as connection:
        connection.sendall(frames.header(1, frames.OPEN, 5000) + b"half")

    async def work() -> None:
        channel = await Channel.connect(guest.socket, timeout=5)
        await Agent(channel).ping()
        await channel.close()

    asyncio.run(work())
