"""The pipeline of named steps with their undos (VM-6)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from limpet.errors import InsufficientSpace, LimpetError, Unavailable
from limpet.models import Stage
from limpet.services import pipeline
from limpet.services.operations import Stages
from limpet.services.pipeline import Step


class Journal:
    """What was done and undone, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str, error: Exception | None = None) -> Callable[[], Awaitable[None]]:
        async def act() -> None:
            self.lines.append(line)
            if error is not None:
                raise error

        return act

    def step(self, name: str, error: Exception | None = None, undo_error: Exception | None = None) -> Step:
        return Step(name, self.note(f"do {name}", error), self.note(f"undo {name}", undo_error))


def test_steps_run_in_order_and_nothing_is_undone_when_all_succeed() -> None:
    """VM-6"""
    journal = Journal()
    asyncio.run(pipeline.run([journal.step("a"), journal.step("b")]))
    assert journal.lines == ["do a", "do b"]


def test_failure_undoes_in_reverse_beginning_with_the_failing_step() -> None:
    """VM-6"""
    journal = Journal()
    steps = [journal.step("a"), journal.step("b"), journal.step("c", InsufficientSpace("full")), journal.step("d")]
    with pytest.raises(InsufficientSpace, match=r"^full$"):
        asyncio.run(pipeline.run(steps))
    assert journal.lines == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]


def test_all_errors_are_reported_together_and_the_other_undos_still_run() -> None:
    """VM-6"""
    journal = Journal()
    steps = [
        journal.step("disks", undo_error=OSError("disk is busy")),
        journal.step("net", undo_error=Unavailable("no passt")),
        Step("nothing to undo", journal.note("do nothing")),
        journal.step("boot", InsufficientSpace("full", hint="free some space")),
    ]
    with pytest.raises(InsufficientSpace) as caught:
        asyncio.run(pipeline.run(steps))
    assert journal.lines[-3:] == ["undo boot", "undo net", "undo disks"]
    message = caught.value.message
    assert message.startswith("full; ")
    assert "undoing 'net' failed too: no passt" in message
    assert "undoing 'disks' failed too: disk is busy" in message
    assert caught.value.hint == "free some space"
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 3


def test_undo_that_hangs_is_given_up_and_told() -> None:
    """VM-6"""
    journal = Journal()

    async def hang() -> None:
        await asyncio.Event().wait()

    steps = [journal.step("a"), Step("b", journal.note("do b", Unavailable("no b")), hang, undo_timeout=0.01)]
    with pytest.raises(LimpetError, match="undoing 'b' failed too: it did not finish in time"):
        asyncio.run(pipeline.run(steps))
    assert journal.lines[-1] == "undo a"


def test_cancellation_undoes_and_a_second_one_does_not_interrupt_the_undos() -> None:
    """VM-6, VM-14"""
    journal = Journal()

    async def main() -> None:
        booting, undoing = asyncio.Event(), asyncio.Event()

        async def boot() -> None:
            booting.set()
            await asyncio.Event().wait()

        async def slow_undo() -> None:
            undoing.set()
            await asyncio.sleep(0.01)
            journal.lines.append("undo boot")

        task = asyncio.create_task(pipeline.run([journal.step("disks"), Step("boot", boot, slow_undo)]))
        await booting.wait()
        task.cancel()
        await undoing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert journal.lines == ["do disks", "undo boot", "undo disks"]


def test_stages_show_where_it_failed_and_what_was_undone() -> None:
    """VM-6, VM-14"""
    journal = Journal()
    seen: list[list[Stage]] = []
    failing = journal.step("boot", Unavailable("x"))
    steps = [journal.step("disks"), journal.step("net", undo_error=OSError("busy")), failing]
    with pytest.raises(Unavailable):
        asyncio.run(pipeline.run(steps, Stages(seen.append)))
    assert [(stage.name, stage.state) for stage in seen[-1]] == [
        ("disks", "undone"), ("net", "failed"), ("boot", "failed"),
    ]  # fmt: skip
    assert seen[-1][1].detail == "undo failed: busy"
