"""When a syncer syncs, and what it tells: its timing, against a guest and a vault that are only played. What it brings
to the host is tests/vm/test_durability.py's to prove."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from limpet.errors import LimpetError, Unavailable
from limpet.models import State
from limpet.services import generations
from limpet.services import syncer as syncers
from limpet.services.health import Health
from limpet.services.host import Host
from limpet.services.syncing import Syncing
from tests.unit.services_kit import add_sandbox, host_in


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_lag_is_that_of_the_oldest_change_that_is_not_on_the_host() -> None:
    """D4: changes that come while a sync runs wait for the next one; a failure does not make them younger."""
    clock = Clock()
    health = Health(clock)
    assert (health.lag, health.age, health.degraded()) == (0.0, None, None)
    health.began()
    health.succeeded()
    clock.now += 50
    assert (health.lag, health.age) == (0.0, 0.0)  # nobody has written: it is in step now
    health.changed()
    clock.now += 1
    health.changed()  # a later change does not count
    assert (health.lag, health.age) == (1.0, 1.0)
    health.began()
    clock.now += 0.5
    health.changed()  # while it runs
    assert health.lag == 1.5
    health.succeeded()
    assert health.lag < 1.5
    clock.now += 1
    assert health.lag == 1.0  # of the one that came meanwhile
    health.began()
    health.failed("no")
    clock.now += 1
    assert (health.lag, health.failures) == (2.0, 1)
    health.began()
    health.succeeded()
    assert (health.lag, health.failures, health.age) == (0.0, 0, 0.0)


def test_degraded_says_why_and_ends_with_a_success() -> None:
    """PAY-8: more than three intervals behind, or three failures in a row."""
    clock = Clock()
    health = Health(clock)
    health.changed()
    clock.now += 3.1
    assert "has waited for 3 s" in (health.degraded() or "")
    health.began()
    health.succeeded()
    assert health.degraded() is None
    for _ in range(3):
        health.began()
        health.failed("the disk is full")
    assert health.degraded() == "3 syncs failed in a row: the disk is full"
    assert len(health.lines) == 3 and health.lines[-1].endswith("failed: the disk is full")
    health.began()
    health.succeeded()
    assert health.degraded() is None and health.failures == 0


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class PlayedGuest:
    """Says when something changed; `counter` is what is written in it, `taken` what the last snapshot held."""

    counter: int = 0
    synced: int = 0
    taken: int = 0
    seconds: float = 0.0  # that a sync takes
    error: LimpetError | None = None
    syncs: list[tuple[float, Set[str] | None, int]] = field(default_factory=list)  # when, what for, what it held
    watches: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def write(self) -> None:
        self.counter += 1
        self.changed.set()

    async def watch(self, _since: Mapping[str, int]) -> list[str]:
        self.watches += 1
        while self.counter == self.taken:
            self.changed.clear()
            await self.changed.wait()
        return ["home"]


class PlayedSync:
    """In place of `generations.Sync`."""

    def __init__(self, guest: PlayedGuest, _table: object, _vault: object, **_options: object) -> None:
        self._guest = guest
        self.stale: list[str] = []
        self.clean: dict[str, int] = {}

    async def look(self, named: Set[str] | None, _clean: Mapping[str, int]) -> None:
        self._named = named
        if named is None or self._guest.counter > self._guest.synced:
            self.stale = ["home"]

    @property
    def needed(self) -> bool:
        return bool(self.stale)

    async def take(self, held: Callable[[], None]) -> Any:
        self._guest.taken = count = self._guest.counter
        self._guest.syncs.append((time.monotonic(), self._named, count))
        held()
        await asyncio.sleep(self._guest.seconds)
        if self._guest.error is not None:
            self._guest.taken = self._guest.synced
            raise self._guest.error
        if count == self._guest.synced:
            return None
        self._guest.synced = count
        return PlayedGeneration(count)


@dataclass
class PlayedGeneration:
    number: int
    time: datetime = datetime(2026, 1, 1, tzinfo=UTC)


class PlayedVM:
    """A running VM whose agent is the played guest."""

    def __init__(self, sandbox_id: str, guest: PlayedGuest) -> None:
        self.sandbox_id, self.guest = sandbox_id, guest
        self.ended_by_us, self.stall, self.hung_up = False, None, 0
        self.machine = self

    def alive(self) -> bool:
        return True

    async def agent(self) -> PlayedGuest:
        return self.guest

    async def unless_stalled(self, question: Awaitable[Any]) -> Any:
        return await question

    async def hang_up(self) -> None:
        self.hung_up += 1


class PlayedVault:
    damage = None
    head = None
    last_verified = None


@dataclass
class World:
    host: Host
    syncing: Syncing
    guest: PlayedGuest
    vm: PlayedVM
    told: list[int]

    @property
    def id(self) -> str:
        return self.vm.sandbox_id

    def kinds(self) -> list[str]:
        return [event.kind for event in self.host.events._store.events_after(0, limit=1000)]

    async def until(self, condition: Callable[[], object], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            await asyncio.sleep(0.005)


def played(home: Path, monkeypatch: pytest.MonkeyPatch, test: Callable[[World], Awaitable[None]]) -> None:
    """Run a test against a played guest, with intervals a tenth as long."""
    for name in ("INTERVAL", "_BEGIN_S", "_IDLE_LOOK_S"):
        monkeypatch.setattr(syncers, name, 0.1)
    monkeypatch.setattr(syncers, "_SLOW_S", 0.1)
    monkeypatch.setattr(syncers, "Volumes", lambda guest: guest)
    monkeypatch.setattr(generations, "Sync", PlayedSync)
    monkeypatch.setattr("limpet.services.vaulttable.Vault", PlayedVault)
    monkeypatch.setattr(PlayedVault, "open", lambda _path: PlayedVault(), raising=False)
    told: list[int] = []

    async def listener(_sandbox_id: str, generation: Any) -> None:
        told.append(generation.number)

    with host_in(home) as host:
        record = add_sandbox(host, state=State.RUNNING)

        async def run() -> None:
            guest = PlayedGuest()
            world = World(host, Syncing(host), guest, PlayedVM(record.id, guest), told)
            world.syncing.add_listener(listener)
            world.syncing.join(world.vm)  # type: ignore[arg-type]
            try:
                await test(world)
            finally:
                await world.syncing.close()

        asyncio.run(run())


def test_a_change_after_quiet_is_synced_at_once_and_nothing_happens_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D4: no sync while nothing is written, none a second time; the listener hears of each."""

    async def test(world: World) -> None:
        await world.until(lambda: world.guest.watches == 1)
        assert not world.guest.syncs
        await asyncio.sleep(0.3)
        assert not world.guest.syncs and world.guest.watches == 1
        wrote = time.monotonic()
        world.guest.write()
        await world.until(lambda: world.told == [1])
        assert world.guest.syncs[0][0] - wrote < 0.08
        await asyncio.sleep(0.3)
        assert len(world.guest.syncs) == 1

    played(tmp_path, monkeypatch, test)


