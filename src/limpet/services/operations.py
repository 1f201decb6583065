"""Long requests: each runs as a task of its own, reports stages, can be watched, cancelled and pruned (VM-14).

    start ──► running ──► done | failed | cancelled ──► (pruned)

The store has a row from the start on, so that an operation that a crash cut off is not forgotten: the next daemon
marks it failed. Stages and fractions change in memory only; they reach the store when the operation ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from limpet import log
from limpet.errors import BY_CODE, FailedPrecondition, Internal, LimpetError, NotFound, Unavailable
from limpet.models import Operation, Stage
from limpet.names import new_id
from limpet.services.bell import Bell
from limpet.store import Store

KEPT = 1_000  # operations that ended
_CANCEL_WAIT = 30.0  # seconds that `cancel` waits for the undos before it answers

Result = BaseModel | dict[str, Any] | None
Work = Callable[["Stages"], Awaitable[Result]]

_log = log.get("operations")


class Stages:
    """How an operation tells where it is. Every change reaches those who watch it."""

    def __init__(self, changed: Callable[[list[Stage]], None]) -> None:
        self._stages: dict[str, Stage] = {}
        self._changed = changed

    @classmethod
    def unseen(cls) -> Stages:
        """For work that nobody watches."""
        return cls(lambda _stages: None)

    def report(self, stage: Stage) -> None:
        """Add the stage, or replace the one of that name."""
        self._stages[stage.name] = stage
        self._changed(list(self._stages.values()))

    @contextlib.asynccontextmanager
    async def run(self, name: str, detail: str | None = None) -> AsyncIterator[RunningStage]:
        """A stage that lasts as long as the block, and is done or failed by how the block ends."""
        running = RunningStage(self, Stage(name=name, state="running", detail=detail))
        began = time.monotonic()
        try:
            yield running
        except BaseException:
            running.end("failed", time.monotonic() - began)
            raise
        running.end("done", time.monotonic() - began)


class RunningStage:
    """The handle of `Stages.run`."""

    def __init__(self, stages: Stages, stage: Stage) -> None:
        self._stages = stages
        self._stage = stage
        stages.report(stage)

    def update(self, fraction: float | None = None, detail: str | None = None) -> None:
        """Tell progress; what is None stays."""
        told = {"fraction": fraction, "detail": detail}
        self._report({key: value for key, value in told.items() if value is not None})

    def end(self, state: str, seconds: float) -> None:
        self._report({"state": state, "seconds": round(seconds, 3)})

    def _report(self, changes: dict[str, Any]) -> None:
        self._stage = self._stage.model_copy(update=changes)
        self._stages.report(self._stage)


class _Running:
    """An operation with a task: its latest state, and a bell for every change."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.bell = Bell()
        self.task: asyncio.Task[None] | None = None
        self.entered = asyncio.Event()  # a task that is cancelled before its first step would never undo anything
        self.ended = asyncio.Event()

    def change(self, **changes: Any) -> None:
        self.operation = self.operation.model_copy(update=changes)
        self.bell.ring()


