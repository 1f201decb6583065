"""The syncer of one running VM: when what it wrote is brought to the host, and how far behind the host is.

    (begin) ──► sync ──► watch ──► changed ──► (at most one a second) ──┐
                 ▲ └ failed: counted, tried again                       │
                 └──────────────────────────────────────────────────────┘

A sandbox in which nothing is written costs nothing: the guest watches, nobody asks. The watch for the next change
begins as soon as the snapshots of a sync are taken, so that nothing that happens meanwhile is seen late.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Set

from limpet import log
from limpet.errors import FailedPrecondition, Internal, LimpetError, Unavailable, Unimplemented
from limpet.guest.volumes import Volumes
from limpet.models import State, SyncResult
from limpet.services import generations
from limpet.services.health import Health
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.vault import BadStream, Generation

INTERVAL = 1.0  # seconds between the beginnings of two syncs while the guest writes
_BEGIN_S = 1.0  # after a start: first commands come first
_SLOW_S = 10.0  # between two tries when many failed
_HOPELESS_S = 60.0  # between two tries of what this guest cannot do
_HOLD_S = 2.0  # that a sync which was asked for may take to end before the guest stands still
_PAUSE_S = 0.05  # at least, after a failure
_RENEW_AFTER = 12  # failures in a row after which the channel is opened anew
_IDLE_LOOK_S = 1.0  # between two looks at whether syncing is wanted
_FINAL_PAUSES = (0.0, 0.2, 0.4, 0.8, 1.6)  # seconds before each try of the last sync

Told = Callable[[str, Generation], Awaitable[None]]
_log = log.get("syncer")


class Syncer:
    """`start` and `hold` begin and end the loop; `now` syncs at once, with or without it."""

    def __init__(self, host: Host, vm: LiveVM, told: Told) -> None:
        self.vm = vm
        self.health = Health()
        self._host, self._told = host, told
        self._turn = asyncio.Lock()  # one sync at a time
        self._loop: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[list[str]] | None = None
        self._clean: dict[str, int] = {}  # up to which of its transactions the host has each volume
        self._began = 0.0  # the last sync of any kind
        self._whole: tuple[float, SyncResult] | None = None  # when the last sync of everything began, and its outcome
        self._whole_trees = False  # whether differences do not fit, so that everything has to be sent
        self._next = 0.0  # before this the loop does not sync again
        self.newest: int | None = None  # the generation that was found or made last
        self._heard = 0  # the generation that others were told of last

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Keep the vault in step from now on."""
        if self._loop is None:
            self._loop = asyncio.create_task(self._run(), name=f"sync {self.vm.sandbox_id}")

    async def hold(self) -> None:
        """Sync no more by itself. What is under way is given up; it left nothing behind."""
        tasks = [task for task in (self._loop, self._watching) if task is not None]
        self._loop = self._watching = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HOLD_S), self._turn:  # one that was asked for
                pass

    async def _run(self) -> None:
        await asyncio.sleep(_BEGIN_S)
        while True:
            try:
                await self._turn_of_loop()
            except LimpetError:  # counted and told
                await asyncio.sleep(_PAUSE_S)
            except Exception:
                _log.exception("a syncer met a bug", sandbox=self.vm.sandbox_id)
                await asyncio.sleep(_SLOW_S)

    async def _turn_of_loop(self) -> None:
        if not self._wanted():
            await asyncio.sleep(_IDLE_LOOK_S)
            return
        named, known = await self._changes(), time.monotonic()
        await asyncio.sleep(max(self._next - known, 0.0))
        if not self._wanted():  # any more
            return
        with log.operation():
            async with self._turn:
                await self._attempt(named if self._began <= known else frozenset())

    def _wanted(self) -> bool:
        record = self._host.records.find(self.vm.sandbox_id)
        if record is None or record.state is not State.RUNNING or self.vm.ended_by_us or self.vm.stall is not None:
            return False
        return self._host.config.sync_auto or bool(record.payloads)

    async def _changes(self) -> Set[str]:
        """Wait for a change: the volumes that the guest names. Nothing, at once, when nobody watches or the watch was
        lost: then the guest has to be asked."""
        while (watching := self._watching) is not None:
            await asyncio.wait([watching])
            if watching is self._watching:  # else a sync that was asked for has begun another one
                self._watching = None
                return _outcome(watching)
        return frozenset()

    def _watch(self, guest: Volumes, clean: Mapping[str, int]) -> None:
        """From now on notice what the host does not have."""
        self._unwatch()
        self._clean = dict(clean)
        self._watching = asyncio.create_task(guest.watch(self._clean), name=f"watch {self.vm.sandbox_id}")
        self._watching.add_done_callback(lambda watching: self.health.changed() if _outcome(watching) else None)

    def _unwatch(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    # ── syncing ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def now(self) -> SyncResult:
        """Everything that was written before this call is in the generation that is answered. Raises what prevents
        it."""
        asked = time.monotonic()
        async with self._turn:
            if self._whole is None or self._whole[0] < asked:
                began = time.monotonic()
                generation, new = await self._attempt(None)
                took = round(time.monotonic() - began, 3)
                number, when = (generation.number, generation.time) if generation else (None, None)
                self._whole = began, SyncResult(generation=number, time=when, new=new, seconds=took)
            return self._whole[1]

    async def final(self, timeout: float) -> tuple[int | None, str | None]:
        """The last sync before the VM ends: the newest generation, and what prevented it from being the present. Tries
        again, a few times and until `timeout` seconds are over; afterwards the loop is held."""
        try:
            async with asyncio.timeout(timeout):
                problem = await self._try_finally()
        except TimeoutError:
            problem = self.health.reason or (f"it took more than {timeout:.0f} s" if timeout else "no time was left")
        await self.hold()
        return self.newest, problem

    async def _try_finally(self) -> str | None:
        problem = None
        for pause in _FINAL_PAUSES:
            await asyncio.sleep(pause)
            try:
                await self.now()
                return None
            except LimpetError as error:
                problem = error.message
        return problem

    async def _attempt(self, named: Set[str] | None) -> tuple[Generation | None, bool]:
        """One sync, its outcome noted. The caller has the turn."""
        self._began = time.monotonic()
        self._next = self._began + INTERVAL
        self.health.began()
        try:
            generation, new = await self.vm.unless_stalled(self._sync(named))
        except asyncio.CancelledError:
            self.health.given_up()
            raise
        except Exception as error:
            known = error if isinstance(error, LimpetError) else _explained(error)
            await self._failed(known)
            raise known from error
        self._succeeded(generation, new)
        return generation, new

    async def _sync(self, named: Set[str] | None) -> tuple[Generation | None, bool]:
        guest = Volumes(await self.vm.agent())
        opened = await self._host.vaults.open(self.vm.sandbox_id)
        await self._tell(opened.vault.head)  # a sync may have been called off when it had committed
        async with opened.lock:
            self.newest = opened.vault.head.number if opened.vault.head is not None else None
            sync = generations.Sync(guest, self._host.vaults, opened.vault, whole=self._whole_trees)
            await sync.look(named, self._clean)
            if not sync.needed:
                if self._watching is None:
                    self._watch(guest, sync.clean)
                return opened.vault.head, False
            try:
                generation = await sync.take(lambda: self._watch(guest, sync.clean))
            except BaseException:
                self._unwatch()  # what it was to watch from is not on the host
                self._clean = {}
                raise
        if generation is None:
            return opened.vault.head, False
        self.newest = generation.number
        await self._tell(generation)
        return generation, True

    async def _tell(self, generation: Generation | None) -> None:
        """Let others know of a generation, once."""
        if generation is not None and generation.number != self._heard:
            self._heard = generation.number
            await self._told(self.vm.sandbox_id, generation)

    async def pending(self) -> tuple[int, int]:
        """How many files and bytes are not on the host yet, by the guest's word. Raises when it cannot tell."""
        async with self._turn:
            guest = Volumes(await self.vm.agent())
            opened = await self._host.vaults.open(self.vm.sandbox_id)
            async with opened.lock:
                sync = generations.Sync(guest, self._host.vaults, opened.vault)
                await sync.look(frozenset(), self._clean)
                return await sync.count()

    # ── how it goes ──────────────────────────────────────────────────────────────────────────────────────────────

    def _succeeded(self, generation: Generation | None, new: bool) -> None:
        failed, self._whole_trees = self.health.failures, False
        self.health.succeeded()
        if failed:
            self.health.note(f"synced again after {failed} failures")
            self.look()
        if new and generation is not None:
            _log.debug("synced", sandbox=self.vm.sandbox_id, generation=generation.number)

    async def _failed(self, error: LimpetError) -> None:
        if self.vm.ended_by_us or self.vm.stall is not None or not self.vm.machine.alive():
            self.health.given_up()  # no fault of the guest's, and told elsewhere
            return
        failures = self.health.failed(error.message)
        self._whole_trees = self._whole_trees or isinstance(error, BadStream)  # the differences do not fit
        hopeless = isinstance(error, Unimplemented)
        self._next = time.monotonic() + (_HOPELESS_S if hopeless else INTERVAL if failures < _RENEW_AFTER else _SLOW_S)
        _log.warning("sync.failed", sandbox=self.vm.sandbox_id, failures=failures, reason=error.message)
        if failures == 1:
            self._emit("sync.failed", reason=error.message)
        if failures % _RENEW_AFTER == 0 and isinstance(error, Unavailable):
            self.health.note("the channel is opened anew")
            await self.vm.hang_up()
        self.look()

    def degraded(self) -> str | None:
        """Why the host is not kept in step as it should be, or None."""
        return self.health.degraded() if self._wanted() else None

    def look(self) -> None:
        """Tell, once, when the host has fallen behind, and when it caught up again."""
        if not self._wanted():
            return
        why = self.health.degraded()
        if why is not None and self.health.told is None:
            self._emit("sync.degraded", reason=why)
        elif why is None and self.health.told is not None:
            self._emit("sync.recovered")
        self.health.told = why

    def _emit(self, kind: str, **data: str) -> None:
        if (record := self._host.records.find(self.vm.sandbox_id)) is not None:
            self._host.events.emit(kind, sandbox=record, **data)


def _outcome(watching: asyncio.Task[list[str]]) -> Set[str]:
    """The volumes that a watch named; none when it was cancelled or lost."""
    return frozenset() if watching.cancelled() or watching.exception() else frozenset(watching.result())


def _explained(error: Exception) -> LimpetError:
    if isinstance(error, OSError):
        where = error.filename or "the vault"
        return FailedPrecondition(f"{where} cannot be written: {error.strerror or error}", hint="see: limpet doctor")
    _log.exception("a sync failed with a bug", exc_info=error)
    return Internal(f"{type(error).__name__}: {error}")
