"""runtime, docker, docker-env and the ports of containers as a user meets them, against a stand-in daemon. The docker
client is a script here that tells how it was called; the real one is in tests/vm/test_docker.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limpet import process
from limpet.errors import Unavailable
from limpet.models import PortMapping, RuntimeStatus, ServiceStatus, State
from limpet.services import doctor
from tests.contract.local_runtime import MISSING

from .client_kit import StandIn, Terminal, stand_in

CLIENT = """#!/bin/sh
printf '%s\\n' "$0" "$@"
env | grep -E '^(DOCKER|BUILDX)' | sort
grep SigIgn /proc/$$/status
exit 7
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture(autouse=True)
def only_web(daemon: StandIn) -> None:
    daemon.boxes.known.clear()
    daemon.add("web")
    daemon.runtimes.ready.clear()
    daemon.runtimes.asked.clear()


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker client in front of PATH."""
    program = tmp_path / "docker"
    program.write_text(CLIENT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return program


def socket_of(daemon: StandIn, name: str) -> str:
    return f"unix://{daemon.paths.sandbox(daemon.boxes.known[name].id).docker_socket}"


def play(daemon: StandIn, monkeypatch: pytest.MonkeyPatch, verb: str, answer: Any) -> None:
    """Let the stand-in's runtimes give this answer, or this error."""

    async def answered(*_: object) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(daemon.runtimes, verb, answered)


def test_ensure_says_whether_it_started_or_reused_and_shows_the_stages(daemon: StandIn) -> None:
    """RUN-1"""
    done = daemon.cli("runtime", "ensure", "web")
    assert (done.returncode, done.stdout) == (0, b"started\n")
    assert b"dockerd: done in 2.0 s\n" in done.stderr
    assert done.stderr.endswith(b"containerd, dockerd in 6.0 s\n")
    done = daemon.cli("runtime", "ensure", "web")
    assert (done.stdout, done.stderr) == (b"reused\n", b"")
    assert json.loads(daemon.cli("runtime", "ensure", "--json", "web").stdout)["how"] == "reused"
    daemon.runtimes.ready.clear()
    assert daemon.cli("runtime", "ensure", "-q", "web").stderr == b""


def test_ensure_that_fails_names_what_is_missing(daemon: StandIn) -> None:
    """RUN-3"""
    daemon.add("bare")
    done = daemon.cli("runtime", "ensure", "bare")
    assert (done.returncode, done.stdout) == (1, b"")
    assert f"error: {MISSING}\nhint: limpet create --image docker\n" in done.stderr.decode()


def test_status_tells_each_service(daemon: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-5"""
    daemon.cli("runtime", "ensure", "web")
    assert daemon.cli("runtime", "status", "web").stdout.decode().splitlines() == [
        "runtime:    ready",
        "containerd: ready (pid 100)",
        "dockerd:    ready (pid 101)",
        "docker:     20.10.24",
        "autostart:  yes",
        "socket:     /run/web/docker.sock",
    ]
    assert json.loads(daemon.cli("runtime", "status", "--json", "web").stdout)["state"] == "ready"
    silent = ServiceStatus(name="dockerd", state="error", reason="socket exists but does not answer", pid=7)
    found = RuntimeStatus(state="degraded", error="\x1b[31mhung", services=[silent], socket="/s")
    play(daemon, monkeypatch, "status", found)
    lines = daemon.cli("runtime", "status", "web").stdout.decode().splitlines()
    assert lines[:2] == [
        "runtime:    degraded: \\x1b[31mhung",
        "dockerd:    error: socket exists but does not answer (pid 7)",
    ]


def test_logs_are_those_of_dockerd_unless_told_otherwise(daemon: StandIn) -> None:
    """RUN-7"""
    assert daemon.cli("runtime", "logs", "web", "-n", "2").stdout == b"dockerd line 998\ndockerd line 999\n"
    assert daemon.cli("runtime", "logs", "web", "containerd", "-n", "1").stdout == b"containerd line 999\n"
    assert len(daemon.cli("runtime", "logs", "web").stdout.splitlines()) == 1000
    assert daemon.cli("runtime", "logs", "web", "-n", "0").stdout == b""


def test_stop_prints_what_was_stopped_and_says_what_had_to_be_killed(daemon: StandIn) -> None:
    done = daemon.cli("runtime", "stop", "web")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"nothing ran\n")
    daemon.cli("runtime", "ensure", "web")
    done = daemon.cli("runtime", "stop", "--timeout", "0", "web")
    assert done.stdout == b"dockerd\ncontainerd\n"
    assert done.stderr == b"warning: dockerd did not end within 0 and was killed\n"
    daemon.cli("runtime", "ensure", "web")
    assert json.loads(daemon.cli("runtime", "stop", "--json", "--timeout", "1m", "web").stdout)["killed"] == []
    assert [request.timeout for request in daemon.runtimes.asked] == [20, 0, 60]


def test_docker_is_the_hosts_client_on_the_sandboxs_engine(
    daemon: StandIn, client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-6"""
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "BUILDX_BUILDER"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("DOCKER_CONFIG", "/kept")
    done = daemon.cli("docker", "web", "--", "--debug", "run", "-it", "a b")
    said = ["--debug", "run", "-it", "a b", "DOCKER_CONFIG=/kept", f"DOCKER_HOST={socket_of(daemon, 'web')}"]
    told = done.stdout.decode().splitlines()
    ignored = int(told.pop().removeprefix("SigIgn:"), 16)
    assert told == [str(client), *said]
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)  # Python ignores them
    assert done.returncode == 7
    assert "web" in daemon.runtimes.ready
    assert b"dockerd: done in 2.0 s" in done.stderr


