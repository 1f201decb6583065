"""exec, attach, shell and ps as a user meets them: streams, exit codes, Ctrl-C, terminals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

from limpet.models import State

from .client_kit import StandIn, Terminal, read_until, stand_in


@pytest.fixture(scope="module")
def daemon() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


def test_exec_passes_output_input_and_exit_code(daemon: StandIn) -> None:
    """WS-7"""
    done = daemon.cli("exec", "web", "--", "sh", "-c", "cat; echo err >&2; exit 7", input=b"in\0put")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"in\0put", b"err\n")


def test_exec_echoes_more_than_any_buffer_holds(daemon: StandIn) -> None:
    data = bytes(range(256)) * 40_000
    assert daemon.cli("exec", "web", "cat", input=data).stdout == data


def test_exec_of_a_command_that_a_signal_ended_gives_128_and_its_number(daemon: StandIn) -> None:
    assert daemon.cli("exec", "web", "--", "sh", "-c", "kill -TERM $$").returncode == 143


def test_exec_that_runs_into_its_time_out_gives_124(daemon: StandIn) -> None:
    done = daemon.cli("exec", "--timeout", "200ms", "web", "sleep", "60")
    assert done.returncode == 124
    assert b"time-out" in done.stderr


@pytest.mark.parametrize(
    ("name", "command", "message"),
    [
        ("wep", "true", "did you mean 'web'?"),
        ("web", "no-such-command", "command not found"),
        ("../x", "true", "valid"),
    ],
)
def test_what_fails_before_the_command_gives_125(daemon: StandIn, name: str, command: str, message: str) -> None:
    """WS-7"""
    done = daemon.cli("exec", name, "--", command)
    assert (done.returncode, done.stdout) == (125, b"")
    assert message in done.stderr.decode()


def test_exec_options_reach_the_guest(daemon: StandIn) -> None:
    daemon.cli("exec", "-e", "A=b c", "-u", "root", "--workdir", "/srv", "web", "sh", "-c", "true")
    request = daemon.local_execs.requests[-1]
    assert (request.env, request.user, request.cwd, request.tty) == ({"A": "b c"}, "root", "/srv", False)


def test_exec_of_a_reader_that_went_away_ends_the_command(daemon: StandIn) -> None:
    with daemon.popen("exec", "web", "yes") as process:
        assert process.stdout is not None
        process.stdout.read(100)
        process.stdout.close()
        assert process.wait(10) == 141
    deadline = time.monotonic() + 5
    while any(session.process.returncode is None for session in daemon.local_execs.sessions.values()):
        assert time.monotonic() < deadline, "yes still runs"
        time.sleep(0.02)


def test_first_ctrl_c_goes_to_the_command(daemon: StandIn) -> None:
    with daemon.popen(
        "exec", "web", "--", "sh", "-c", "trap 'echo got it; exit 9' INT; echo up; while :; do sleep 0.1; done"
    ) as process:
        read_until(process.stdout, b"up")
        process.send_signal(signal.SIGINT)
        read_until(process.stdout, b"got it")
        assert process.wait(10) == 9


def test_second_ctrl_c_lets_go_and_says_how_to_come_back(daemon: StandIn) -> None:
    script = "trap 'echo no' INT; echo up; while :; do sleep 0.1; done"
    with daemon.popen("exec", "web", "--", "sh", "-c", script) as process:
        read_until(process.stdout, b"up")
        process.send_signal(signal.SIGINT)
        read_until(process.stdout, b"no")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        told = process.stderr.read().decode()
    match = re.search(r"limpet attach web (ex_\w+)", told)
    assert match, told
    session = daemon.local_execs.sessions[match[1]]
    assert session.process.returncode is None
    with daemon.popen("attach", "web", match[1]) as again:
        os.killpg(session.process.pid, signal.SIGKILL)
        assert again.wait(10) == 137


def test_ctrl_c_reaches_a_command_that_reads_none_of_its_input(daemon: StandIn) -> None:
    with daemon.popen("exec", "web", "--", "sh", "-c", "echo up; exec sleep 60", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        read_until(process.stdout, b"up")
        os.set_blocking(process.stdin.fileno(), False)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:  # fill every buffer on the way
            try:
                os.write(process.stdin.fileno(), bytes(1 << 20))
            except BlockingIOError:
                time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        process.stdin.close()


def test_terminal_is_given_on_and_restored(daemon: StandIn) -> None:
    terminal = Terminal(daemon, "exec", "web", "--", "sh", "-c", "test -t 0 && read x && echo got $x $TERM; exit 3")
    deadline = time.monotonic() + 10
    while termios.tcgetattr(terminal.master)[3] & termios.ICANON:
        assert time.monotonic() < deadline, "never raw"
        time.sleep(0.01)
    terminal.press(b"keys\r")
    terminal.until(b"got keys xterm")
    process, master = terminal.process, terminal.master
    assert process.wait(10) == 3
    assert termios.tcgetattr(master)[3] & termios.ICANON
    os.close(master)


def test_ctrl_c_at_a_terminal_is_a_key_and_pressed_again_lets_go(daemon: StandIn) -> None:
    terminal = Terminal(
        daemon, "exec", "web", "--", "sh", "-c", "trap 'echo again' INT; echo up; while :; do sleep 0.1; done"
    )
    terminal.until(b"up")
    terminal.press(b"\x03")
    terminal.until(b"again")
    terminal.press(b"\x03")
    assert terminal.end() == 130
    assert b"limpet attach web ex_" in terminal.seen


def test_shell_boots_a_stopped_sandbox(daemon: StandIn) -> None:
    daemon.add("sleepy", State.STOPPED)
    done = daemon.cli("shell", "sleepy", input=b"echo $((6*7)); exit 4\n")
    assert (done.returncode, done.stdout) == (4, b"42\n")
    assert daemon.boxes.known["sleepy"].state is State.RUNNING


def test_detached_exec_prints_its_id_and_ps_lists_it(daemon: StandIn) -> None:
    id = daemon.cli("exec", "-d", "web", "sleep", "60").stdout.decode().strip()
    rows = daemon.cli("ps", "web").stdout.decode().splitlines()
    assert rows[0].split() == ["ID", "STATE", "AGE", "USER", "COMMAND"]
    assert any(row.split()[:2] == [id, "running"] and row.endswith("sleep 60") for row in rows)
    found = json.loads(daemon.cli("ps", "web", "--json").stdout)
    assert {item["id"]: item["running"] for item in found}[id] is True