class Operations:
    """All operations: the running ones with their tasks, the others from the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._running: dict[str, _Running] = {}
        self._closing = False
        self._fail_leftovers()

    def _fail_leftovers(self) -> None:
        error = Unavailable("the daemon ended while this ran", hint="look at `limpet ls` and try again")
        for operation in self._store.operations("running"):
            self._store.save_operation(_ended(operation, "failed", error={**error.to_dict(), "op_id": operation.id}))

    def start(self, kind: str, target: str | None, work: Work) -> Operation:
        """Run `work(stages)` as a task; its return value is the result. The operation has the id of the current
        request, so that errors, logs and operation share one (a second one of the same request gets its own)."""
        if self._closing:
            raise Unavailable("the daemon is shutting down", hint="try again: the next command starts it again")
        op_id = log.current_op()
        if op_id is None or op_id in self._running or self._store.operation(op_id) is not None:
            op_id = new_id("op")
        operation = Operation(id=op_id, kind=kind, target=target, state="running", started_at=datetime.now(UTC))
        self._store.save_operation(operation)
        running = self._running[op_id] = _Running(operation)
        running.task = asyncio.create_task(self._run(running, work), name=f"{kind} {target} {op_id}")
        return operation

    async def _run(self, running: _Running, work: Work) -> None:
        running.entered.set()
        op_id = running.operation.id
        stages = Stages(lambda found: running.change(stages=found))
        with log.operation(op_id):
            try:
                result = await work(stages)
                ended = _ended(running.operation, "done", result=_plain(result))
            except asyncio.CancelledError:
                ended = self._cancelled(running.operation)
            except Exception as error:
                ended = _ended(running.operation, "failed", error={**_explain(error).to_dict(), "op_id": op_id})
            self._finish(running, ended)

    def _cancelled(self, operation: Operation) -> Operation:
        if not self._closing:
            return _ended(operation, "cancelled")
        error = Unavailable("the daemon was shut down while this ran", hint="try again", op_id=operation.id)
        return _ended(operation, "failed", error=error.to_dict())

    def _finish(self, running: _Running, ended: Operation) -> None:
        try:
            self._store.save_operation(ended)
            self._store.prune_operations(KEPT)
        except Exception:
            _log.exception("cannot record the end of an operation", operation=ended.id)
        running.operation = ended
        del self._running[ended.id]
        running.ended.set()
        running.bell.ring()

    def list(self) -> list[Operation]:
        """All that are known, oldest first."""
        return [self._running[found.id].operation if found.id in self._running else found
                for found in self._store.operations()]  # fmt: skip

    def get(self, op_id: str) -> Operation:
        """Raises NotFound."""
        if running := self._running.get(op_id):
            return running.operation
        if (found := self._store.operation(op_id)) is None:
            raise NotFound(f"no operation {op_id}", hint="it may have been pruned")
        return found

    async def stream(self, op_id: str) -> AsyncGenerator[Operation, None]:
        """The operation as it is now and after every change; the last one is final. A slow reader misses
        intermediate states, never the last. Raises NotFound."""
        running = self._running.get(op_id)
        if running is None:
            yield self.get(op_id)
            return
        while True:
            changed = running.bell.next()
            latest = running.operation
            yield latest
            if latest.state != "running":
                return
            if latest is running.operation:
                await changed.wait()

    async def wait(self, op_id: str) -> Operation:
        """The operation once it ended. Raises NotFound."""
        if running := self._running.get(op_id):
            await running.ended.wait()
            return running.operation
        return self.get(op_id)

    async def cancel(self, op_id: str) -> Operation:
        """Cancel it: the undos run. Waits for them up to 30 s; the operation as it is then (still `running` when
        the undos take longer). Raises NotFound, FailedPrecondition when it ended before."""
        running = self._running.get(op_id)
        if running is None or running.task is None:
            raise FailedPrecondition(f"{op_id} is {self.get(op_id).state}: nothing to cancel")
        await running.entered.wait()
        running.task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CANCEL_WAIT):
                await running.ended.wait()
        return running.operation

    def prune(self, op_id: str) -> None:
        """Forget an operation that ended. Raises NotFound, FailedPrecondition while it runs."""
        if self.get(op_id).state == "running":
            raise FailedPrecondition(f"{op_id} is still running", hint="wait for it or cancel it first")
        self._store.delete_operation(op_id)

    async def close(self, timeout: float = 10.0) -> None:
        """Cancel everything that runs and wait up to `timeout` seconds for the undos; no new ones are accepted."""
        self._closing = True
        for running in list(self._running.values()):
            await running.entered.wait()
        tasks = [running.task for running in self._running.values() if running.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout)
            for task in late:
                _log.warning("an operation did not end in time", task=task.get_name())


def _ended(operation: Operation, state: str, **changes: Any) -> Operation:
    return operation.model_copy(update={"state": state, "ended_at": datetime.now(UTC), **changes})


def _plain(result: Result) -> dict[str, Any] | None:
    return result.model_dump(mode="json") if isinstance(result, BaseModel) else result


def _explain(error: Exception) -> LimpetError:
    """The error for the user: known ones as they are, of several the first with the others named, others as bugs."""
    if isinstance(error, LimpetError):
        return error
    if isinstance(error, ExceptionGroup):
        known = [_explain(one) for one in error.exceptions]
        if len(known) == 1 or not isinstance(known[0], Internal):
            return BY_CODE[known[0].code]("; ".join(one.message for one in known), hint=known[0].hint)
    _log.exception("an operation failed with a bug", exc_info=error)
    return Internal(f"{type(error).__name__}: {error}", hint="a bug in limpet; the daemon's log has the details")
