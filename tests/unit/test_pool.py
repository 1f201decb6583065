"""The warm pool: who gets a VM, when one is made, and that none is left over. The VMs are stand-ins here; real ones are
in tests/vm."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from limpet.errors import AlreadyExists, LimpetError, Unavailable
from limpet.models import SandboxSpec, State
from limpet.services import capacity, pool
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.pool import Pool
from limpet.services.starting import Starter
from limpet.services.templates import Templates
from limpet.store import SandboxRecord
from limpet.vmm.machine import Machine
from tests.unit import services_kit as kit


@dataclass
class FakeMachine:
    """A QEMU as far as the pool talks to it."""

    running: bool = True
    lives: bool = True
    pid: int = 1
    accel: str = "tcg"

    async def qmp(self, command: str, **_arguments: object) -> None:
        self.running = {"stop": False, "cont": True}[command]

    def alive(self) -> bool:
        return self.lives

    async def end(self, *, patience: float) -> str:
        await asyncio.sleep(0)
        self.lives = False
        return "quit"

    async def close(self) -> None:
        pass


class FakeVM(LiveVM):
    """Its guest answers at once, unless it is told to be silent."""

    silent = False
    asked: list[object]

    async def agent(self, timeout: float = 1.0) -> Any:
        if self.silent:
            raise Unavailable("the guest's agent did not answer")

        async def answer(*words: object, **_options: object) -> None:
            self.asked = [*getattr(self, "asked", []), *words]

        return SimpleNamespace(run=answer, renew=answer)


@dataclass
class World:
    """The pool's neighbours. `made` are the VMs that it had made."""

    host: Host
    built: dict[str, bool] = field(default_factory=lambda: {"base": True})
    made: list[FakeVM] = field(default_factory=list)
    missed_shapes: list[SandboxSpec] = field(default_factory=list)
    broken: LimpetError | None = None
    version: int = 1

    async def key(self, spec: SandboxSpec) -> str:
        await asyncio.sleep(0)
        return f"{spec.image} {spec.vcpus} {spec.memory_mib} {spec.network} {self.version}"

    async def find(self, spec: SandboxSpec) -> Any:
        return SimpleNamespace(key=await self.key(spec)) if self.built.get(spec.image) else None

    def missed(self, spec: SandboxSpec) -> None:
        self.missed_shapes.append(spec)

    async def from_template(self, record: SandboxRecord, _template: object, _stages: Stages) -> LiveVM:
        await asyncio.sleep(0)
        if self.broken is not None:
            raise self.broken
        vm = FakeVM(record.id, cast(Machine, FakeMachine()), self.host.paths.sandbox(record.id))
        self.host.live.add(vm)
        self.host.records.update(record.id, disks={"root": "ly_x"}, incarnation=1)
        self.made.append(vm)
        return vm


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(pool, "_QUIET_S", 0.005)
    monkeypatch.setattr(capacity, "fitting", lambda _paths, _spec: 100)
    with kit.host_in(tmp_path) as host:
        yield World(host)


def run(world: World, work: Callable[[Pool], Awaitable[None]]) -> None:
    async def main() -> None:
        made = Pool(world.host, cast(Starter, world), cast(Templates, world))
        async with asyncio.timeout(20):
            await work(made)
        await made.close()
        assert len(world.host.records.everything()) == len(world.host.records.all())  # nothing hidden is left

    asyncio.run(main())


async def size(world: World, count: int | str) -> None:
    await world.host.config.set("pool.size", str(count))


async def full(pool: Pool) -> None:
    """Wait until it has all that it wants."""
    assert pool._filling is not None
    await pool._filling


def hidden(host: Host) -> list[SandboxRecord]:
    return [record for record in host.records.everything() if record.name.startswith("+")]


NONE = Stages(lambda _stages: None)


def test_a_pool_is_off_until_it_is_asked_for(world: World) -> None:
    """Issue 3, item 2: "off by default"."""

    async def work(pool: Pool) -> None:
        assert await pool.claim("box", SandboxSpec()) is None
        pool.refill()
        await full(pool)
        assert world.made == [] and hidden(world.host) == []

    run(world, work)


