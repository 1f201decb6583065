"""The lock table and the order that it enforces (VM-11)."""

from __future__ import annotations

import asyncio

import pytest

from limpet import log
from limpet.errors import Busy
from limpet.services.locks import Locks


def test_lock_is_exclusive_and_first_come_first_served() -> None:
    """VM-11: two imports into one sandbox run one after the other."""

    async def main() -> list[str]:
        locks, seen = Locks(), []

        async def use(what: str) -> None:
            async with locks.workspace("sb_1", what):
                seen.append(f"{what} in")
                await asyncio.sleep(0)
                seen.append(f"{what} out")

        await asyncio.gather(*(use(what) for what in "abc"))
        assert locks._entries == {}  # nothing is left behind
        return seen

    assert asyncio.run(main()) == ["a in", "a out", "b in", "b out", "c in", "c out"]


def test_stop_does_not_wait_for_an_import() -> None:
    """VM-11"""

    async def main() -> None:
        locks, finish = Locks(), asyncio.Event()

        async def long_import() -> None:
            async with locks.workspace("sb_1", "import"):
                async with locks.lifecycle("sb_1", "import: check"):
                    pass
                await finish.wait()

        importing = asyncio.create_task(long_import())
        await asyncio.sleep(0)
        async with locks.lifecycle("sb_1", "stop"):
            assert locks.holder("workspace", "sb_1") == "import"
        finish.set()
        await importing

    asyncio.run(main())


def test_sandboxes_do_not_wait_for_each_other() -> None:
    """VM-13: creates run in parallel."""

    async def main() -> None:
        locks, both = Locks(), asyncio.Barrier(2)

        async def boot(sandbox_id: str) -> None:
            async with locks.lifecycle(sandbox_id, "start"):
                await both.wait()

        await asyncio.gather(boot("sb_1"), boot("sb_2"))

    asyncio.run(main())


def test_bounded_wait_ends_in_busy_that_names_the_holder() -> None:
    """VM-11"""

    async def main() -> Busy:
        locks, held = Locks(), asyncio.Event()

        async def hold() -> None:
            with log.operation("op_holder"):
                async with locks.lifecycle("sb_1", "start of web"):
                    held.set()
                    await asyncio.Event().wait()

        holder = asyncio.create_task(hold())
        await held.wait()
        with pytest.raises(Busy) as caught:
            async with locks.lifecycle("sb_1", "stop of web", wait=0.01):
                pass
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)
        async with locks.lifecycle("sb_1", "stop of web", wait=0.01):
            pass  # the holder's end freed it
        return caught.value

    error = asyncio.run(main())
    assert "stop of web has to wait for start of web" in error.message
    assert "op_holder" in error.message


@pytest.mark.parametrize(
    ("first", "second", "of"),
    [
        ("lifecycle", "workspace", "sb_1"),
        ("lifecycle", "lifecycle", "sb_1"),
        ("workspace", "workspace", "sb_1"),
        ("workspace", "lifecycle", "sb_2"),
    ],
)
def test_wrong_order_is_a_bug_at_once_not_a_deadlock_one_day(first: str, second: str, of: str) -> None:
    """VM-11"""

    async def main() -> None:
        locks = Locks()
        async with getattr(locks, first)("sb_1", "outer"):
            with pytest.raises(RuntimeError, match=f"{second} asked for while holding {first}"):
                async with getattr(locks, second)(of, "inner"):
                    pass

    asyncio.run(main())


def test_waiter_that_is_cancelled_leaves_the_lock_usable() -> None:
    async def main() -> None:
        locks, free = Locks(), asyncio.Event()

        async def hold() -> None:
            async with locks.lifecycle("sb_1", "start"):
                await free.wait()

        async def wait() -> None:
            async with locks.lifecycle("sb_1", "stop"):
                raise AssertionError("it was cancelled")

        holder = asyncio.create_task(hold())
        await asyncio.sleep(0)
        waiter = asyncio.create_task(wait())
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        free.set()
        await holder
        assert locks.holder("lifecycle", "sb_1") is None
        async with locks.lifecycle("sb_1", "again"):
            pass

    asyncio.run(main())
