"""The volumes of a real guest: what is noticed, what a snapshot holds, what is sent, and what is left behind.

The agent is asked directly, while no daemon runs.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from limpet import errors
from limpet.guest import Agent
from limpet.guest.execs import GuestExec
from limpet.guest.volumes import NamedSnapshot, Volumes
from limpet.paths import SandboxPaths
from tests.vm.kit import alone, connected

pytestmark = pytest.mark.vm

_PAYLOAD = "payload-0a1b2c3d"
_TOP = "/run/limpet/data"

# Does what it is told, line by line, to files that were there and on the disk before.
_ACTOR = """
import mmap, os, sys
os.makedirs("/home/user/t/d", exist_ok=True)
os.chdir("/home/user/t")
for name in ("open", "mapped", "renamed", "mode", "gone", "attributed", "read"):
    with open(name, "wb") as file:
        file.write(bytes(8192))
f, g = os.open("open", os.O_RDWR), os.open("mapped", os.O_RDWR)
m = mmap.mmap(g, 8192)
m[0:1] = b"a"
os.sync()
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
_CHANGES = {
    "os.pwrite(f, b'x', 5000)": 1.0,
    "os.rename('renamed', 'd/renamed')": 1.0,
    "os.chmod('mode', 0o600)": 1.0,
    "os.unlink('gone')": 1.0,
    "os.mkdir('made')": 1.0,
    "os.setxattr('attributed', 'user.a', b'1')": 1.0,
    "os.pwrite(os.open('/workspace/w', os.O_RDWR | os.O_CREAT), b'x', 0)": 1.0,
    "m[5000:5001] = b'z'": 4.0,  # no system call: seen after the writeback
}

# 40 files, always; moved back and forth. And two files, of which the second is never ahead of the first.
_STORM = """
import os
os.makedirs("/home/user/s/a"); os.makedirs("/home/user/s/b"); os.chdir("/home/user/s")
for n in range(40):
    open(f"a/{n}", "w").close()
first, second = (os.open(name, os.O_RDWR | os.O_CREAT) for name in ("first", "second"))
for n in range(40): os.pwrite(first, b"%08d" % 0, 0), os.pwrite(second, b"%08d" % 0, 0)
print("ready", flush=True)
number = 0
while True:
    number += 1
    os.pwrite(first, b"%08d" % number, 0)
    for n in range(40):
        os.rename(f"{'ab'[number % 2 - 1]}/{n}", f"{'ab'[number % 2]}/{n}")
    os.pwrite(second, b"%08d" % number, 0)
"""


@pytest.fixture(scope="module")
def guest(pieces: Path) -> Iterator[SandboxPaths]:
    with alone(pieces, network="none") as files:
        yield files


@asynccontextmanager
async def running(agent: Agent, script: str) -> AsyncIterator[GuestExec]:
    """A script in the guest that has said that it is ready."""
    process = await agent.exec(["python3", "-c", script], user="root", cwd="/", stdin=True)
    try:
        await said(process)
        yield process
    finally:
        await agent.signal(process.id, "KILL")
        await process.detach()


async def said(process: GuestExec) -> None:
    async for event in process.events():
        assert b"Error" not in getattr(event, "data", b""), event
        if b"\n" in getattr(event, "data", b""):
            return
    raise AssertionError("the script ended")


async def shell(agent: Agent, script: str) -> str:
    done = await agent.run(["sh", "-c", script], user="root", cwd="/", timeout=60)
    assert done.exit_code == 0, done.stderr
    return done.stdout.decode()


def since(snapshots: dict[str, NamedSnapshot]) -> dict[str, int]:
    return {name: snapshot.ctransid for name, snapshot in snapshots.items()}


def token() -> str:
    return uuid.uuid4().hex[:12]


async def sent(volumes: Volumes, name: str, token: str, parent: str | None = None, *, data: bool = True) -> bytes:
    return b"".join([piece async for piece in volumes.send(name, token, parent, data=data)])


def within(seconds: float, work: AsyncIterator[None] | object) -> None:
    asyncio.run(asyncio.wait_for(work, seconds))  # type: ignore[arg-type]


