"""A sequence of named steps, each with its undo (VM-6).

    do 1 ──► do 2 ──► do 3 ✗            a step fails, or the whole is cancelled
             undo 1 ◄── undo 2 ◄── undo 3

The undo of the failing step runs too: it may have got half way, so an undo must cope with a step that did nothing.
Undos run to their end, each within its bound, whatever else fails or is cancelled meanwhile; what fails in them is
reported together with the first error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from limpet import errors, log
from limpet.errors import LimpetError
from limpet.models import Stage

_log = log.get("pipeline")


class Progress(Protocol):
    """Where a pipeline reports to; `operations.Stages` is one."""

    def run(self, name: str) -> contextlib.AbstractAsyncContextManager[object]: ...

    def report(self, stage: Stage) -> None: ...


@dataclass(frozen=True)
class Step:
    """`do` and `undo` share what they need through their closure. `undo_timeout` is in seconds."""

    name: str
    do: Callable[[], Awaitable[object]]
    undo: Callable[[], Awaitable[object]] | None = None
    undo_timeout: float = 30.0


class _Silent:
    @contextlib.asynccontextmanager
    async def run(self, name: str) -> AsyncIterator[None]:
        yield

    def report(self, stage: Stage) -> None:
        pass


async def run(steps: Sequence[Step], progress: Progress | None = None) -> None:
    """Do the steps in order. When one raises, undo in reverse and raise its error; when undos fail as well, raise an
    error of the same code that names them all, caused by an ExceptionGroup of all."""
    progress = progress or _Silent()
    begun: list[Step] = []
    try:
        for step in steps:
            begun.append(step)
            async with progress.run(step.name):
                await step.do()
    except BaseException as error:
        failures = await _uninterrupted(_undo(begun, progress))
        if failures and isinstance(error, Exception):
            raise _together(error, failures) from ExceptionGroup("step and undos", [error, *failures.values()])
        raise


async def _undo(begun: Sequence[Step], progress: Progress) -> dict[str, Exception]:
    """Undo in reverse; what failed, by step."""
    failures: dict[str, Exception] = {}
    for step in reversed(begun):
        if step.undo is None:
            continue
        try:
            async with asyncio.timeout(step.undo_timeout):
                await step.undo()
            if step is not begun[-1]:  # that one stays "failed": it is where the trouble was
                progress.report(Stage(name=step.name, state="undone"))
        except Exception as error:
            _log.exception("undo failed", step=step.name)
            failures[step.name] = error
            progress.report(Stage(name=step.name, state="failed", detail=f"undo failed: {_say(error)}"))
    return failures


async def _uninterrupted(work: Awaitable[dict[str, Exception]]) -> dict[str, Exception]:
    """Wait for `work` to its end, also when this task is cancelled (again) meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    return task.result()


def _together(error: Exception, failures: dict[str, Exception]) -> LimpetError:
    undone = "; ".join(f"undoing {name!r} failed too: {_say(failure)}" for name, failure in failures.items())
    code = error.code if isinstance(error, LimpetError) else "internal"
    hint = error.hint if isinstance(error, LimpetError) else None
    return errors.BY_CODE[code](f"{_say(error)}; {undone}", hint=hint or "`limpet doctor --repair` cleans up leftovers")


def _say(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "it did not finish in time"
    return str(error) or type(error).__name__