@pytest.mark.parametrize("words", [("web", "ps", "-q"), ("web", "--", "ps", "-q"), ("-q", "web", "ps", "-q")])
def test_everything_from_the_clients_command_on_is_the_clients(
    daemon: StandIn, client: Path, words: tuple[str, ...]
) -> None:
    done = daemon.cli("docker", *words)
    assert done.stdout.decode().splitlines()[:3] == [str(client), "ps", "-q"]


def test_docker_without_words_prints_what_the_client_says_then(daemon: StandIn, client: Path) -> None:
    done = daemon.cli("docker", "web")
    assert done.stdout.decode().splitlines()[:2] == [str(client), f"DOCKER_HOST={socket_of(daemon, 'web')}"]


def test_docker_leaves_the_terminal_to_the_client(daemon: StandIn, client: Path) -> None:
    """RUN-6"""
    client.write_text(
        "#!/bin/sh\ntest -t 0 && test -t 1 && stty -a | grep -q ' icanon' && echo cooked\nread line && exit $line\n"
    )
    terminal = Terminal(daemon, "docker", "web", "run", "-it", "x")
    terminal.until(b"cooked")
    terminal.press(b"9\r")
    assert terminal.end() == 9


def test_docker_without_a_client_says_how_to_get_one(
    daemon: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = daemon.cli("docker", "web", "ps")
    assert (done.returncode, done.stdout) == (125, b"")
    told = done.stderr.decode()
    assert "error: there is no docker client on this host\nhint: sudo apt-get install docker.io" in told
    assert "limpet exec web -- docker" in told
    assert daemon.runtimes.ready == set()


def test_podman_in_the_clothes_of_docker_is_refused(daemon: StandIn, client: Path) -> None:
    """RUN-6: it would run on an engine of this host."""
    client.write_text('#!/bin/sh\nexec /usr/bin/podman "$@"\n')
    done = daemon.cli("docker", "web", "ps")
    assert (done.returncode, done.stdout) == (125, b"")
    assert f"error: {client} is podman" in done.stderr.decode()


@pytest.mark.parametrize("name", ["nobody", "bare", "off"])
def test_docker_fails_with_125_before_the_client_begins(daemon: StandIn, client: Path, name: str) -> None:
    daemon.add("bare")
    daemon.add("off", State.STOPPED)
    done = daemon.cli("docker", name, "ps")
    assert (done.returncode, done.stdout) == (125, b"")
    assert done.stderr.startswith((b"error: ", b"prerequisites: failed\nerror: "))
    assert b"hint: limpet start off" in done.stderr or name != "off"


def test_a_client_that_cannot_be_run_is_told(daemon: StandIn, client: Path) -> None:
    client.write_bytes(b"\x7fELF but not really")
    done = daemon.cli("docker", "web", "ps")
    assert (done.returncode, done.stderr.endswith(f"cannot run {client}: Exec format error\n".encode())) == (125, True)


def test_docker_env_points_a_shell_there_and_back(daemon: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-6"""
    done = daemon.cli("docker-env", "web")
    first, second = done.stdout.decode().splitlines()
    assert first == f"export DOCKER_HOST={socket_of(daemon, 'web')}"
    assert second.startswith("unset DOCKER_CONTEXT ")
    assert done.stderr == b""
    assert daemon.runtimes.ready == set()
    assert daemon.cli("docker-env", "--unset").stdout == b"unset DOCKER_HOST\n"
    daemon.add("off", State.STOPPED)
    done = daemon.cli("docker-env", "off")
    assert done.stdout.startswith(b"export DOCKER_HOST=unix://")
    assert done.stderr == b"warning: off is stopped\nhint: limpet start off\n"
    done = daemon.cli("docker-env", "--shell", "powershell", "web")
    assert (done.returncode, b"none of sh, fish, csh" in done.stderr) == (2, True)


@pytest.mark.parametrize("shell", ["sh", "fish", "csh"])
def test_a_shell_understands_its_docker_env(daemon: StandIn, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.setenv("DOCKER_CONTEXT", "elsewhere")
    words = daemon.cli("docker-env", "--shell", shell, "web").stdout.decode()
    back = daemon.cli("docker-env", "--shell", shell, "--unset").stdout.decode()
    if shutil.which(shell) is None:
        prefix = {"fish": "set -gx DOCKER_HOST '", "csh": "setenv DOCKER_HOST "}[shell]
        assert words.startswith(prefix + "unix://") and "DOCKER_CONTEXT;" in words
        return
    script = f"{words}\nenv | grep ^DOCKER_\n{back}\nenv | grep ^DOCKER_ || true"
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, timeout=10, check=False)
    assert (done.stdout, done.stderr) == (f"DOCKER_HOST={socket_of(daemon, 'web')}\n", "")


def test_ports_show_those_of_containers(daemon: StandIn) -> None:
    daemon.boxes.known["web"].ports = [PortMapping(host=40123, guest=8080), PortMapping(host=2222, guest=22)]
    told = daemon.cli("ports", "web").stdout.decode().splitlines()
    assert [line.split() for line in told] == [
        ["HOST", "GUEST"], ["127.0.0.1:40123", "8080"], ["127.0.0.1:2222", "22"],
    ]  # fmt: skip
    daemon.runtimes.ready.add("web")
    told = daemon.cli("ports", "web").stdout.decode().splitlines()
    assert [line.split() for line in told] == [
        ["HOST", "GUEST", "CONTAINER"],
        ["127.0.0.1:40123", "8080", "web", "(nginx)", "80/tcp"],
        ["127.0.0.1:2222", "22", "-"],
        ["-", "5432", "db", "(postgres:17)", "5432/tcp"],
    ]
    found = json.loads(daemon.cli("ports", "--json", "web").stdout)
    assert [(one["host"], one["guest"], one["container"]) for one in found] == [
        (40123, 8080, "web"), (2222, 22, None), (None, 5432, "db"),
    ]  # fmt: skip


def test_ports_of_the_host_are_shown_although_the_engine_does_not_tell(
    daemon: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.boxes.known["web"].ports = [PortMapping(host=40123, guest=8080)]
    play(daemon, monkeypatch, "ports", Unavailable("the engine does not answer"))
    done = daemon.cli("ports", "web")
    assert (done.returncode, b"127.0.0.1:40123" in done.stdout) == (0, True)
    assert b"warning: the ports of containers are not known: the engine does not answer" in done.stderr


def test_completion_knows_sandboxes_and_services(daemon: StandIn) -> None:
    for command in ("docker", "docker-env", "runtime ensure", "runtime stop"):
        assert daemon.complete(f"limpet {command} w") == ["web"]
    assert daemon.complete("limpet runtime logs web d") == ["dockerd"]


def test_doctor_has_a_row_for_the_client_and_none_fails_without_it(
    client: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "_SEARCH", str(tmp_path))
    row = doctor._docker_client()
    assert (row.status, row.detail.split(";")[0]) == ("PASS", str(client))
    client.unlink()
    row = doctor._docker_client()
    assert (row.status, row.remedy) == ("WARN", "sudo apt-get install docker.io")
    assert "only `limpet docker` needs it" in row.detail
