"""A payload while its sandbox runs: what is offered is published, failures are counted and told, the end is final."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limpet.models import Payload, SandboxSpec, State
from limpet.services.events import Events
from limpet.services.payloads import keeping
from limpet.services.payloads.keeping import Keeper
from limpet.services.payloads.marker import NAME
from limpet.services.vaulttable import OpenVault, VaultTable
from limpet.store import SandboxRecord, Store
from limpet.threads import Workers
from tests.unit.payload_kit import ID, World, files, unlink, write

CONTENT = {"a": b"a one", **{f"sub/{number}": b"" for number in range(30)}}
RECORD = SandboxRecord("sb_box", "box", State.RUNNING, SandboxSpec(), datetime.now(UTC), incarnation=1)


class _OneVault(VaultTable):
    """The vault that the test writes generations to, instead of a second one over the same files."""

    def __init__(self, world: World) -> None:
        super().__init__(world.paths.vaults)
        self._one = OpenVault(world.vault)

    async def open(self, sandbox_id: str) -> OpenVault:
        return self._one

    async def find(self, sandbox_id: str) -> OpenVault | None:
        return self._one


class Kept:
    """A keeper over a world."""

    def __init__(self, world: World, store: Store) -> None:
        self.world, self.store = world, store
        vaults = _OneVault(world)
        self.events = Events(store)
        payload = Payload(id=ID, host_dir=str(world.host), guest_dir="/workspace/data", interval=0.01)
        self.keeper = Keeper(
            payload, RECORD, world.publisher, events=self.events, vaults=vaults, workers=Workers(1, "test")
        )

    def told(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.store.events_after(0, limit=1000))

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen in time: {self.keeper.status()}"
            await asyncio.sleep(0.01)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    monkeypatch.setattr(keeping, "_SLOWEST_S", 0.02)
    monkeypatch.setattr(keeping, "_LOOK_S", 0.05)
    monkeypatch.setattr(keeping, "_LOOK_SHARE", 1)
    world = World(tmp_path, CONTENT)
    store = Store.open(world.paths)
    try:
        yield Kept(world, store)
    finally:
        store.close()


def running(kept: Kept, work: Callable[[], Awaitable[None]]) -> None:
    """Do something while the keeper runs."""

    async def run() -> None:
        kept.keeper.start()
        try:
            await work()
        finally:
            await kept.keeper.close()

    asyncio.run(run())


def test_the_newest_generation_is_published_and_older_ones_are_passed_over(kept: Kept) -> None:
    """PAY-2."""

    async def work() -> None:
        for number in range(5):
            kept.keeper.offer(kept.world.generation(write("a", b"%d" % number)))
        await kept.until(lambda: files(kept.world.host)["a"] == b"4")
        await kept.until(lambda: kept.keeper.status().generation == 5 and kept.keeper.status().age == 0.0)
        assert kept.keeper.status().state == "ok"

    running(kept, work)


def test_what_was_committed_before_the_daemon_began_is_published(kept: Kept) -> None:
    """PAY-2: nobody has to write again for that."""
    kept.world.generation(write("a", b"two"))

    async def work() -> None:
        await kept.until(lambda: files(kept.world.host)["a"] == b"two")

    running(kept, work)


def test_a_generation_with_half_a_seed_is_never_published(kept: Kept) -> None:
    """PAY-5: neither one from before the seed was whole, nor one of another incarnation."""
    kept.world.publisher.save(since=3)
    half = kept.world.generation(unlink("sub", range(10)))

    async def work() -> None:
        kept.keeper.offer(half)
        await asyncio.sleep(0.3)
        assert files(kept.world.host) == CONTENT
        kept.world.publisher.save(since=0, seeded=None)
        kept.keeper.offer(kept.world.generation())
        await asyncio.sleep(0.3)
        assert files(kept.world.host) == CONTENT and kept.keeper.status().state == "seeding"

    running(kept, work)


def test_failures_are_counted_told_once_and_after_twelve_it_begins_anew(kept: Kept) -> None:
    """PAY-4, PAY-8: a missing marker is a failure; a success resets the count."""
    marker = (kept.world.host / NAME).read_bytes()
    (kept.world.host / NAME).unlink()

    async def work() -> None:
        kept.keeper.offer(kept.world.generation(write("a", b"two")))
        await kept.until(lambda: kept.keeper.status().failures > 13)
        found = kept.keeper.status()
        assert found.state == "failing" and found.degraded and "no marker" in (found.reason or "")
        assert files(kept.world.host) == CONTENT
        assert kept.told("payload.failed") == 1 and kept.told("payload.restarted") >= 1
        (kept.world.host / NAME).write_bytes(marker)
        await kept.until(lambda: kept.keeper.status().state == "ok")
        assert kept.keeper.status().failures == 0 and not kept.keeper.status().degraded
        await kept.until(lambda: files(kept.world.host)["a"] == b"two")

    running(kept, work)


def test_an_edit_is_noticed_though_nobody_writes_in_the_guest(kept: Kept) -> None:
    """PAY-6, PAY-8: told once, with what to do; taken back it is forgotten."""

    async def work() -> None:
        path = kept.world.host / "mine"
        path.write_text("mine")
        await kept.until(lambda: kept.keeper.status().state == "drifted")
        found = kept.keeper.status()
        assert "mine in" in (found.reason or "") and "--keep host" in (found.hint or "")
        await kept.until(lambda: kept.keeper.status().degraded)
        kept.keeper.offer(kept.world.generation(write("a", b"two")))
        await asyncio.sleep(0.3)
        assert kept.told("payload.drifted") == 1 and files(kept.world.host) == {**CONTENT, "mine": b"mine"}
        path.unlink()
        await kept.until(lambda: files(kept.world.host)["a"] == b"two")
        await kept.until(lambda: kept.keeper.status().state == "ok")

    running(kept, work)


def test_a_held_back_deletion_survives_the_daemon_and_is_confirmed(kept: Kept) -> None:
    """PAY-5."""

    async def work() -> None:
        kept.keeper.offer(kept.world.generation(unlink("sub", range(20))))
        await kept.until(lambda: kept.keeper.status().state == "held")
        assert len(files(kept.world.host)) == 31
        assert kept.world.state.trouble == "held"
        await kept.keeper.publish_anyway()
        assert len(files(kept.world.host)) == 11 and kept.keeper.status().state == "ok"

    running(kept, work)


def test_the_last_publication_is_tried_until_the_time_is_over_and_its_result_told(kept: Kept) -> None:
    """PAY-7."""
    keeper, world = kept.keeper, kept.world
    keeper.offer(world.generation(write("a", b"last")))
    assert asyncio.run(keeper.final(5.0)) is None
    assert files(world.host)["a"] == b"last"
    (world.host / "mine").write_text("")
    keeper.offer(world.generation(write("a", b"later")))
    assert "edited on the host" in (asyncio.run(keeper.final(5.0)) or "")
    (world.host / "mine").unlink()
    (world.host / NAME).rename(world.host.parent / "marker")
    began = time.monotonic()
    assert "no marker" in (asyncio.run(keeper.final(0.5)) or "")
    assert time.monotonic() - began < 3.0
    (world.host.parent / "marker").rename(world.host / NAME)
    assert asyncio.run(keeper.final(5.0)) is None
    assert files(world.host)["a"] == b"later"


def test_an_edit_that_nobody_has_told_of_yet_is_part_of_the_last_answer(kept: Kept) -> None:
    """PAY-6, PAY-7: also when there is nothing new to publish."""
    (kept.world.host / "mine").write_text("")
    assert "edited on the host" in (asyncio.run(kept.keeper.final(5.0)) or "")
