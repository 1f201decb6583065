"""The services of the container runtime as processes of this machine: how they are started, found again and ended."""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limpet_agent import engine, probing, servicelog
from limpet_agent.ensuring import Attempt
from limpet_agent.faults import Fault
from limpet_agent.services import Service

# A service: listens at argv[1] and answers pings; with more words does what they say.
PROGRAM = """
import os, signal, socket, sys, time
path, what = sys.argv[1], sys.argv[2:]
with open("/proc/self/comm", "w") as comm:
    comm.write("dockerd")
print("begins", flush=True)
if "fail" in what:
    print("no luck today", file=sys.stderr)
    sys.exit(3)
if "stubborn" in what:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "deaf" in what:
    time.sleep(60)
if os.path.exists(path):
    os.unlink(path)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(5)
while True:
    peer = listener.accept()[0]
    if peer.recv(4096):
        peer.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nOK")
    peer.close()
"""


def service(tmp_path: Path, *words: str, name: str = "dockerd", patience: float = 10.0) -> Service:
    path = str(tmp_path / "sock")
    return Service(
        name, path, probing.ping_docker, lambda: [sys.executable, "-c", PROGRAM, path, *words], str(tmp_path / "run"),
        str(tmp_path / "state"), patience,
    )  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Services that are gone afterwards."""
    all_of_them: list[Service] = []

    def make(*words: str, patience: float = 10.0) -> Service:
        all_of_them.append(service(tmp_path, *words, patience=patience))
        return all_of_them[-1]

    yield make
    for each in all_of_them:
        each.stop(0)


def test_a_service_is_started_once_and_found_again_by_a_later_agent(
    made: Callable[..., Service], tmp_path: Path
) -> None:  # fmt: skip
    """RUN-3: by its pid file; without that by who listens on its socket."""
    first = made()
    assert first.start(Attempt()) is True
    pid = first.noted()
    assert pid and os.getsid(pid) == pid
    later = made()
    assert (later.start(Attempt()), later.pid()) == (False, pid)
    (tmp_path / "run" / "dockerd.pid").unlink()
    assert (later.start(Attempt()), later.pid()) == (False, pid)
    assert later.health().pid == pid


def test_a_killed_service_is_seen_and_started_again(made: Callable[..., Service]) -> None:
    """RUN-5, RUN-2: pid file and socket are still there."""
    one = made()
    one.start(Attempt())
    pid = one.noted()
    assert pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: one.noted() is None)
    assert (one.health().state, one.health().reason) == ("not_ready", "socket exists but nobody listens")
    assert one.start(Attempt()) is True
    assert one.noted() not in (None, pid)


def test_a_service_that_is_about_to_end_is_started_again(made: Callable[..., Service]) -> None:
    """RUN-2: it was there at the first look, and is gone at the next."""
    one = made()
    one.start(Attempt())
    pid = one.noted()
    assert pid
    os.kill(pid, signal.SIGSTOP)  # it does not answer any more
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    assert one.start(Attempt()) is True
    assert one.noted() not in (None, pid)


def test_a_pid_file_that_names_another_process_is_not_believed(made: Callable[..., Service], tmp_path: Path) -> None:
    """RUN-5: pids come again."""
    one = made()
    (tmp_path / "run").mkdir()
    for text in (f"{os.getpid()} 1", "1 0", "nonsense", "", f"{os.getpid()}"):
        (tmp_path / "run" / "dockerd.pid").write_text(text)
        assert one.noted() is None and one.stop(1) is None
    assert one.start(Attempt()) is True


def test_the_agent_that_listens_in_place_of_a_service_is_not_ended(
    made: Callable[..., Service], tmp_path: Path
) -> None:  # fmt: skip
    """RUN-5: a doorstep is the agent's own; nor is PID 1 one."""
    one = made()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen(5)
        assert one.pid() is None and one.stop(1) is None


def test_a_service_that_ends_at_its_start_is_told_with_its_last_words(made: Callable[..., Service]) -> None:
    """RUN-1"""
    began = time.monotonic()
    with pytest.raises(Fault, match=r"dockerd ended.* at its start: no luck today") as caught:
        made("fail").start(Attempt())
    assert (caught.value.code, caught.value.hint) == ("unavailable", "limpet runtime logs NAME dockerd")
    assert time.monotonic() - began < 5


def test_a_service_that_never_answers_is_given_up(made: Callable[..., Service]) -> None:
    """RUN-1: the wait is bounded."""
    with pytest.raises(Fault, match=r"does not answer after 0\.3 s: runs, and has no socket yet") as caught:
        made("deaf", patience=0.3).start(Attempt())
    assert caught.value.code == "deadline"


def test_a_start_that_is_cancelled_ends_at_once_and_leaves_a_service_that_can_be_stopped(
    made: Callable[..., Service]
) -> None:  # fmt: skip
    """RUN-1"""
    one, attempt = made("deaf"), Attempt()
    threading.Timer(0.3, attempt.cancel).start()
    with pytest.raises(Fault, match="cut off"):
        one.start(attempt)
    assert one.stop(5) == "stopped"


def test_a_service_ends_or_is_killed_in_time(made: Callable[..., Service]) -> None:
    """RUN-3"""
    one = made()
    assert one.stop(5) is None
    one.start(Attempt())
    assert one.stop(5) == "stopped"
    assert one.stop(5) is None
    stubborn = made("stubborn")
    stubborn.start(Attempt())
    assert stubborn.stop(0.2) == "killed"
    assert stubborn.pid() is None


def test_a_hanging_service_can_be_ended(made: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-5: one that is stopped by a signal: seen as silent, and it goes."""
    monkeypatch.setattr(probing, "PATIENCE", 0.2)
    one = made()
    one.start(Attempt())
    pid = one.noted()
    assert pid
    os.kill(pid, signal.SIGSTOP)
    assert (one.health().state, one.health().reason) == ("error", "socket exists but does not answer")
    assert one.stop(5) == "stopped"


def test_what_a_service_writes_is_kept_over_its_starts(made: Callable[..., Service]) -> None:
    """RUN-7"""
    one = made()
    for _ in range(2):
        one.start(Attempt())
        one.stop(5)
    assert servicelog.tail(one.log, None).count(b"begins") == 2
    assert stat.S_IMODE(os.stat(one.log).st_mode) == 0o600


# -- how they are started


def test_what_the_user_has_set_is_left_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-3: dockerd refuses a setting that comes twice."""
    monkeypatch.setattr(engine, "_PID_FILE", str(tmp_path / "docker.pid"))
    monkeypatch.setattr(engine, "_SETTINGS", str(tmp_path / "daemon.json"))
    plain = engine.dockerd()
    assert "--storage-driver=overlay2" in plain and "--userland-proxy=false" in plain
    (tmp_path / "daemon.json").write_text('{"storage-driver": "btrfs", "debug": true}')
    assert engine.dockerd() == [word for word in plain if not word.startswith("--storage-driver")]
    (tmp_path / "daemon.json").write_text("{ nonsense")
    assert engine.dockerd() == plain


def test_a_pid_file_of_a_killed_dockerd_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-3: it would believe that it runs already, as soon as another process has that pid."""
    left = tmp_path / "docker.pid"
    monkeypatch.setattr(engine, "_PID_FILE", str(left))
    for text in (str(os.getpid()), "4194303"):
        left.write_text(text)
        engine.dockerd()
        assert not left.exists()


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
