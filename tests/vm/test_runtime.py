"""The container runtime of a real guest: started, found, killed, stopped, kept over a boot; what it lacks is named.

The agent is asked directly, while no daemon runs; a boot is the daemon's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from limpet import Client, errors
from limpet.guest import Agent
from limpet.guest.runtime import Runtime
from limpet.models import RuntimeStatus
from limpet.paths import SandboxPaths, discover
from tests.conftest import leave_home, new_home
from tests.vm.kit import alone, connected

pytestmark = pytest.mark.vm

T = TypeVar("T")
_PATIENCE = 120.0  # seconds
_SERVICES = ["containerd", "dockerd"]

# An image of the agent's own busybox, and a container that writes down each of its starts.
_KEEPER = """
set -e
mkdir -p /tmp/root/bin /tmp/root/proc
cp /run/limpet/agent/bin/busybox /tmp/root/bin/
for applet in sh sleep cat echo; do ln -sf busybox /tmp/root/bin/$applet; done
tar -C /tmp/root -c . | docker import - tiny >/dev/null
docker run -d --name keeper --restart=always -v kept:/data -p 8080:80 tiny \
    sh -c 'echo started >> /data/starts; exec sleep 100000' >/dev/null
"""
_MODULE = "/lib/modules/$(uname -r)/kernel/fs/overlayfs/overlay.ko"
_BUSYBOX = "/run/limpet/agent/bin/busybox"


class Machine:
    """A sandbox of the image `docker`, with nobody talking to it."""

    def __init__(self, home: Path) -> None:
        self._home = home
        with Client(home=home) as client:
            box = client.sandboxes.create("engine", image="docker", memory_mib=1024, network="none")
            client.shutdown()
        self.files: SandboxPaths = discover(home).sandbox(box.info.id)

    def do(self, work: Callable[[Agent, Runtime], Awaitable[T]]) -> T:
        async def run() -> T:
            async with asyncio.timeout(_PATIENCE + 30), connected(self.files) as agent:
                return await work(agent, Runtime(agent))

        return asyncio.run(run())

    def boot(self) -> None:
        """A clean stop and a start."""
        with Client(home=self._home) as client:
            client.sandboxes.get("engine").restart()
            client.shutdown()


@pytest.fixture(scope="module")
def machine(pieces: Path) -> Iterator[Machine]:
    if not (pieces / "data" / "images" / "docker").is_dir():
        pytest.fail(f"no image 'docker' in {pieces}: LIMPET_HOME={pieces} limpet image build docker")
    home = new_home(pieces)
    try:
        yield Machine(home)
    finally:
        leave_home(home)


async def shell(agent: Agent, script: str) -> str:
    done = await agent.run(["sh", "-c", script], user="root", cwd="/", timeout=60)
    assert done.exit_code == 0, (script, done.stderr)
    return done.stdout.decode().strip()


async def becomes(runtime: Runtime, state: str) -> RuntimeStatus:
    deadline = time.monotonic() + _PATIENCE
    while (status := await runtime.status()).state != state:
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.5)
    return status


async def starts(agent: Agent, at_least: int) -> int:
    """How often the container has been started; waits for so many."""
    deadline = time.monotonic() + _PATIENCE
    while (found := int(await shell(agent, "cat /var/lib/docker/volumes/kept/_data/starts | wc -l"))) < at_least:
        assert time.monotonic() < deadline, await shell(agent, "docker ps -a")
        await asyncio.sleep(0.5)
    return found


def test_a_module_that_is_missing_is_named_and_a_retry_succeeds(machine: Machine) -> None:
    """RUN-1, RUN-3: cold; every stage is told; the second time nothing is started."""

    async def work(agent: Agent, runtime: Runtime) -> None:
        await runtime.stop(20, keep=False)
        assert (await runtime.status()).state == "stopped"
        assert (await runtime.ensure(start=False)).how == "not_ready"
        await shell(agent, f"{_BUSYBOX} rmmod overlay || true; {_BUSYBOX} mount --bind /dev/null {_MODULE}")
        with pytest.raises(errors.FailedPrecondition, match="cannot load overlay"):
            await runtime.ensure()
        failed = await runtime.status()
        assert failed.state == "failed" and failed.error and "overlay" in failed.error
        assert [service.state for service in failed.services] == ["not_ready", "not_ready"]
        await shell(agent, f"{_BUSYBOX} umount {_MODULE}")
        told: list[tuple[str, str]] = []
        found = await runtime.ensure(lambda stage, state, _detail: told.append((stage, state)))
        assert (found.how, found.started) == ("started", _SERVICES)
        stages = ("prerequisites", *_SERVICES)
        assert told == [(stage, state) for stage in stages for state in ("running", "done")]
        before = await runtime.status()
        assert (before.state, before.error, before.autostart) == ("ready", None, True)
        assert before.version and all(service.state == "ready" and service.pid for service in before.services)
        again = await runtime.ensure()
        assert (again.how, again.started) == ("reused", []) and again.seconds < 2
        assert (await runtime.status()).services == before.services

    machine.do(work)


def test_containers_run_on_the_data_disk_and_are_listed_with_their_ports(machine: Machine) -> None:
    """RUN-3, RUN-4: cgroups, network, storage; without a network card too."""

    async def work(agent: Agent, runtime: Runtime) -> None:
        await runtime.ensure()
        await shell(agent, _KEEPER)
        assert await starts(agent, 1) == 1
        mounts = await shell(agent, "cat /proc/self/mounts")
        for place in ("/var/lib/docker", "/var/lib/containerd"):
            assert any(line.split()[1:3] == [place, "btrfs"] for line in mounts.splitlines())
        assert "overlay2" in await shell(agent, "docker info --format '{{.Driver}}'")
        limits = await shell(agent, "grep 'open files' /proc/$(cat /var/run/docker.pid)/limits")
        assert "1048576" in limits
        assert await shell(agent, "cat /proc/$(cat /var/run/docker.pid)/oom_score_adj") != "-1000"
        [keeper] = await runtime.containers()
        assert (keeper.name, keeper.image, keeper.state) == ("keeper", "tiny", "running")
        assert {(bound.public, bound.private, bound.protocol) for bound in keeper.ports} == {(8080, 80, "tcp")}

    machine.do(work)


def test_a_killed_engine_is_seen_and_brought_back(machine: Machine) -> None:
    """RUN-2, RUN-3, RUN-5: kill -9; only what does not run is started; its containers come back; many ask at once."""

    async def work(agent: Agent, runtime: Runtime) -> None:
        await runtime.ensure()
        containerd, dockerd = (service.pid for service in (await runtime.status()).services)
        await shell(agent, f"kill -9 {dockerd}")
        while (seen := await runtime.status()).services[1].state == "error":  # it takes a moment to be gone
            assert seen.state == "degraded"
        assert seen.state == "degraded"
        assert [service.state for service in seen.services] == ["ready", "not_ready"]
        assert seen.services[1].reason == "socket exists but nobody listens"
        answers = await asyncio.gather(*(runtime.ensure() for _ in range(5)))
        assert {(found.how, *found.started) for found in answers} == {("started", "dockerd")}
        assert (await runtime.status()).services[0].pid == containerd
        before = await starts(agent, 2)
        now = await runtime.status()
        await shell(agent, "kill -9 " + " ".join(str(service.pid) for service in now.services))
        found = await runtime.ensure()
        assert (found.how, found.started) == ("started", _SERVICES)
        await starts(agent, before + 1)

    machine.do(work)


def test_a_silent_engine_is_an_error(machine: Machine) -> None:
    """RUN-5"""

    async def work(agent: Agent, runtime: Runtime) -> None:
        await runtime.ensure()
        pid = (await runtime.status()).services[1].pid
        await shell(agent, f"kill -STOP {pid}")
        seen = await runtime.status()
        await shell(agent, f"kill -CONT {pid}")
        assert (seen.state, seen.services[1].state) == ("degraded", "error")
        assert seen.services[1].reason == "socket exists but does not answer"
        assert (await becomes(runtime, "ready")).services[1].pid == pid

    machine.do(work)


def test_the_logs_of_both_are_kept(machine: Machine) -> None:
    """RUN-7"""

    async def work(_agent: Agent, runtime: Runtime) -> None:
        await runtime.ensure()
        for service in _SERVICES:
            whole = b"".join([piece async for piece in runtime.log(service, None)])
            last = b"".join([piece async for piece in runtime.log(service, 1)])
            assert whole.count(b"\n") > 5 and last.count(b"\n") == 1
            assert whole.endswith(last) or len(whole) > 100
        with pytest.raises(errors.BadRequest, match="is not a service"):
            await anext(runtime.log("../../etc/shadow", 1))

    machine.do(work)


def test_a_stop_that_keeps_it_holds_until_the_machine_goes_on(machine: Machine) -> None:
    """RUN-1: the stop ladder: nobody starts it meanwhile; cut off, it comes back with its containers."""

    async def work(agent: Agent, runtime: Runtime) -> None:
        await runtime.ensure()
        before = await starts(agent, 1)
        stopped = await runtime.stop(30, keep=True)
        assert (stopped.stopped, stopped.killed) == (["dockerd", "containerd"], [])
        assert await shell(agent, "cat /proc/[0-9]*/comm | grep -c -e dockerd -e containerd || true") == "0"
        with pytest.raises(errors.Unavailable, match="being stopped"):
            await runtime.ensure()
        began = time.monotonic()
        assert (await runtime.stop(30, keep=True)).stopped == []
        assert time.monotonic() - began < 5
        await runtime.go_on()
        await becomes(runtime, "ready")
        await starts(agent, before + 1)

    machine.do(work)


def test_it_comes_back_with_the_machine_and_so_do_its_containers(machine: Machine) -> None:
    """RUN-1, RUN-4: nobody asks for it after the boot; `--restart=always`; the volume has what was written."""

    async def before(agent: Agent, runtime: Runtime) -> int:
        await runtime.ensure()
        return await starts(agent, 1)

    async def after(agent: Agent, runtime: Runtime) -> int:
        await becomes(runtime, "ready")
        await starts(agent, count + 1)
        [keeper] = await runtime.containers()
        return int(keeper.state == "running")

    count = machine.do(before)
    machine.boot()
    assert machine.do(after) == 1


def test_a_killed_agent_leaves_the_engine_alone_and_knows_it_again(machine: Machine) -> None:
    """RUN-2: the services outlive the agent."""

    async def before(agent: Agent, runtime: Runtime) -> tuple[int, list[int | None]]:
        await runtime.ensure()
        pong = await agent.ping()
        pids = [service.pid for service in (await runtime.status()).services]
        await agent.exec_detached(["sh", "-c", f"sleep 1; kill -9 {pong.agent_pid}"], user="root", cwd="/")
        return pong.agent_starts, pids

    async def after(agent: Agent, runtime: Runtime) -> tuple[int, list[int | None]]:
        assert (await runtime.ensure()).how == "reused"
        return (await agent.ping()).agent_starts, [service.pid for service in (await runtime.status()).services]

    count, pids = machine.do(before)
    time.sleep(3)
    assert machine.do(after) == (count + 1, pids)


def test_a_stop_that_is_meant_to_last_does(machine: Machine) -> None:
    """RUN-1: over a boot; containers that do not end in time are killed."""

    async def before(agent: Agent, runtime: Runtime) -> None:
        await runtime.ensure()
        stopped = await runtime.stop(0, keep=False)
        assert stopped.killed == ["dockerd"]
        assert await shell(agent, "cat /sys/fs/cgroup/docker/*/cgroup.procs | wc -l") == "0"
        assert (await runtime.status()).state == "stopped"

    async def after(_agent: Agent, runtime: Runtime) -> None:
        await asyncio.sleep(2)
        status = await runtime.status()
        assert (status.state, status.autostart) == ("stopped", False)

    machine.do(before)
    machine.boot()
    machine.do(after)


def test_an_image_without_an_engine_is_told_apart_by_all_it_lacks(pieces: Path) -> None:
    """RUN-3: all programs are named at once, with the way out; the stop of such a machine costs nothing."""

    async def work(files: SandboxPaths) -> float:
        async with asyncio.timeout(60), connected(files) as agent:
            runtime = Runtime(agent)
            began = time.monotonic()
            assert (await runtime.stop(30, keep=True)).stopped == []
            seconds = time.monotonic() - began
            with pytest.raises(errors.FailedPrecondition, match=r"no dockerd, .*, runc, iptables") as caught:
                await runtime.ensure()
            assert caught.value.hint == "limpet create --image docker"
            assert (await runtime.status()).state == "unavailable"
            return seconds

    with alone(pieces, network="none") as files:
        assert asyncio.run(work(files)) < 0.5
