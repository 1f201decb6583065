"""The stock docker client on the engine of a real sandbox, which has no network: everything goes through its socket."""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import json
import os
import subprocess
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from limpet import Client
from limpet.client import Sandbox
from tests.conftest import Cli
from tests.vm.docker_client import Docker, rootfs
from tests.vm.kit import daemon_pid, wait_until

pytestmark = pytest.mark.vm

_GUEST_PORT = 8080

# Notes its coming and going on a volume, which its web server shows.
_SERVICE = """
echo up >> /data/life
trap 'echo down >> /data/life; exit' TERM
httpd -h /data
echo serving
while :; do sleep 1 & wait $!; done
"""
_DOCKERFILE = b"""
FROM box
COPY payload /srv/payload
RUN sha256sum < /srv/payload > /srv/sum
CMD ["cat", "/srv/sum"]
"""


@pytest.fixture(scope="module")
def box(client: Client) -> Iterator[Sandbox]:
    box = client.sandboxes.create("engine", image="docker", memory_mib=1024, network="none")
    yield box
    box.remove(force=True, purge=True)


@pytest.fixture(scope="module")
def docker(box: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Docker:
    """The client, and an image `box` to run."""
    docker = Docker(box.docker_host, tmp_path_factory.mktemp("docker"))
    docker("import", "-", "box", input=rootfs())
    return docker


@pytest.fixture(scope="module")
def service(docker: Docker) -> str:
    """A container that always comes back, with data on a volume and a published port."""
    options = ("--name", "service", "--restart=always", "-v", "data:/data", "-p", f"{_GUEST_PORT}:80")
    docker("run", "-d", *options, "box", "sh", "-c", _SERVICE)
    return "service"


def life(docker: Docker) -> list[str]:
    """How often the service came and went."""
    return docker("exec", "service", "cat", "/data/life").split()


def running(docker: Docker, name: str) -> bool:
    done = docker.attempt("inspect", "-f", "{{.State.Running}}", name)
    return done.stdout.strip() == b"true"


def output(command: subprocess.Popen[bytes]) -> IO[bytes]:
    assert command.stdout is not None
    return command.stdout


def test_the_first_call_of_a_client_starts_the_engine_and_finds_its_images(box: Sandbox, docker: Docker) -> None:
    """RUN-4, RUN-6: version; the image is there after the engine was stopped and started by a mere question."""
    box.runtime.stop()
    assert box.runtime.status().state == "stopped"
    told = json.loads(docker("version", "--format", "{{json .}}"))
    assert (told["Server"]["Os"], told["Server"]["Version"]) == ("linux", box.runtime.status().version)
    assert docker("images", "--format", "{{.Repository}}:{{.Tag}}") == "box:latest"
    assert json.loads(docker("info", "--format", "{{json .}}"))["Driver"] == "overlay2"


def test_limpet_docker_is_the_stock_client_on_this_engine(box: Sandbox, docker: Docker, cli: Cli) -> None:
    """RUN-6: its output and its exit code; docker-env names the same engine for the clients of a shell."""
    done = cli("docker", box.name, "--", "run", "--rm", "box", "sh", "-c", "echo inside; exit 3")
    assert (done.returncode, done.stdout) == (3, "inside\n"), done.stderr
    assert box.docker_host in cli("docker-env", box.name).stdout


def test_run_carries_input_output_and_the_exit_code(docker: Docker) -> None:
    """RUN-6: megabytes through the hijacked stream and back, its input's end, stderr apart from stdout."""
    data = os.urandom(3 << 20)
    script = "cat; echo to stderr >&2; exit 7"
    done = docker.attempt("run", "--rm", "-i", "box", "sh", "-c", script, input=data)
    assert (done.returncode, done.stderr) == (7, b"to stderr\n")
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    assert docker("ps", "-aq", "--filter", "ancestor=box", "--filter", "status=exited") == ""


def test_run_at_a_terminal_knows_its_size_and_obeys_what_is_typed(docker: Docker) -> None:
    """RUN-6: run -it; the window's size at the start and later, an interrupt, the exit code."""
    with docker.at_terminal("run", "--rm", "-it", "box", "sh", rows=40, columns=120) as terminal:
        terminal.expect("# ")
        for rows, columns in ((40, 120), (20, 77)):
            terminal.resize(rows, columns)  # the client tells a moment later
            terminal.enter(f"until stty size | grep -x '{rows} {columns}'; do sleep 0.1; done\n")
            terminal.expect(f"\r\n{rows} {columns}\r\n")
        terminal.enter("sh -c 'echo asleep; sleep 1000'\n")  # ready for the interrupt when it says so
        terminal.expect("asleep\r\n")
        terminal.enter("\x03")
        terminal.expect("# ")
        terminal.enter("echo left by $?\n")
        terminal.expect("left by 130\r\n")
        terminal.enter("exit 5\n")
        assert terminal.wait() == 5


def test_a_dockerfile_of_three_steps_is_built_once(docker: Docker, tmp_path: Path) -> None:
    """RUN-6: build with a context of 8 MB; a second time everything is found."""
    (tmp_path / "payload").write_bytes(os.urandom(8 << 20))
    (tmp_path / "Dockerfile").write_bytes(_DOCKERFILE)
    docker("build", "-t", "built", str(tmp_path))
    told = docker("run", "--rm", "built")
    assert told.split()[0] == hashlib.sha256((tmp_path / "payload").read_bytes()).hexdigest()
    assert docker("build", "-t", "built", str(tmp_path)).count("Using cache") == 3


def test_a_volume_is_shared_by_containers_one_after_the_other(docker: Docker) -> None:
    """RUN-4, RUN-6: volume create, use, list and remove."""
    docker("volume", "create", "shelf")
    docker("run", "--rm", "-v", "shelf:/shelf", "box", "sh", "-c", "echo kept > /shelf/note")
    assert docker("run", "--rm", "-v", "shelf:/shelf:ro", "box", "cat", "/shelf/note") == "kept"
    docker("volume", "rm", "shelf")
    assert "shelf" not in docker("volume", "ls", "-q")


def test_containers_of_a_network_reach_each_other_by_name(docker: Docker, service: str) -> None:
    """RUN-3, RUN-6: bridge, veth, the engine's own name server; a container elsewhere does not know the name."""
    docker("network", "create", "yard")
    docker("network", "connect", "yard", service)
    asking = ("box", "wget", "-qO-", f"http://{service}/life")
    assert docker("run", "--rm", "--network", "yard", *asking).split() == life(docker)
    assert docker.attempt("run", "--rm", *asking).returncode != 0
    docker("network", "disconnect", "yard", service)
    docker("network", "rm", "yard")


def test_logs_are_followed_line_by_line_to_the_end(docker: Docker) -> None:
    """RUN-6: a line is there while its container lives; the client ends with it."""
    script = "echo one; until [ -e /go ]; do sleep 0.1; done; echo two"
    docker("run", "-d", "--name", "talker", "box", "sh", "-c", script)
    with docker.start("logs", "-f", "talker") as following:
        assert output(following).readline() == b"one\n"
        docker("exec", "talker", "touch", "/go")
        assert output(following).read() == b"two\n"
        assert following.wait(20) == 0
    docker("rm", "talker")


def test_files_are_copied_into_a_container_and_out_of_it(docker: Docker, service: str, tmp_path: Path) -> None:
    """RUN-6: cp of a tree both ways; nothing changes on the way."""
    source = tmp_path / "tree"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "data").write_bytes(os.urandom(1 << 20))
    (source / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (source / "run.sh").chmod(0o755)
    docker("cp", str(source), f"{service}:/srv/")
    assert docker("exec", service, "/srv/tree/run.sh") == "ran"
    docker("cp", f"{service}:/srv/tree", str(tmp_path / "back"))
    assert (tmp_path / "back" / "deep" / "data").read_bytes() == (source / "deep" / "data").read_bytes()


def test_exec_runs_beside_the_service(docker: Docker, service: str) -> None:
    """RUN-6: environment, directory, input and exit code of an exec."""
    words = ("exec", "-i", "-e", "WORD=hello", "-w", "/srv", service, "sh", "-c")
    done = docker.attempt(*words, "echo $WORD; pwd; cat; exit 3", input=b"typed\n")
    assert (done.returncode, done.stdout) == (3, b"hello\n/srv\ntyped\n")


def test_a_large_image_is_saved_removed_and_loaded(docker: Docker, tmp_path: Path) -> None:
    """RUN-6: save and load of 32 MB that cannot be compressed."""
    noise = os.urandom(32 << 20)
    docker("import", "-", "large", input=rootfs({"srv/noise": noise}))
    identity = docker("inspect", "-f", "{{.Id}}", "large")
    docker("save", "-o", str(tmp_path / "large.tar"), "large")
    docker("rmi", "large")
    docker("load", "-q", "-i", str(tmp_path / "large.tar"))
    assert docker("inspect", "-f", "{{.Id}}", "large") == identity
    told = docker("run", "--rm", "large", "sha256sum", "/srv/noise")
    assert told.split()[0] == hashlib.sha256(noise).hexdigest()
    docker("rmi", "large")


def test_events_are_told_as_they_happen(docker: Docker) -> None:
    """RUN-6: a stream that has no end of its own."""
    words = ("events", "--since", "10m", "--filter", "container=short", "--format", "{{.Action}}")
    with docker.start(*words) as events:
        docker("run", "--rm", "--name", "short", "box", "true")
        seen = []
        for line in output(events):
            seen.append(line.decode().strip())
            if seen[-1] == "destroy":
                break
        events.terminate()
    assert [action for action in seen if action in ("create", "start", "die")] == ["create", "start", "die"]


def test_a_containers_port_is_listed_and_published_on_the_host(
    box: Sandbox, docker: Docker, service: str, cli: Cli
) -> None:
    """RUN-6, issue 5: `limpet ports` knows it before it leads anywhere; then it is reached from this host."""
    [port] = box.runtime.ports()
    assert (port.container, port.image, port.guest, port.port, port.host) == (service, "box", _GUEST_PORT, 80, None)
    host = box.ports.publish(_GUEST_PORT).host
    try:
        assert [port.host for port in box.runtime.ports()] == [host]
        assert service in cli("ports", box.name).stdout
        with urllib.request.urlopen(f"http://127.0.0.1:{host}/life", timeout=10) as answer:
            assert answer.read().decode().split() == life(docker)
    finally:
        box.ports.remove(host)


def test_clients_that_are_killed_in_a_build_leave_nothing_behind(home: Path, docker: Docker, tmp_path: Path) -> None:
    """RUN-6: one in the upload of its context, one in a step; the engine answers and the daemon holds no connection."""
    docker("ps")
    descriptors = Path(f"/proc/{daemon_pid(home)}/fd")
    before = len(list(descriptors.iterdir()))
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        entry = tarfile.TarInfo("payload")
        entry.size = 4 << 20
        archive.addfile(entry, io.BytesIO(os.urandom(entry.size)))
    with docker.start("build", "-", stdin=subprocess.PIPE) as uploading:
        assert uploading.stdin is not None
        uploading.stdin.write(context.getvalue()[: 3 << 20])
        uploading.stdin.flush()
        uploading.kill()
    (tmp_path / "Dockerfile").write_text("FROM box\nRUN echo begun && sleep 1000\n")
    with docker.start("build", str(tmp_path)) as building:
        while (line := output(building).readline()).strip() != b"begun":
            assert line, "the build ended early"
        building.kill()
    wait_until(lambda: "sleep 1000" not in docker("ps", "--no-trunc", "--format", "{{.Command}}"))
    wait_until(lambda: len(list(descriptors.iterdir())) <= before)


def test_twenty_clients_at_once_are_all_answered(docker: Docker, service: str) -> None:
    """RUN-6: half of them ask, half of them run a command, none gets another's answer."""

    def one(number: int) -> bool:
        if number % 2:
            return docker("exec", service, "echo", str(number), timeout=120) == str(number)
        return docker("inspect", "-f", f"{{{{.Name}}}} {number}", service, timeout=120) == f"/{service} {number}"

    with concurrent.futures.ThreadPoolExecutor(20) as threads:
        assert all(threads.map(one, range(20)))


def test_a_service_is_back_with_its_data_after_stop_and_start(box: Sandbox, docker: Docker, service: str) -> None:
    """RUN-4, LIFE-5: containers end in order before the sandbox does, and start again without being asked for."""
    docker("exec", service, "sh", "-c", "echo stopped with this > /data/note")
    before = life(docker)
    assert box.stop().durability == "clean"
    assert not Path(box.docker_host.removeprefix("unix://")).exists()
    box.start()
    assert "service" in box.exec(["docker", "ps", "-a"], timeout=120).text  # the first command waits for the engine
    wait_until(lambda: box.runtime.status().state == "ready", 120)
    wait_until(lambda: running(docker, service), 60)
    assert docker("exec", service, "cat", "/data/note") == "stopped with this"
    assert life(docker) == [*before, "down", "up"]


@pytest.mark.parametrize("disk_only", [False, True], ids=["with its memory", "its disks alone"])
def test_a_service_is_back_with_its_data_after_a_restore(
    box: Sandbox, docker: Docker, service: str, disk_only: bool
) -> None:
    """RUN-4, FRZ-6: it goes on where it was, or starts on what it had written; later changes are gone."""
    docker("exec", service, "sh", "-c", f"echo {disk_only} > /data/note && sync")
    before = life(docker)
    saved = box.checkpoint(disk_only=disk_only)
    docker("exec", service, "sh", "-c", "echo later > /data/note")
    docker("rm", "-f", service)
    box.restore(saved.id, force=True)
    wait_until(lambda: running(docker, service), 120)
    assert docker("exec", service, "cat", "/data/note") == str(disk_only)
    assert life(docker) == ([*before, "up"] if disk_only else before)
