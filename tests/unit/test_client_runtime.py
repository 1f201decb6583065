"""The SDK's container runtimes against the real API over a stand-in guest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from limpet import AsyncClient, Client
from limpet.client import Sandbox
from limpet.errors import BadRequest, FailedPrecondition, NotFound
from limpet.models import Stage, State
from tests.contract.local_runtime import MISSING, PORTS

from .client_kit import StandIn, stand_in


@pytest.fixture(scope="module")
def daemon() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def web(daemon: StandIn) -> Iterator[Sandbox]:
    daemon.runtimes.ready.clear()
    with Client(daemon.home, autostart=False) as client:
        yield client.sandboxes.ref("web")


def test_ensure_tells_stages_and_what_it_did(web: Sandbox) -> None:
    """RUN-1"""
    seen: list[Stage] = []
    first = web.runtime.ensure(on_stage=seen.append)
    assert (first.how, first.started) == ("started", ["containerd", "dockerd"])
    assert [stage.name for stage in seen if stage.state == "done"] == ["prerequisites", "containerd", "dockerd"]
    assert web.runtime.ensure().how == "reused"


def test_ensure_that_fails_raises_what_is_missing_with_a_hint(daemon: StandIn, web: Sandbox) -> None:
    """RUN-3"""
    daemon.add("bare")
    with Client(daemon.home, autostart=False) as client, pytest.raises(FailedPrecondition, match=MISSING) as caught:
        client.sandboxes.ref("bare").runtime.ensure()
    assert caught.value.hint == "limpet create --image docker"
    daemon.add("off", State.STOPPED)
    with Client(daemon.home, autostart=False) as client, pytest.raises(FailedPrecondition, match="not running"):
        client.sandboxes.ref("off").runtime.ensure()


def test_status_logs_and_ports(web: Sandbox) -> None:
    """RUN-5, RUN-7"""
    assert (web.runtime.status().state, web.runtime.ports()) == ("stopped", [])
    web.runtime.ensure()
    status = web.runtime.status()
    assert (status.state, [service.state for service in status.services]) == ("ready", ["ready", "ready"])
    assert web.runtime.ports() == PORTS
    assert web.runtime.logs(tail=1) == b"dockerd line 999\n"
    assert web.runtime.logs("containerd").startswith(b"containerd line 0\n")
    with pytest.raises(NotFound, match="no service 'podman'"):
        web.runtime.logs("podman")  # type: ignore[arg-type]


def test_stop_tells_what_ended_and_what_was_killed(web: Sandbox) -> None:
    web.runtime.ensure()
    stopped = web.runtime.stop(timeout=0)
    assert (stopped.stopped, stopped.killed) == (["dockerd", "containerd"], ["dockerd"])
    assert web.runtime.stop().stopped == []
    with pytest.raises(BadRequest):
        web.runtime.stop(timeout=-1)


def test_docker_host_is_a_socket_of_this_sandbox_alone(daemon: StandIn) -> None:
    """RUN-6"""
    daemon.add("other")
    with Client(daemon.home, autostart=False) as client:
        with pytest.raises(FailedPrecondition, match="nothing is known"):
            _ = client.sandboxes.ref("web").docker_host
        hosts = {client.sandboxes.get(name).docker_host for name in ("web", "other")}
    assert len(hosts) == 2
    assert all(host.startswith("unix:///") and host.endswith("/docker.sock") for host in hosts)


def test_asynchronous_client_does_the_same(daemon: StandIn) -> None:
    async def use() -> tuple[str, str]:
        async with AsyncClient(daemon.home, autostart=False) as client:
            box = await client.sandboxes.get("web")
            await box.runtime.ensure()
            status = await box.runtime.status()
            await box.runtime.stop()
            return status.state, (await box.runtime.status()).state

    assert asyncio.run(use()) == ("ready", "stopped")