def test_pooled_vms_have_run_a_command_and_stand_still_unseen(world: World) -> None:
    """Issue 3, item 2: N restored, paused VMs that have already run one command."""

    async def work(pool: Pool) -> None:
        await size(world, 3)
        await full(pool)
        assert [record.state for record in hidden(world.host)] == [State.POOLED] * 3
        assert [vm.machine.running for vm in world.made] == [False] * 3  # type: ignore[attr-defined]
        assert all(vm.asked for vm in world.made)
        assert world.host.records.all() == []  # `ls` does not show them

    run(world, work)
    assert not any(vm.machine.alive() for vm in world.made)
    assert list(world.host.paths.sandboxes.iterdir()) == []


def test_a_create_takes_one_which_becomes_the_sandbox_and_another_is_made(world: World) -> None:
    """Issue 3, item 2: "create takes one in milliseconds; refilled in the background"."""

    async def work(pool: Pool) -> None:
        await size(world, 1)
        await full(pool)
        spec = SandboxSpec(env={"A": "1"}, labels={"x": "y"})
        claimed = await pool.claim("box", spec)
        assert claimed is not None and (claimed.name, claimed.spec) == ("box", spec)
        assert (claimed.state, claimed.incarnation) == (State.CREATING, 0)
        vm = await pool.wake(claimed, NONE)
        found = world.host.records.by_name("box")
        assert vm is world.made[0] and found.state is State.RUNNING
        assert found.incarnation == 1 and found.boot_id and found.started_at
        await full(pool)
        assert len(world.made) == 2 and len(hidden(world.host)) == 1

    run(world, work)
    assert world.made[0].machine.alive() and not world.made[1].machine.alive()


def test_creates_at_once_never_get_the_same_vm(world: World) -> None:
    async def work(pool: Pool) -> None:
        await size(world, 3)
        await full(pool)
        found = await asyncio.gather(*(pool.claim(f"box-{number}", SandboxSpec()) for number in range(5)))
        ids = [record.id for record in found if record is not None]
        assert len(ids) == len(set(ids)) == 3

    run(world, work)


@pytest.mark.parametrize(
    "changes", [{"image": "other"}, {"vcpus": 3}, {"memory_mib": 768}, {"network": "none"}], ids=str
)
def test_a_vm_of_another_shape_is_not_taken_and_the_pool_follows(world: World, changes: dict[str, Any]) -> None:
    """It stands for the shape that was created last."""
    world.built["other"] = True

    async def work(pool: Pool) -> None:
        await size(world, 1)
        await full(pool)
        spec = SandboxSpec(**changes)
        assert await pool.claim("box", spec) is None
        await full(pool)
        assert not world.made[0].machine.alive() and len(hidden(world.host)) == 1
        assert await pool.claim("box", spec) is not None

    run(world, work)


def test_a_vm_of_a_template_that_is_out_of_date_is_not_taken(world: World) -> None:
    """Issue 3, item 1: the image was made anew under the same name."""

    async def work(pool: Pool) -> None:
        await size(world, 1)
        await full(pool)
        world.version = 2
        assert await pool.claim("box", SandboxSpec()) is None

    run(world, work)


def test_a_name_that_is_taken_costs_no_vm(world: World) -> None:
    """VM-7"""
    kit.add_sandbox(world.host, "box")

    async def work(pool: Pool) -> None:
        await size(world, 1)
        await full(pool)
        with pytest.raises(AlreadyExists):
            await pool.claim("box", SandboxSpec())
        assert len(hidden(world.host)) == 1
        assert await pool.claim("other", SandboxSpec()) is not None

    run(world, work)


def test_a_vm_that_died_in_the_pool_is_not_given_to_anybody(world: World) -> None:
    """Killed by the host's OOM killer, for example."""

    async def work(pool: Pool) -> None:
        await size(world, 2)
        await full(pool)
        dead = world.made[0]
        cast(FakeMachine, dead.machine).lives = False
        claimed = await pool.claim("box", SandboxSpec())
        assert claimed is not None and claimed.id == world.made[1].sandbox_id
        assert world.host.records.find(dead.sandbox_id) is None and world.host.live.get(dead.sandbox_id) is None
        assert not world.host.paths.sandbox(dead.sandbox_id).root.exists()

    run(world, work)


