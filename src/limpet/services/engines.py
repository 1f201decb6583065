"""The container engines of running sandboxes: one start for all who want one (RUN-1), and back after a stop that came
to nothing.

    limpet runtime ensure ─┐                 ┌ runtime.started, runtime.failed: told once
    limpet runtime ensure ─┼─► a start ──────┤
    the Docker socket     ─┘   rt.ensure     └ its result, or its error, is everybody's

Whether an engine is ready is asked of the guest every time. Who goes away ends nobody's start: not here, not there.
"""

from __future__ import annotations

import asyncio

from limpet import log
from limpet.crashpoint import crashpoint
from limpet.errors import LimpetError, Unavailable, Unimplemented
from limpet.guest.runtime import Ensured, Runtime, Stopped, Told
from limpet.services.events import Events
from limpet.services.live import LiveVM
from limpet.services.records import Records

_TIMEOUT = 120.0  # seconds for a start from cold; it takes 16 without KVM
_PATIENCE = 15.0  # seconds for the agent to answer
_log = log.get("engines")


def _unheard(_stage: str, _state: str, _detail: str | None) -> None:
    """For who does not want to know."""


class _Start:
    """One start that is under way, and who waits for it."""

    def __init__(self, vm: LiveVM) -> None:
        self.vm = vm
        self._stages: dict[str, tuple[str, str | None]] = {}
        self._listeners: list[Told] = []

    def tell(self, stage: str, state: str, detail: str | None) -> None:
        self._stages[stage] = state, detail
        for listener in self._listeners:
            listener(stage, state, detail)

    async def follow(self, task: asyncio.Task[Ensured], told: Told) -> Ensured:
        """Its outcome. Who comes late hears first how far it is."""
        for stage, (state, detail) in self._stages.items():
            told(stage, state, detail)
        self._listeners.append(told)
        try:
            return await asyncio.shield(task)
        finally:
            self._listeners.remove(told)


class Engines:
    """All starts that are under way."""

    def __init__(self, records: Records, events: Events) -> None:
        self._records, self._events = records, events
        self._starts: dict[str, tuple[_Start, asyncio.Task[Ensured]]] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def ensure_now(self, vm: LiveVM, told: Told = _unheard) -> Ensured:
        """See that the engine of this VM is ready. Raises FailedPrecondition, naming it, when something is missing;
        Unavailable and DeadlineExceeded when it does not come up."""
        start, task = self._starts.get(vm.sandbox_id, (None, None))
        if start is None or task is None or start.vm is not vm:
            start = _Start(vm)
            task = asyncio.create_task(self._run(start), name=f"engine of {vm.sandbox_id}")
            task.add_done_callback(self._ended)
            self._starts[vm.sandbox_id] = start, task
        return await start.follow(task, told)

    async def _run(self, start: _Start) -> Ensured:
        vm = start.vm
        record = self._records.find(vm.sandbox_id)
        try:
            with vm.in_use():
                runtime = Runtime(await vm.agent(_PATIENCE))
                ensured = await vm.unless_stalled(runtime.ensure(start.tell, timeout=_TIMEOUT))
            if ensured.how == "not_ready":
                raise Unavailable("the container engine is not ready", hint="limpet runtime status NAME")
        except LimpetError as error:
            self._events.emit("runtime.failed", sandbox=record, reason=error.message)
            raise
        if ensured.how == "started":
            found = {"seconds": ensured.seconds, "started": list(ensured.started)}
            self._events.emit("runtime.started", sandbox=record, **found)
        return ensured

    def _ended(self, task: asyncio.Task[Ensured]) -> None:
        for sandbox_id, (_, known) in list(self._starts.items()):
            if known is task:
                del self._starts[sandbox_id]
        if not task.cancelled():
            task.exception()  # retrieved: everybody who waited for it may have gone

    def go_on(self, vm: LiveVM) -> None:
        """A stop of this VM came to nothing: the engine comes back in the background, if it is one that does."""
        task = asyncio.create_task(self._go_on(vm), name=f"engine of {vm.sandbox_id} goes on")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _go_on(self, vm: LiveVM) -> None:
        try:
            await vm.unless_stalled(Runtime(await vm.agent(_PATIENCE)).go_on())
        except Unimplemented:  # the agent of an older limpet, without an engine
            return
        except LimpetError as error:
            _log.warning("engine.not_back", sandbox=vm.sandbox_id, reason=error.message)

    async def close(self) -> None:
        """Wait for none of them any more; guests go on."""
        tasks = [*self._background, *(task for _, task in self._starts.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def stop_now(vm: LiveVM, seconds: float, *, keep: bool) -> Stopped:
    """Stop the containers of this VM, then its engine; what has not ended after `seconds` is killed. Nothing happens
    when none runs. `keep`: it comes back with the sandbox, if it did so far."""
    runtime = Runtime(await vm.agent())
    crashpoint("stop.runtime.before")
    stopped = await vm.unless_stalled(runtime.stop(seconds, keep=keep))
    crashpoint("stop.runtime.after")
    return stopped
