"""Commands in the guest, against the real agent: what they are given, what comes back, how they end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading

import pytest

from limpet import errors
from limpet.guest import Agent, Completed, Exit, Gap, GuestExec, Output
from limpet.models import ExecInfo
from tests.contract.local_guest import LocalGuest

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")


async def _follow(command: GuestExec) -> tuple[bytes, bytes, ExecInfo, list[Gap]]:
    lanes = {1: bytearray(), 2: bytearray()}
    gaps = []
    async for event in command.events():
        if isinstance(event, Output):
            lanes[event.lane] += event.data
        elif isinstance(event, Gap):
            gaps.append(event)
        elif isinstance(event, Exit):
            return bytes(lanes[1]), bytes(lanes[2]), event.info, gaps
    raise AssertionError("no end")


def _run(guest: LocalGuest, *argv: str, **options: object) -> Completed:
    return guest.do(lambda agent: agent.run(argv, **options))  # type: ignore[arg-type]


def test_a_ping_names_the_agent(guest: LocalGuest) -> None:
    """GST-3"""
    pong = guest.do(lambda agent: agent.ping())
    assert pong.protocol == 1 and pong.data == "ready" and pong.boot_id


def test_the_system_is_described(guest: LocalGuest) -> None:
    """GST-4"""
    info = guest.do(lambda agent: agent.system())
    assert info.kernel == os.uname().release and info.memory_total > info.memory_available > 0


def test_output_lanes_and_exit_code_are_exact(guest: LocalGuest) -> None:
    """GST-5"""
    done = _run(guest, "sh", "-c", "echo out; echo err >&2; exit 42")
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 42)


@pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV"])
def test_the_signal_that_ended_a_command_is_told(guest: LocalGuest, name: str) -> None:
    """GST-5"""

    async def work(agent: Agent) -> ExecInfo:
        command = await agent.exec(["sh", "-c", f"kill -{name} $$"])
        return (await _follow(command))[2]

    info = guest.do(work)
    assert info.signal == signal.Signals[f"SIG{name}"] and info.exit_code is None


def test_environment_and_directory_are_as_asked(guest: LocalGuest) -> None:
    """GST-5"""
    done = _run(guest, "sh", "-c", 'echo "$A|$(pwd)"', env={"A": "b c"}, cwd="/usr")
    assert done.stdout == b"b c|/usr\n"


def test_input_arrives_whole_and_ends(guest: LocalGuest) -> None:
    """GST-5"""
    data = os.urandom(3_000_000)
    done = _run(guest, "cat", input=data)
    assert done.stdout == data


def test_a_command_that_closes_its_input_does_not_hang_the_sender(guest: LocalGuest) -> None:
    """GST-5"""
    done = _run(guest, "sh", "-c", "exec <&-; sleep 0.1; echo done", input=bytes(9_000_000))
    assert done.stdout == b"done\n"


def test_no_input_means_end_of_file(guest: LocalGuest) -> None:
    """GST-5"""
    assert _run(guest, "cat").stdout == b""


@pytest.mark.parametrize(
    ("argv", "cwd", "user", "kind", "words"),
    [
        (["no-such-command"], None, None, errors.NotFound, "command 'no-such-command' not found"),
        (["/etc/passwd"], None, None, errors.FailedPrecondition, "not executable"),
        (["true"], "/no/such", None, errors.NotFound, "no such directory"),
        (["true"], None, "nobody-of-that-name", errors.NotFound, "no such user"),
        (["a\0b"], None, None, errors.BadRequest, "NUL"),
    ],
)
def test_a_command_that_cannot_start_says_why(
    guest: LocalGuest, argv: list[str], cwd: str | None, user: str | None, kind: type[errors.LimpetError], words: str
) -> None:
    """GST-5"""
    with pytest.raises(kind, match=words):
        guest.do(lambda agent: agent.run(argv, cwd=cwd, user=user))


def test_a_missing_interpreter_is_named_as_the_reason(guest: LocalGuest) -> None:
    """GST-5"""
    script = guest.files / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(errors.FailedPrecondition, match="interpreter"):
        _run(guest, str(script))


@root_only
def test_a_command_runs_as_the_user_that_was_asked_for(guest: LocalGuest) -> None:
    """GST-5"""
    done = _run(guest, "sh", "-c", 'echo "$(id -un) $(id -u) $USER"', user="daemon", cwd="/")
    assert done.stdout == b"daemon 1 daemon\n"


def test_a_terminal_has_the_size_that_was_asked_for_and_can_be_resized(guest: LocalGuest) -> None:
    """GST-5"""

    async def work(agent: Agent) -> bytes:
        command = await agent.exec(
            ["sh", "-c", "stty size; trap 'stty size; exit' WINCH; echo go; while :; do sleep 0.02; done"],
            tty=True, rows=33, cols=101,
        )  # fmt: skip
        seen = b""
        async for event in command.events():
            if isinstance(event, Output):
                seen += event.data
                if seen.endswith(b"go\r\n"):
                    await command.resize(50, 60)
        return seen

    assert guest.do(work) == b"33 101\r\ngo\r\n50 60\r\n"


def test_a_terminal_is_the_controlling_one_and_takes_input_until_its_end(guest: LocalGuest) -> None:
    """GST-5"""

    async def work(agent: Agent) -> bytes:
        script = "stty -echo; echo ready; cat; tty < /dev/tty >/dev/null && echo yes"
        command = await agent.exec(["sh", "-c", script], tty=True)
        seen = b""
        async for event in command.events():
            if isinstance(event, Output):
                seen += event.data
                if seen == b"ready\r\n":
                    await command.send_stdin(b"hello\n")
                    await command.close_stdin()
        return seen

    assert guest.do(work) == b"ready\r\nhello\r\nyes\r\n"


def test_a_signal_reaches_the_whole_process_group(guest: LocalGuest) -> None:
    """GST-5"""

    async def work(agent: Agent) -> bytes:
        inner = "(trap 'echo inner; exit' USR1; echo go; while :; do sleep 0.02; done)"
        command = await agent.exec(["sh", "-c", f"trap : USR1; {inner} & wait; wait"])
        seen = b""
        async for event in command.events():
            if isinstance(event, Output) and event.lane == 1:
                seen += event.data
                if seen == b"go\n":
                    await command.signal("USR1")
        return seen

    assert guest.do(work) == b"go\ninner\n"


def test_a_timeout_kills_the_whole_process_group(guest: LocalGuest) -> None:
    """GST-5"""
    marker = guest.files / "survivor"

    async def work(agent: Agent) -> ExecInfo:
        script = f"trap '' TERM; (trap '' TERM; sleep 3.5; touch {marker}) & while :; do sleep 0.1; done"
        command = await agent.exec(["sh", "-c", script], timeout=0.2)
        info = (await _follow(command))[2]
        await agent.run(["sleep", "1.6"])
        return info

    info = guest.do(work)
    assert info.timed_out and info.signal == signal.SIGKILL and not marker.exists()


def test_a_background_process_does_not_delay_the_end(guest: LocalGuest) -> None:
    """GST-5"""

    async def work(agent: Agent) -> tuple[bytes, bytes]:
        command = await agent.exec(["sh", "-c", "(sleep 0.8; echo late) & echo early"])
        first, _, info, _ = await _follow(command)
        await agent.run(["sleep", "0.9"])
        again, _, _, _ = await _follow(await agent.attach(info.id))
        return first, again

    assert guest.do(work) == (b"early\n", b"early\nlate\n")


def test_output_survives_the_client_and_is_replayed_from_an_offset(guest: LocalGuest) -> None:
    """GST-6"""

    async def leave(agent: Agent) -> str:
        command = await agent.exec(["sh", "-c", "echo one; sleep 0.2; echo two; echo three >&2"])
        async for _event in command.events():
            break
        return command.id

    ident = guest.do(leave)  # the session ends here, the command goes on

    async def come_back(agent: Agent) -> tuple[bytes, bytes, ExecInfo, list[Gap]]:
        await agent.wait(ident, timeout=5)
        return await _follow(await agent.attach(ident, stdout=2, stderr=0))

    out, err, info, _ = guest.do(come_back)
    assert (out, err, info.exit_code) == (b"e\ntwo\n", b"three\n", 0)


def test_old_output_makes_room_and_the_reader_is_told_of_the_gap(guest: LocalGuest) -> None:
    """GST-6"""

    async def work(agent: Agent) -> tuple[bytes, list[Gap], ExecInfo]:
        started = await agent.exec_detached(["sh", "-c", "head -c 40000000 /dev/zero; echo end"])
        await agent.wait(started.id, timeout=20)
        out, _, info, gaps = await _follow(await agent.attach(started.id))
        return out, gaps, info

    out, gaps, info = guest.do(work)
    assert info.stdout_bytes == 40_000_004 and out.endswith(b"end\n")
    assert gaps == [Gap("stdout", 0, info.stdout_start)] and 16 << 20 <= len(out) == info.stdout_bytes - gaps[0].end


def test_a_slow_reader_holds_its_command_back_and_loses_nothing(guest: LocalGuest) -> None:
    """GST-1, GST-6"""

    async def work(agent: Agent) -> tuple[int, list[Gap], Completed]:
        slow = await agent.exec(["head", "-c", "60000000", "/dev/zero"])
        events = slow.events()
        count = 0
        async for event in events:
            if isinstance(event, Output):
                count += len(event.data)
            break
        other = await agent.run(["echo", "not stopped"])  # while the first is not being read
        await asyncio.sleep(0.2)
        assert (await agent.get_exec(slow.id)).running
        gaps = []
        async for event in events:
            if isinstance(event, Output):
                count += len(event.data)
            elif isinstance(event, Gap):
                gaps.append(event)
        return count, gaps, other

    count, gaps, other = guest.do(work)
    assert (count, gaps, other.stdout) == (60_000_000, [], b"not stopped\n")


def test_many_commands_at_once_each_get_their_own(guest: LocalGuest) -> None:
    """GST-1"""

    async def work(agent: Agent) -> list[Completed]:
        return await asyncio.gather(*(agent.run(["sh", "-c", f"echo {n}; exit {n}"]) for n in range(50)))

    assert [(done.stdout, done.exit_code) for done in guest.do(work)] == [(b"%d\n" % n, n) for n in range(50)]


def test_one_client_has_the_input_until_another_steals_it(guest: LocalGuest) -> None:
    """GST-6"""

    async def work(agent: Agent) -> tuple[bytes, str]:
        first = await agent.exec(["cat"], stdin=True)
        with pytest.raises(errors.Busy):
            await agent.attach(first.id, stdin=True)
        second = await agent.attach(first.id, stdin=True, steal=True)
        with pytest.raises(errors.FailedPrecondition) as lost:
            await _follow(first)
        await second.send_stdin(b"mine")
        await second.close_stdin()
        return (await _follow(second))[0], str(lost.value)

    out, lost = guest.do(work)
    assert out == b"mine" and "took over" in lost


def test_input_can_be_sent_without_attaching(guest: LocalGuest) -> None:
    """GST-6"""

    async def work(agent: Agent) -> bytes:
        started = await agent.exec_detached(["cat"], stdin=True)
        await agent.write_stdin(started.id, b"a")
        await agent.write_stdin(started.id, b"b", eof=True)
        await agent.wait(started.id, timeout=5)
        return (await _follow(await agent.attach(started.id)))[0]

    assert guest.do(work) == b"ab"


def test_unknown_commands_operations_and_signals_are_refused(guest: LocalGuest) -> None:
    """GST-2"""

    async def work(agent: Agent) -> None:
        with pytest.raises(errors.NotFound):
            await agent.get_exec("ex_none")
        with pytest.raises(errors.Unimplemented):
            await (await agent.channel.open("no.such.op")).message()
        started = await agent.exec_detached(["sleep", "20"])
        with pytest.raises(errors.BadRequest):
            await agent.signal(started.id, "NOPE")
        with pytest.raises(errors.DeadlineExceeded):
            await agent.wait(started.id, timeout=0.05)
        await agent.signal(started.id, "KILL")
        assert (await agent.wait(started.id)).signal == signal.SIGKILL
        with pytest.raises(errors.FailedPrecondition):
            await agent.signal(started.id, "KILL")

    guest.do(work)


def test_the_log_carries_the_operation_ids(guest: LocalGuest) -> None:
    """GST-1"""
    from limpet import log

    with log.operation("op_test_marker"):
        _run(guest, "true")
    assert b"op_test_marker exec.start" in guest.do(lambda agent: agent.log())


def test_a_port_of_the_guest_is_reached_over_the_channel(guest: LocalGuest) -> None:
    """GST-10"""
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]

    def echo() -> None:
        connection, _ = server.accept()
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    thread = threading.Thread(target=echo)
    thread.start()

    async def work(agent: Agent) -> bytes:
        stream = await agent.connect_tcp(port)
        data = os.urandom(2_000_000)

        async def send() -> None:
            await stream.send(data)
            await stream.end()

        sender = asyncio.create_task(send())
        got = bytearray()
        async for item in stream:
            got += item.data  # type: ignore[union-attr]
        await sender
        assert bytes(got) == data
        return bytes(got)

    guest.do(work)
    thread.join(5)
    server.close()
    with pytest.raises(errors.Unavailable, match="connection refused"):
        guest.do(lambda agent: agent.connect_tcp(port))