def test_a_busy_guest_is_synced_once_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D4: start to start, however long one takes; what is written during one is in the next."""

    async def test(world: World) -> None:
        world.guest.seconds = 0.04
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            world.guest.write()
            await asyncio.sleep(0.005)
        begins = [when for when, _, _ in world.guest.syncs]
        assert 6 <= len(begins) <= 11
        assert all(later - earlier >= 0.095 for earlier, later in itertools.pairwise(begins))
        await world.until(lambda: world.guest.synced == world.guest.counter)

    played(tmp_path, monkeypatch, test)


def test_a_sync_that_is_asked_for_has_what_was_written_before_though_one_was_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D4: it waits for one that began after the call; several that wait share it."""

    async def test(world: World) -> None:
        world.guest.seconds = 0.2
        world.guest.write()
        await world.until(lambda: len(world.guest.syncs) == 1)
        world.guest.write()
        results = await asyncio.gather(*(world.syncing.now(world.id) for _ in range(5)))
        assert {result.generation for result in results} == {2}
        whole = [held for _, named, held in world.guest.syncs if named is None]
        assert whole == [2]

    played(tmp_path, monkeypatch, test)


def test_a_generation_whose_sync_was_called_off_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PAY-2: a pause in the instant of a commit; payloads publish what they are told of."""

    async def commit_and_linger(sync: PlayedSync, held: Callable[[], None]) -> Any:
        sync._guest.synced = sync._guest.taken = sync._guest.counter
        PlayedVault.head = PlayedGeneration(sync._guest.counter)  # type: ignore[assignment]
        await asyncio.sleep(60)

    async def test(world: World) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(PlayedSync, "take", commit_and_linger)
            world.guest.write()
            await world.until(lambda: PlayedVault.head is not None)
            await world.syncing.hold(world.id)
        assert world.told == []
        world.syncing.go_on(world.id)
        await world.until(lambda: world.told == [1])
        await asyncio.sleep(0.3)
        assert world.told == [1]

    monkeypatch.setattr(PlayedVault, "head", None)
    played(tmp_path, monkeypatch, test)


def test_failures_are_told_once_and_the_channel_is_renewed_after_twelve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PAY-8: counted, tried again each interval; one event when it begins, one when it is bad, one when it is over."""

    async def test(world: World) -> None:
        world.guest.error = Unavailable("the guest sulks")
        world.guest.write()
        await world.until(lambda: world.vm.hung_up == 1)
        status = await world.syncing.status("box", pending=False)
        assert (status.failures, status.degraded) == (12, True)
        assert status.why == "12 syncs failed in a row: the guest sulks"
        assert status.lag > 1.0 and status.log[-1].endswith("the channel is opened anew")
        with pytest.raises(Unavailable, match="sulks"):
            await world.syncing.now(world.id)
        world.guest.error = None
        await world.until(lambda: world.guest.synced == 1)
        await world.until(lambda: "sync.recovered" in world.kinds())
        status = await world.syncing.status("box", pending=False)
        assert (status.failures, status.degraded, status.why, status.lag) == (0, False, None, 0.0)
        told = [kind for kind in world.kinds() if kind.startswith("sync.")]
        assert told == ["sync.failed", "sync.degraded", "sync.recovered"]

    played(tmp_path, monkeypatch, test)


