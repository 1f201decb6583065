"""The event stream: order, cursors, gaps, followers (EVT-1)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limpet import log
from limpet.models import Event, SandboxSpec, State
from limpet.paths import Paths
from limpet.services.events import Events
from limpet.store import SandboxRecord, Store


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path / "data", tmp_path / "cache", tmp_path / "run")
    found.make()
    return found


@pytest.fixture
def store(paths: Paths) -> Iterator[Store]:
    opened = Store.open(paths, events_kept=10)
    yield opened
    opened.close()


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


def read(events: Events, after: int | None = None) -> list[Event]:
    """What is there now, without waiting."""
    return asyncio.run(collect(events.follow(after, wait=False)))


def test_event_names_sandbox_and_operation(store: Store) -> None:
    """EVT-1, VM-15"""
    events = Events(store)
    web = SandboxRecord("sb_1", "web", State.RUNNING, SandboxSpec(), datetime.now(UTC))
    with log.operation("op_x"):
        events.emit("sandbox.started", web, accel="tcg")
    (event,) = read(events)
    assert (event.seq, event.kind, event.sandbox, event.sandbox_id) == (1, "sandbox.started", "web", "sb_1")
    assert (event.op_id, event.data) == ("op_x", {"accel": "tcg"})


def test_reader_resumes_from_its_cursor_also_in_a_later_daemon(paths: Paths) -> None:
    """EVT-1"""
    store = Store.open(paths)
    for number in range(5):
        Events(store).emit("tick", n=number)
    store.close()
    store = Store.open(paths)
    events = Events(store)
    events.emit("tick", n=5)
    assert [event.data["n"] for event in read(events, after=3)] == [3, 4, 5]
    assert [event.seq for event in read(events)] == [1, 2, 3, 4, 5, 6]
    assert read(events, after=6) == []
    store.close()


def test_cursor_older_than_what_is_kept_is_told_the_gap(store: Store) -> None:
    """EVT-1: a gap is told, never silent."""
    events = Events(store)
    for number in range(25):
        events.emit("tick", n=number)
    gap, *kept = read(events, after=2)
    assert gap.kind == "gap"
    assert (gap.data["from"], gap.data["to"]) == (3, kept[0].seq - 1)
    assert gap.seq == kept[0].seq - 1
    assert [event.seq for event in kept] == list(range(kept[0].seq, 26))
    assert len(kept) >= 10
    assert read(events, after=gap.seq - 1)[0].data["from"] == gap.seq  # one that is missing is told, too
    assert read(events, after=gap.seq) == kept  # resuming from the gap's own number goes on after it
    assert read(events, after=None) == kept  # who asks for what is kept has no gap


def test_cursor_ahead_of_the_stream_is_told(store: Store) -> None:
    """EVT-1: for example when the state directory was replaced."""
    events = Events(store)
    events.emit("tick")
    (gap,) = read(events, after=100)
    assert (gap.kind, gap.seq, gap.data["from"], gap.data["to"]) == ("gap", 1, 2, 100)


def test_numbers_are_not_given_twice_when_all_events_are_gone(store: Store) -> None:
    """EVT-1"""
    events = Events(store)
    for _ in range(3):
        events.emit("tick")
    store._db.execute("DELETE FROM events")
    assert events.emit("tick").seq == 4


def test_every_follower_sees_every_event_in_order(store: Store) -> None:
    """EVT-1"""

    async def main() -> list[list[int]]:
        events = Events(store)

        async def follower() -> list[int]:
            seen = []
            async with aclosing(events.follow(0)) as stream:
                async for event in stream:
                    seen.append(event.seq)
                    if event.kind == "last":
                        return seen
            raise AssertionError("the stream ended")

        followers = [asyncio.create_task(follower()) for _ in range(3)]
        for number in range(9):
            events.emit("last" if number == 8 else "tick")
            if number % 2:
                await asyncio.sleep(0)
        return await asyncio.gather(*followers)

    assert asyncio.run(main()) == [list(range(1, 10))] * 3


def test_follower_that_falls_behind_is_told_the_gap(store: Store) -> None:
    """EVT-1"""

    async def main() -> list[str]:
        events = Events(store)
        events.emit("first")
        kinds = []
        async with aclosing(events.follow(0)) as stream:
            kinds.append((await anext(stream)).kind)
            for _ in range(40):
                events.emit("tick")
            kinds.append((await anext(stream)).kind)
        return kinds

    assert asyncio.run(main()) == ["first", "gap"]


def test_followers_end_when_the_stream_is_closed_and_have_seen_everything(store: Store) -> None:
    async def main() -> list[str]:
        events = Events(store)
        following = asyncio.create_task(collect(events.follow(0)))
        events.emit("a")
        await asyncio.sleep(0)
        events.emit("b")
        events.close()
        return [event.kind for event in await following]

    assert asyncio.run(main()) == ["a", "b"]


def test_event_of_a_transaction_that_failed_was_never_there(store: Store) -> None:
    """EVT-1"""
    events = Events(store)
    with pytest.raises(ZeroDivisionError), store.transaction():
        events.emit("tick")
        raise ZeroDivisionError
    assert read(events) == []