def test_a_create_that_ends_a_dead_vm_does_not_take_what_another_took_meanwhile(world: World) -> None:
    async def work(pool: Pool) -> None:
        await size(world, 2)
        await full(pool)
        cast(FakeMachine, world.made[0].machine).lives = False
        found = await asyncio.gather(*(pool.claim(f"box-{number}", SandboxSpec()) for number in range(3)))
        [claimed] = [record for record in found if record is not None]
        assert world.host.records.by_id(world.made[1].sandbox_id).name == claimed.name

    run(world, work)


def test_a_vm_that_does_not_wake_is_ended_and_the_create_goes_on_without_it(world: World) -> None:
    """Told in the events; the row stays, without the disks that were the VM's."""

    async def work(pool: Pool) -> None:
        await size(world, 1)
        await full(pool)
        claimed = await pool.claim("box", SandboxSpec())
        assert claimed is not None
        world.made[0].silent = True
        assert await pool.wake(claimed, NONE) is None
        assert not world.made[0].machine.alive() and world.host.live.get(claimed.id) is None
        assert world.host.records.by_name("box").disks is None
        assert [event.kind for event in world.host.records._store.events_after(0)] == ["pool.failed"]
        assert await pool.wake(claimed, NONE) is None  # not a pooled one any more

    run(world, work)


def test_a_sandbox_of_its_own_is_not_woken(world: World) -> None:
    async def work(pool: Pool) -> None:
        assert await pool.wake(kit_record, NONE) is None

    kit_record = kit.add_sandbox(world.host)
    run(world, work)


def test_a_smaller_size_takes_effect_at_once(world: World) -> None:
    async def work(pool: Pool) -> None:
        await size(world, 3)
        await full(pool)
        await size(world, 1)
        await full(pool)
        assert len(hidden(world.host)) == sum(vm.machine.alive() for vm in world.made) == 1
        await size(world, 0)
        await full(pool)
        assert hidden(world.host) == []

    run(world, work)


def test_an_adaptive_pool_grows_with_what_is_wanted_and_has_a_bound(world: World) -> None:
    """Issue 3, item 2: "adaptive when `auto`"."""

    async def work(pool: Pool) -> None:
        await size(world, "auto")
        await full(pool)
        assert world.made == []
        for number in range(2):
            assert await pool.claim(f"first-{number}", SandboxSpec()) is None
        await full(pool)
        assert len(hidden(world.host)) == 2
        for number in range(20):
            await pool.claim(f"box-{number}", SandboxSpec())
        await full(pool)
        assert len(hidden(world.host)) == 4

    run(world, work)


def test_a_pool_takes_no_memory_that_is_not_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 3, item 2: "counted against memory"."""

    async def work(pool: Pool) -> None:
        monkeypatch.setattr(capacity, "fitting", lambda _paths, _spec: max(2 - len(world.made), 0))
        await size(world, 10)
        await full(pool)
        assert len(hidden(world.host)) == 2

    run(world, work)


def test_without_a_template_none_is_made_but_wanted(world: World) -> None:
    world.built = {}

    async def work(pool: Pool) -> None:
        await size(world, 2)
        await full(pool)
        assert world.made == [] and hidden(world.host) == []
        assert world.missed_shapes == [SandboxSpec()]

    run(world, work)


def test_a_vm_that_cannot_be_made_leaves_nothing_and_is_tried_again_later(world: World) -> None:
    """VM-6, told in the events."""
    world.broken = Unavailable("QEMU ended before it greeted")

    async def work(pool: Pool) -> None:
        await size(world, 2)
        await full(pool)
        assert hidden(world.host) == [] and list(world.host.paths.sandboxes.iterdir()) == []
        [event] = world.host.records._store.events_after(0)
        assert event.kind == "pool.failed" and "greeted" in event.data["reason"]
        world.broken = None
        pool.refill()
        await full(pool)
        assert len(hidden(world.host)) == 2

    run(world, work)


def test_a_pool_that_was_closed_makes_no_more(world: World) -> None:
    async def work(pool: Pool) -> None:
        await size(world, 2)
        await pool.close()
        pool.refill()
        await asyncio.sleep(0.05)
        assert world.made == [] and hidden(world.host) == []

    run(world, work)