def test_every_kind_of_change_is_noticed_and_reading_is_not(guest: SandboxPaths) -> None:
    """D4: promptly for what system calls do, within 4 s for stores through a memory map."""

    async def check() -> None:
        async with connected(guest) as agent, running(agent, _ACTOR) as actor:
            volumes = Volumes(agent)
            late = {}
            for change, limit in _CHANGES.items():
                taken = await volumes.snapshot(["home", "workspace"], token())
                watch = asyncio.create_task(volumes.watch(since(taken), timeout=10))
                await asyncio.sleep(0.2)
                assert not watch.done(), f"before {change}: {watch}"
                began = time.monotonic()
                await actor.send_stdin(change.encode() + b"\n")
                assert await watch == ["workspace" if "/workspace" in change else "home"], change
                if time.monotonic() - began > limit:
                    late[change] = time.monotonic() - began
                await said(actor)
            assert not late
            taken = await volumes.snapshot(["home", "workspace"], token())
            await actor.send_stdin(b"open('read', 'rb').read(), os.listdir('d'), os.stat('mode')\n")
            assert await volumes.watch(since(taken), timeout=3) == []
            # what came between a snapshot and the question is noticed at once
            taken = await volumes.snapshot(["home", "workspace"], token())
            await actor.send_stdin(b"os.pwrite(f, b'y', 6000)\n")
            await said(actor)
            await said(actor)
            assert await volumes.watch(since(taken), timeout=0.5) == ["home"]

    within(90, check())


def test_a_new_watch_takes_the_place_of_the_one_before(guest: SandboxPaths) -> None:
    """D4: a host that lost track is not told twice."""

    async def check() -> None:
        async with connected(guest) as agent:
            volumes = Volumes(agent)
            taken = since(await volumes.snapshot(["home"], token()))
            first = asyncio.create_task(volumes.watch(taken))
            await asyncio.sleep(0.3)
            assert await volumes.watch(taken, timeout=0.5) == []
            with pytest.raises(errors.Busy):
                await first

    within(30, check())


def test_a_snapshot_is_one_instant_of_a_tree_in_full_flight(guest: SandboxPaths) -> None:
    """D3: no file is missing or there twice, and no effect is there without its cause."""

    async def check() -> None:
        async with connected(guest) as agent, running(agent, _STORM):
            volumes = Volumes(agent)
            tokens = []
            for _ in range(6):
                tokens.append(token())
                await volumes.snapshot(["home"], tokens[-1])
                await asyncio.sleep(0.1)
            found = []
            for each in tokens:
                at = f"{_TOP}/.snapshots/home.{each}/user/s"
                count, first, second = (
                    await shell(agent, f"ls {at}/a {at}/b | grep -c '^[0-9]'; cat {at}/first; echo; cat {at}/second")
                ).split()
                assert int(count) == 40
                assert int(first) - int(second) in (0, 1)
                found.append(int(first))
            assert found == sorted(found)
            assert found[0] < found[-1]
            await volumes.forget("home")

    within(60, check())


def test_only_what_changed_is_sent_and_only_what_is_kept_stays(guest: SandboxPaths) -> None:
    """D4: a difference is as large as the change; without data it is smaller still; what is forgotten is gone."""

    async def check() -> None:
        async with connected(guest) as agent:
            volumes = Volumes(agent)
            await volumes.forget("home")
            await shell(agent, "mkdir -p /home/user/i; head -c 3M /dev/urandom > /home/user/i/big; "
                               "echo before-the-change > /home/user/i/small")  # fmt: skip
            first = (await volumes.snapshot(["home"], "first"))["home"]
            whole = await sent(volumes, "home", "first")
            assert whole.startswith(b"btrfs-stream\0\x01\0\0\0")
            assert uuid.UUID(first.uuid).bytes in whole
            assert b"before-the-change" in whole
            assert len(whole) > 3 << 20
            await shell(agent, "printf after-the-change > /home/user/i/small; cp --reflink=always /home/user/i/big "
                               "/home/user/i/copy")  # fmt: skip
            await volumes.snapshot(["home"], "second")
            change = await sent(volumes, "home", "second", "first")
            assert uuid.UUID(first.uuid).bytes in change
            assert b"after-the-change" in change
            assert len(change) < 8192  # not the reflink either
            outline = await sent(volumes, "home", "second", "first", data=False)
            assert b"after-the-change" not in outline
            with pytest.raises(errors.NotFound, match="no snapshot 'third'"):
                await sent(volumes, "home", "third", "first")
            with pytest.raises(errors.AlreadyExists, match=r"home\.second"):
                await volumes.snapshot(["workspace", "home"], "second")
            assert await volumes.forget("home", ["second"]) == ["first"]
            assert [s.token for v in await volumes.state() if v.name == "home" for s in v.snapshots] == ["second"]
            assert not [
                s for v in await volumes.state() if v.name == "workspace" for s in v.snapshots if s.token == "second"
            ]

    within(60, check())


