"""Long requests: stages, watching, cancelling, pruning, and what a crash leaves of them (VM-14, VM-15)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limpet import log
from limpet.errors import Busy, FailedPrecondition, NotFound, Unavailable
from limpet.models import Drift, Operation, Stage
from limpet.paths import Paths
from limpet.services import pipeline
from limpet.services.operations import Operations, Result, Stages
from limpet.store import Store


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path / "data", tmp_path / "cache", tmp_path / "run")
    found.make()
    return found


@pytest.fixture
def store(paths: Paths) -> Iterator[Store]:
    opened = Store.open(paths)
    yield opened
    opened.close()


async def forever(_stages: Stages) -> Result:
    await asyncio.Event().wait()
    return None


def test_operation_runs_under_the_request_id_and_keeps_its_result(store: Store) -> None:
    """VM-14, VM-15"""

    async def work(stages: Stages) -> Result:
        async with stages.run("look", detail="closely") as stage:
            stage.update(fraction=0.5)
        return Drift(moved=True, why=log.current_op())

    async def main() -> Operation:
        operations = Operations(store)
        with log.operation("op_request"):
            begun = operations.start("drift", "web", work)
        assert (begun.id, begun.state, begun.target) == ("op_request", "running", "web")
        return await operations.wait(begun.id)

    ended = asyncio.run(main())
    assert (ended.state, ended.result) == ("done", {"moved": True, "why": "op_request"})
    assert ended.stages[0].model_copy(update={"seconds": None}) == Stage(
        name="look", state="done", fraction=0.5, detail="closely"
    )
    assert ended.stages[0].seconds is not None
    assert ended.ended_at is not None
    assert store.operation("op_request") == ended


def test_second_operation_of_one_request_gets_its_own_id(store: Store) -> None:
    """VM-15"""

    async def work(_stages: Stages) -> Result:
        return {}

    async def main() -> None:
        operations = Operations(store)
        with log.operation("op_request"):
            first, second = operations.start("a", None, work), operations.start("b", None, work)
            await operations.wait(first.id)
            third = operations.start("c", None, work)
        assert len({first.id, second.id, third.id}) == 3
        await operations.wait(second.id)
        await operations.wait(third.id)

    asyncio.run(main())


def test_stream_shows_changes_and_ends_with_the_final_state(store: Store) -> None:
    """VM-14"""

    async def main() -> list[Operation]:
        operations, go = Operations(store), asyncio.Event()

        async def work(stages: Stages) -> Result:
            await go.wait()
            for name in ("disks", "boot"):
                async with stages.run(name):
                    await asyncio.sleep(0.001)
            return {"x": 1}

        begun = operations.start("create", "web", work)
        seen = []
        async for operation in operations.stream(begun.id):
            seen.append(operation)
            go.set()
        assert [found async for found in operations.stream(begun.id)] == [seen[-1]]  # afterwards: the final one
        return seen

    seen = asyncio.run(main())
    assert [operation.state for operation in seen] == ["running"] * (len(seen) - 1) + ["done"]
    assert any(operation.stages and operation.stages[-1].name == "boot" for operation in seen[:-1])
    assert (seen[-1].result, [stage.state for stage in seen[-1].stages]) == ({"x": 1}, ["done", "done"])


def test_cancel_runs_the_undos_before_it_answers(store: Store) -> None:
    """VM-14"""
    journal: list[str] = []

    async def main() -> Operation:
        operations, booting = Operations(store), asyncio.Event()

        async def boot() -> None:
            booting.set()
            await asyncio.Event().wait()

        async def undo() -> None:
            await asyncio.sleep(0)
            journal.append("undone")

        async def work(stages: Stages) -> Result:
            await pipeline.run([pipeline.Step("boot", boot, undo)], stages)
            return None

        begun = operations.start("create", "web", work)
        await booting.wait()
        return await operations.cancel(begun.id)

    ended = asyncio.run(main())
    assert journal == ["undone"]
    assert (ended.state, ended.stages[0].state) == ("cancelled", "failed")


def test_cancel_before_the_first_step_still_lets_the_work_clean_up(store: Store) -> None:
    """VM-14: a create reserved its name before its task began."""
    journal: list[str] = []

    async def work(_stages: Stages) -> Result:
        try:
            await asyncio.Event().wait()
        finally:
            journal.append("cleaned up")
        return None

    async def main() -> None:
        operations = Operations(store)
        begun = operations.start("create", "web", work)
        assert (await operations.cancel(begun.id)).state == "cancelled"

    asyncio.run(main())
    assert journal == ["cleaned up"]


def test_cancel_of_what_ended_is_refused(store: Store) -> None:
    async def work(_stages: Stages) -> Result:
        return None

    async def main() -> None:
        operations = Operations(store)
        begun = operations.start("stop", "web", work)
        await operations.wait(begun.id)
        with pytest.raises(FailedPrecondition, match="is done"):
            await operations.cancel(begun.id)
        with pytest.raises(NotFound):
            await operations.cancel("op_unknown")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (Busy("busy", hint="wait"), "busy", "busy"),
        (ZeroDivisionError("by zero"), "internal", "ZeroDivisionError: by zero"),
        (ExceptionGroup("x", [Busy("one"), Busy("two")]), "busy", "one; two"),
    ],
)
def test_failure_is_kept_as_an_error_with_the_operation_id(
    store: Store, error: Exception, code: str, message: str
) -> None:
    """VM-15"""

    async def work(_stages: Stages) -> Result:
        raise error

    async def main() -> Operation:
        operations = Operations(store)
        return await operations.wait(operations.start("stop", "web", work).id)

    ended = asyncio.run(main())
    assert ended.state == "failed"
    assert ended.error is not None
    assert (ended.error["code"], ended.error["message"], ended.error["op_id"]) == (code, message, ended.id)


def test_operation_that_a_crash_cut_off_is_marked_failed_by_the_next_daemon(paths: Paths) -> None:
    """VM-14"""
    store = Store.open(paths)
    store.save_operation(Operation(id="op_1", kind="create", state="running", started_at=datetime.now(UTC)))
    store.close()
    store = Store.open(paths)
    found = Operations(store).get("op_1")
    store.close()
    assert found.state == "failed"
    assert found.error is not None
    assert "the daemon ended while this ran" in found.error["message"]


def test_finished_operation_can_be_pruned_and_a_running_one_cannot(store: Store) -> None:
    """VM-14"""

    async def main() -> None:
        operations = Operations(store)
        begun = operations.start("create", "web", forever)
        with pytest.raises(FailedPrecondition, match="still running"):
            operations.prune(begun.id)
        await operations.cancel(begun.id)
        assert [found.id for found in operations.list()] == [begun.id]
        operations.prune(begun.id)
        assert operations.list() == []
        with pytest.raises(NotFound):
            operations.get(begun.id)

    asyncio.run(main())


def test_shutdown_undoes_what_runs_is_bounded_and_refuses_new_work(store: Store) -> None:
    """VM-14"""
    journal: list[str] = []

    async def main() -> tuple[Operation, Operation]:
        operations, stuck = Operations(store), asyncio.Event()

        async def good(_stages: Stages) -> Result:
            try:
                await asyncio.Event().wait()
            finally:
                journal.append("undone")
            return None

        async def stubborn(_stages: Stages) -> Result:
            while not stuck.is_set():
                try:
                    await stuck.wait()
                except asyncio.CancelledError:
                    pass
            return None

        first, second = operations.start("create", "a", good), operations.start("create", "b", stubborn)
        await operations.close(timeout=0.05)
        with pytest.raises(Unavailable, match="shutting down"):
            operations.start("create", "c", good)
        late = operations.get(second.id)
        stuck.set()
        await operations.wait(second.id)
        return operations.get(first.id), late

    ended, late = asyncio.run(main())
    assert journal == ["undone"]
    assert ended.error is not None
    assert (ended.state, ended.error["message"]) == ("failed", "the daemon was shut down while this ran")
    assert late.state == "running"
