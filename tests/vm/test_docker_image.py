"""The image `docker`: its template has a running engine, `docker compose` works in the guest, and a commit takes the
engine's data along."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Client
from limpet.client import Sandbox
from tests.conftest import leave_home, new_home
from tests.vm.kit import command_line, shell

pytestmark = pytest.mark.vm

_COMPOSE = """
services:
  counter:
    image: box
    command: ["sh", "-c", "echo counted >> /data/count; sleep 600"]
    restart: always
    volumes: ["numbers:/data"]
volumes:
  numbers:
"""


@pytest.fixture(scope="module")
def engine(pieces: Path) -> Iterator[Client]:
    """A home with templates of its own; the one of the image `docker` is there."""
    home = new_home(pieces)
    (home / "cache").unlink()
    (home / "cache").mkdir(mode=0o700)
    for name in ("artifacts", "pieces"):
        (home / "cache" / name).symlink_to(pieces / "cache" / name)
    try:
        with Client(home=home) as client:
            client.images.build("docker")
            client.config.set("template.auto", "off")
            client.templates.build("docker", network="none")
            yield client
    finally:
        leave_home(home)


@pytest.fixture(scope="module")
def box(engine: Client) -> Sandbox:
    return engine.sandboxes.create("engine", image="docker", network="none")


def test_sandbox_from_a_template_has_a_running_engine(engine: Client, box: Sandbox) -> None:
    """RUN-1, GST-3: nothing is started, and asking takes no time."""
    assert "templates" in command_line(box)
    assert box.info.spec.memory_mib == 1024
    found = box.runtime.ensure()
    assert (found.how, found.started) == ("reused", [])
    assert found.seconds < 1
    assert box.runtime.status().autostart
    assert shell(box, "docker version --format '{{.Server.Version}}'", "user").strip() == box.runtime.status().version


def test_compose_works_in_the_guest(box: Sandbox) -> None:
    """RUN-3: as `docker compose` and as `docker-compose`, for the user, without a network."""
    shell(box, "cd / && tar -c run/limpet/agent/bin/busybox --transform 's,.*/,bin/,' | docker import - base", "root")
    dockerfile = 'FROM base\\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\\n'
    shell(box, f"mkdir -p /workspace/app && cd /workspace/app && printf '{dockerfile}' | docker build -t box -", "user")
    box.files.write("/workspace/app/compose.yaml", _COMPOSE.encode())
    compose = "cd /workspace/app && docker compose"
    shell(box, f"{compose} up -d 2>&1", "user")
    assert "Up" in shell(box, f"{compose} ps", "user")
    assert shell(box, f"{compose} exec -T counter cat /data/count", "user") == "counted\n"
    assert "counter" in shell(box, "cd /workspace/app && docker-compose config --services", "user")
    assert "compose" in shell(box, "docker info --format '{{.ClientInfo.Plugins}}'", "user")


def test_commit_takes_images_volumes_and_containers_along(engine: Client, box: Sandbox) -> None:
    """RUN-4, FRZ-3: and leaves out who the engine was."""
    before = shell(box, "docker info --format '{{.ID}}'")
    box.commit("test-engine")
    box.remove(force=True, purge=True)
    copy = engine.sandboxes.create("copy", image="test-engine", network="none")
    try:
        assert copy.runtime.ensure().how in ("started", "reused")
        assert shell(copy, "docker info --format '{{.ID}}'") != before
        assert shell(copy, "docker run --rm box echo here") == "here\n"
        assert set(shell(copy, "docker exec app_counter_1 cat /data/count").split()) == {"counted"}
    finally:
        copy.remove(force=True, purge=True)
        engine.images.remove("test-engine")