def test_a_send_that_is_broken_off_leaves_nothing_hanging(guest: SandboxPaths) -> None:
    """D3: neither thread nor pipe nor a snapshot that cannot be deleted; whether the host lost interest or is gone."""

    async def leftovers(agent: Agent) -> str:
        pid = (await agent.ping()).agent_pid
        return await shell(agent, f"ls /proc/{pid}/task | wc -l; ls -l /proc/{pid}/fd | grep -c pipe:")

    async def check() -> None:
        async with connected(guest) as agent:
            volumes = Volumes(agent)
            await volumes.snapshot(["home"], "before")
            before = await leftovers(agent)
            await shell(agent, "head -c 30M /dev/urandom > /home/user/large")
            await volumes.snapshot(["home"], "large")
            async for _piece in (stream := volumes.send("home", "large", "before")):
                break
            await stream.aclose()
        async with connected(guest) as agent:
            async for _piece in Volumes(agent).send("home", "large", "before"):
                break  # and the channel goes
        async with connected(guest) as agent:
            volumes = Volumes(agent)
            await asyncio.sleep(1)
            assert await leftovers(agent) == before
            assert set(await volumes.forget("home")) >= {"before", "large"}
            await shell(agent, "rm /home/user/large")

    within(60, check())


def test_a_payloads_volume_comes_is_used_and_goes(guest: SandboxPaths) -> None:
    """PAY-1: at its place, as often as asked; never over something else; not away from under a process."""

    async def check() -> None:
        async with connected(guest) as agent:
            volumes = Volumes(agent)
            place = "/home/user/out put/deep"
            assert await volumes.create(_PAYLOAD, place, uid=1000, gid=1000)
            assert not await volumes.create(_PAYLOAD, place)
            found = {volume.name: volume for volume in await volumes.state()}
            assert (found[_PAYLOAD].mount, found["home"].mount, found["workspace"].mount) == (
                place, "/home", "/workspace",
            )  # fmt: skip
            assert await shell(agent, f"stat -c %u '{place}'; echo x > '{place}/f'") == "1000\n"
            with pytest.raises(errors.FailedPrecondition, match="mounted at"):
                await volumes.create(_PAYLOAD, "/home/user/elsewhere")
            with pytest.raises(errors.FailedPrecondition, match="is not empty"):
                await volumes.create("payload-ffffffff", "/usr")
            taken = await volumes.snapshot(["home", _PAYLOAD], "p")
            assert b"f" in await sent(volumes, _PAYLOAD, "p")
            watch = asyncio.create_task(volumes.watch(since(taken), timeout=10))
            await asyncio.sleep(0.2)
            await shell(agent, f"echo y >> '{place}/f'")
            assert await watch == [_PAYLOAD]
            user = await agent.exec_detached(["sleep", "60"], cwd=place)
            with pytest.raises(errors.FailedPrecondition, match=rf"in use by sleep \({user.pid}\)"):
                await volumes.remove(_PAYLOAD)
            await agent.signal(user.id, "KILL")
            await agent.wait(user.id, 10)
            assert await volumes.remove(_PAYLOAD)
            assert not await volumes.remove(_PAYLOAD)
            assert await shell(agent, f"ls -A '{place}'; ls {_TOP}/.snapshots | grep -c payload || true") == "0\n"

    within(60, check())


def test_the_agents_death_changes_nothing_about_volumes(guest: SandboxPaths) -> None:
    """GST-9, PAY-1: mounts stay, the next agent goes on from the same snapshots; the watch ends with an error."""

    async def check() -> None:
        async with connected(guest) as agent:
            volumes = Volumes(agent)
            await volumes.create(_PAYLOAD, "/home/user/kept")
            taken = await volumes.snapshot(["home", _PAYLOAD], "kept")
            watch = asyncio.create_task(volumes.watch(since(taken)))
            await asyncio.sleep(0.3)
            before = await volumes.state()
            pong = await agent.ping()
            kill = f"sleep 0.3; kill -9 {pong.agent_pid}"
            await agent.exec_detached(["sh", "-c", kill], user="root", cwd="/")
            with pytest.raises(errors.LimpetError):
                await asyncio.wait_for(watch, 10)
        async with connected(guest) as agent:
            volumes = Volumes(agent)
            assert (await agent.ping()).agent_starts == pong.agent_starts + 1
            assert json.dumps([v.model_dump() for v in await volumes.state()]) == json.dumps(
                [v.model_dump() for v in before]
            )
            await shell(agent, "echo on > /home/user/kept/f")
            assert await volumes.watch(since(taken), timeout=5) == [_PAYLOAD]
            await volumes.snapshot([_PAYLOAD], "next")
            assert b"on\n" in await sent(volumes, _PAYLOAD, "next", "kept")
            assert await volumes.remove(_PAYLOAD)

    within(60, check())


def test_a_frozen_file_system_makes_a_snapshot_wait(guest: SandboxPaths) -> None:
    """FRZ-1: a sync amid a checkpoint fails nothing."""

    async def check() -> None:
        async with connected(guest) as agent:
            await agent.freeze(10)
            late = asyncio.create_task(Volumes(agent).snapshot(["home"], token()))
            await asyncio.sleep(0.5)
            assert not late.done()
            assert await agent.thaw()
            assert "home" in await asyncio.wait_for(late, 10)

    within(30, check())
