"""What the agent does for a machine that goes on from memory: a new identity, and file systems that stand still.

Asked directly, over the channel, while no daemon runs.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from limpet.guest import Agent, Identity
from limpet.paths import SandboxPaths
from tests.vm.kit import alone, connected

pytestmark = pytest.mark.vm

_SHOW = """
cat /etc/machine-id /var/lib/dbus/machine-id /proc/sys/kernel/random/boot_id /etc/hostname; hostname
cat /sys/class/net/e*/address; grep -c boot_id /proc/self/mounts; ls /etc/ssh | grep -c test_key
head -c 16 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'; echo; grep 127.0.1.1 /etc/hosts; wc -l < /proc/net/route
"""
_FIELDS = [
    "machine_id",
    "dbus",
    "boot_id",
    "etc_hostname",
    "hostname",
    "mac",
    "mounts",
    "keys",
    "random",
    "ip",
    "hosts",
    "routes",
]


@pytest.fixture(scope="module")
def guest(pieces: Path) -> Iterator[SandboxPaths]:
    with alone(pieces) as files:
        yield files


async def shell(agent: Agent, script: str) -> str:
    done = await agent.run(["sh", "-c", script], user="root", cwd="/", timeout=20)
    assert done.exit_code == 0, done.stderr
    return done.stdout.decode()


def identity(number: int) -> Identity:
    network = {"address": "10.0.2.15/24", "gateway": "10.0.2.2", "dns": "10.0.2.3", "mac": f"52:54:00:00:00:0{number}"}
    return Identity(
        hostname=f"host{number}", machine_id=uuid.uuid4().hex, boot_id=str(uuid.uuid4()), entropy=os.urandom(64).hex(),
        network=network,
    )  # fmt: skip


def test_renewal_makes_a_guest_somebody_else_as_often_as_asked(guest: SandboxPaths) -> None:
    """GST-3: ids, names, keys, network and entropy; a clock that was years off; commands run on."""

    async def check() -> None:
        async with connected(guest) as agent:
            await shell(agent, "mkdir -p /etc/ssh /var/lib/dbus; rm -f /var/lib/dbus/machine-id; "
                               "cp /etc/machine-id /var/lib/dbus/")  # fmt: skip
            running = await agent.exec_detached(["sleep", "600"])
            randoms: set[str] = set()
            for number in (1, 2, 3):
                await shell(agent, "echo old > /etc/ssh/ssh_host_test_key; date -s 2020-01-01 >/dev/null")
                me = identity(number)
                await agent.renew(me)
                assert abs(await agent.check_clock()) <= 0.1
                found = dict(zip(_FIELDS, (await shell(agent, _SHOW + "true")).split(), strict=True))
                randoms.add(found.pop("random"))
                assert int(found.pop("routes")) >= 3  # a heading, the net and the default route
                assert found == {
                    "machine_id": me.machine_id, "dbus": me.machine_id, "boot_id": me.boot_id,
                    "etc_hostname": me.hostname, "hostname": me.hostname, "mac": f"52:54:00:00:00:0{number}",
                    "mounts": "1", "keys": "0", "ip": "127.0.1.1", "hosts": me.hostname,
                }  # fmt: skip
                assert (await agent.ping()).boot_id == me.boot_id
            assert len(randoms) == 3
            assert (await agent.get_exec(running.id)).running
        async with connected(guest) as agent:  # a new host finds the commands of the old one
            assert (await agent.get_exec(running.id)).running
            await agent.signal(running.id, "KILL")
            assert "Z" not in await shell(agent, "sleep 0.3; ps -eo stat= | cut -c1 | sort -u")

    asyncio.run(asyncio.wait_for(check(), 60))


def test_a_clock_that_drifted_is_found_and_set(guest: SandboxPaths) -> None:
    """GST-3: as after a sleep of the host."""

    async def check() -> None:
        async with connected(guest) as agent:
            await shell(agent, "date -s @$(($(date +%s) - 100)) >/dev/null")
            assert -102 < await agent.check_clock() < -98
            assert abs(await agent.check_clock()) < 0.1

    asyncio.run(asyncio.wait_for(check(), 30))


def test_frozen_file_systems_hold_writers_until_the_thaw_or_the_time_is_over(guest: SandboxPaths) -> None:
    """FRZ-1: nothing on either disk changes; the agent answers; a host that never thaws freezes nothing for good."""

    async def check() -> None:
        async with connected(guest) as agent:
            frozen = await agent.freeze(10)
            assert "/" in frozen
            assert len(frozen) >= 2
            late = [
                asyncio.create_task(shell(agent, f"echo late > {path}; cat {path}")) for path in ("/srv/l", "/home/l")
            ]
            await asyncio.sleep(0.7)
            assert not any(task.done() for task in late)
            assert (await agent.ping(timeout=2)).data == "ready"
            assert await agent.thaw()
            assert await asyncio.gather(*late) == ["late\n"] * 2
            assert not await agent.thaw()
            began = time.monotonic()
            await agent.freeze(1.0)
            assert await shell(agent, "echo x > /srv/l; cat /srv/l") == "x\n"
            assert time.monotonic() - began > 0.8
            assert not await agent.thaw()  # the host learns that what it took is of no single instant

    asyncio.run(asyncio.wait_for(check(), 60))


@pytest.mark.parametrize(("freeze", "writes"), [(25, False), (4, True)])
def test_an_agent_that_is_killed_leaves_nothing_frozen(guest: SandboxPaths, freeze: float, writes: bool) -> None:
    """FRZ-1, GST-9: the next agent thaws, long before the time is over. One that hangs in a write cannot even be
    killed before: then PID 1 thaws when it is."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(600):
            yield b"z" * 65536
            await asyncio.sleep(0.01)

    async def check() -> None:
        async with connected(guest) as agent:
            pong = await agent.ping()
            await agent.exec_detached(["sh", "-c", f"sleep 1.5; kill -9 {pong.agent_pid}"], user="root", cwd="/")
            upload = asyncio.create_task(agent.write_file("/var/tmp/big", pieces())) if writes else None
            await asyncio.sleep(0.3)
            began = time.monotonic()
            await agent.freeze(freeze)
            await asyncio.sleep(2)
            if upload:
                upload.cancel()
                await asyncio.gather(upload, return_exceptions=True)
        async with connected(guest) as agent:
            assert (await agent.ping()).agent_starts == pong.agent_starts + 1
            assert await shell(agent, "echo y > /var/tmp/y && sync && cat /var/tmp/y") == "y\n"
            assert time.monotonic() - began < 15

    asyncio.run(asyncio.wait_for(check(), 60))