def test_a_guest_that_stands_still_is_not_asked_and_does_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VM-18: paused is no failure; what was written before is synced when it goes on."""

    async def test(world: World) -> None:
        await world.until(lambda: world.guest.watches == 1)
        async with world.syncing.held(world.id):
            world.host.records.update(world.id, state=State.PAUSED)
        world.guest.write()
        await asyncio.sleep(0.3)
        assert not world.guest.syncs
        status = await world.syncing.status("box", pending=True)
        assert (status.failures, status.degraded) == (0, False)
        world.host.records.update(world.id, state=State.RUNNING)
        world.syncing.go_on(world.id)
        await world.until(lambda: world.guest.synced == 1)

    played(tmp_path, monkeypatch, test)


def test_switched_off_it_syncs_only_when_asked_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sync.auto: nothing by itself; the final sync tries again within its time."""

    async def test(world: World) -> None:
        await world.host.config.set("sync.auto", "off")
        world.guest.write()
        await asyncio.sleep(0.4)
        assert not world.guest.syncs
        assert (await world.syncing.now(world.id)).new
        world.guest.write()
        world.guest.error = Unavailable("not now")

        async def mend() -> None:
            await asyncio.sleep(0.3)
            world.guest.error = None

        mending = asyncio.create_task(mend())
        assert await world.syncing.final(world.vm, 3.0) == (2, None)  # type: ignore[arg-type]
        await mending
        world.guest.write()
        world.guest.error = Unavailable("never")
        generation, problem = await world.syncing.final(world.vm, 0.3)  # type: ignore[arg-type]
        assert (generation, problem) == (None, "never")

    played(tmp_path, monkeypatch, test)
