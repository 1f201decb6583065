"""One payload while its sandbox runs: every generation that is committed is offered, the newest one is published.

offered ──► (not before max(interval, 10 × the last publication)) ──► published ──► offered …
               │ failed: tried again, later and later; 12 times in a row: begun anew
               └ drifted, held back: nothing more until it is confirmed, or is no longer so
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime

from limpet import log
from limpet.errors import DeadlineExceeded, LimpetError, NotFound, Unavailable
from limpet.models import Payload, PayloadStatus
from limpet.services.events import Events
from limpet.services.payloads.building import Built
from limpet.services.payloads.publishing import Drifted, Edition, HeldBack, Publisher
from limpet.services.payloads.state import PayloadState, volume_of
from limpet.services.vaulttable import VaultTable
from limpet.store import SandboxRecord
from limpet.threads import Workers
from limpet.vault import Generation
from limpet.vault.trees import Tree

_SHARE = 10  # publishing takes at most a tenth of the time
_ANEW = 12  # failures in a row after which it begins anew
_SLOWEST_S = 10.0  # between two tries
_LOOK_S = 2.0  # between two looks at whether the host directory was edited, at least …
_LOOK_SHARE = 500  # … so many times the processor time that one takes …
_LOOK_MOST_S = 60.0  # … and at most
_LATE = 3  # intervals after which it is degraded
_RETRY_S = 0.2  # when it is the last chance

_log = log.get("payloads")


class Keeper:
    """`start` and `close` begin and end the loop. `workers`: threads for what blocks."""

    def __init__(
        self,
        payload: Payload,
        record: SandboxRecord,
        publisher: Publisher,
        *,
        events: Events,
        vaults: VaultTable,
        workers: Workers,
    ) -> None:
        self.payload, self.record, self.publisher = payload, record, publisher
        self._events, self._vaults, self._workers = events, vaults, workers
        self._volume = volume_of(payload.id)
        self._newest: Generation | None = None
        self._base: tuple[int, Tree] | None = None  # what was published last
        self._trust = True  # whether what the vault has of it may be compared with
        self._turn = asyncio.Lock()
        self._bell = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._behind: float | None = None  # since when the host directory is known not to be in step
        self._failures = 0
        self._reason: str | None = None
        self._took = 0.0  # seconds for the last publication
        self._next = 0.0  # not before this
        self._look_at = 0.0
        self._look_cost = 0.0  # seconds of processor time
        self.seeding = False

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Publish from now on."""
        if self._loop is None:
            self._loop = asyncio.create_task(self._run(), name=f"payload {self.payload.id}")

    async def close(self) -> None:
        """Publish no more; what is under way is ended first."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)

    def offer(self, generation: Generation) -> None:
        """A new generation is on the host."""
        if self._volume not in generation.volumes or generation.number <= self._done:
            return
        self._newest = generation
        if self._behind is None:
            self._behind = time.monotonic()
        self._bell.set()

    async def _run(self) -> None:
        await self._catch_up()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(min(self._look_at, self._again_at) - time.monotonic(), 0.05)):
                    await self._bell.wait()
            self._bell.clear()
            with log.operation():
                if self._waits and time.monotonic() >= self._next:
                    await self._quietly(self._publish())
                if time.monotonic() >= self._look_at:
                    await self._quietly(self._look())

    async def _catch_up(self) -> None:
        """What was committed before this began."""
        if self._newest is None:
            with contextlib.suppress(LimpetError):
                opened = await self._vaults.find(self.record.id)
                if opened is not None and (head := opened.vault.head) is not None:
                    self.offer(head)

    async def _quietly(self, work: Awaitable[None]) -> None:
        try:
            await work
        except LimpetError:
            return  # noted already
        except Exception:
            _log.exception("a payload's loop met a bug", payload=self.payload.id)

    @property
    def _done(self) -> int:
        published = self.publisher.state.published
        return published.generation if published is not None else 0

    @property
    def _waits(self) -> bool:
        """Whether there is a generation that could be published."""
        state, newest = self.publisher.state, self._newest
        if newest is None or self.seeding or state.seeded != self.record.incarnation:
            return False
        return newest.number > self._done and newest.number >= state.since

    @property
    def _again_at(self) -> float:
        return self._next if self._waits else float("inf")

    # ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _publish(self, *, confirmed: bool = False) -> None:
        """The newest generation, its outcome noted. Raises what prevented it."""
        async with self._turn:
            generation = self._newest
            if generation is None or (not self._waits and not confirmed):
                return
            began = time.monotonic()
            try:
                try:
                    built = await self._attempt(generation, confirmed)
                finally:
                    self._took = time.monotonic() - began
            except (Drifted, HeldBack) as trouble:
                self._troubled("drifted" if isinstance(trouble, Drifted) else "held", trouble.message)
                raise
            except Exception as error:
                known = error if isinstance(error, LimpetError) else _explained(error)
                await self._failed(known)
                raise known from error
            self._next = time.monotonic() + max(self.payload.interval, _SHARE * self._took)
            self._succeeded(generation, built)

    async def _attempt(self, generation: Generation, confirmed: bool) -> Built | None:
        opened = await self._vaults.open(self.record.id)
        with opened.reading() as vault:
            base = self._base if self._base and self._base[0] == self._done else None
            if base is None and self._trust and self._done:
                with contextlib.suppress(NotFound):
                    base = (self._done, await self._workers.run(vault.generation(self._done).tree, self._volume))
            info = generation.volumes[self._volume]
            tree = generation.tree(self._volume)
            edition = Edition(generation.number, generation.time, tree, info.token, info.uuid)
            built = await self._workers.run(
                self.publisher.publish, edition, base[1] if base else None, confirmed=confirmed
            )
            self._base = generation.number, tree
            return built

    def _succeeded(self, generation: Generation, built: Built | None) -> None:
        if self._failures:
            self._emit("payload.recovered", generation=generation.number, after=self._failures)
        self._failures, self._reason, self._trust = 0, None, True
        newest = self._newest
        self._behind = None if newest is None or newest.number <= generation.number else time.monotonic()
        if self._behind is not None:
            self._bell.set()
        if built is not None and built.left_out:
            self._emit("payload.left_out", generation=generation.number, counts=dict(built.left_out))

    def _troubled(self, trouble: str, reason: str) -> None:
        """Nothing more is published until somebody decides; told once."""
        state = self.publisher.state
        self._next = time.monotonic() + max(self.payload.interval, _LOOK_S, _SHARE * self._took)
        if self._behind is None:
            self._behind = time.monotonic()
        if (state.trouble, state.reason) != (trouble, reason):
            told_before = state.trouble == trouble
            self.publisher.save(trouble=trouble, reason=reason)
            if not told_before:
                self._emit(f"payload.{trouble}", reason=reason, hint=self._hint())

    async def _failed(self, error: LimpetError) -> None:
        self._failures += 1
        self._reason, self._base, self._trust = error.message, None, False
        self._next = time.monotonic() + min(self.payload.interval * 2 ** min(self._failures, 6), _SLOWEST_S)
        if self._behind is None:
            self._behind = time.monotonic()
        _log.warning("payload.failed", payload=self.payload.id, failures=self._failures, reason=error.message)
        if self._failures == 1:
            self._emit("payload.failed", reason=error.message)
        if self._failures % _ANEW == 0:
            self.publisher.last = None
            with contextlib.suppress(LimpetError, OSError):
                await self._workers.run(self.publisher.recover)
            self._emit("payload.restarted", failures=self._failures, reason=error.message)

    async def _look(self) -> None:
        """See whether the host directory is as it was left, and remove what readers needed no longer."""
        async with self._turn:
            try:
                for place in await self._workers.run(self.publisher.tend):
                    self._emit("payload.edit_saved", path=str(place))
                if self.publisher.state.seeded == self.record.incarnation and not self.seeding:
                    await self._workers.run(self._timed_look)
                    self._went_away()
            except Drifted as trouble:
                self._troubled("drifted", trouble.message)
            except (LimpetError, OSError) as error:
                await self._failed(error if isinstance(error, LimpetError) else _explained(error))
            finally:
                wait = min(max(_LOOK_S, _LOOK_SHARE * self._look_cost), _LOOK_MOST_S)
                self._look_at = time.monotonic() + wait

    def _timed_look(self) -> None:
        began = time.thread_time()
        try:
            self.publisher.look()
        finally:
            self._look_cost = time.thread_time() - began

    def _went_away(self) -> None:
        """The directory is as it was left: an edit was taken back, a failure was the directory's."""
        if self.publisher.state.trouble == "drifted":
            self.publisher.save(trouble=None, reason=None)
            self._emit("payload.recovered", generation=self._done, after=self._failures)
        if not self._waits and self.publisher.state.trouble is None:
            self._failures, self._reason, self._behind = 0, None, None

    # ── asked for ────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.asynccontextmanager
    async def standing(self) -> AsyncIterator[None]:
        """Publish nothing for the length of a block that seeds the guest anew."""
        self.seeding = True
        try:
            async with self._turn:
                yield
            self._newest, self._base, self._behind = None, None, None
            await self._catch_up()
        finally:
            self.seeding = False

    async def publish_anyway(self) -> None:
        """Publish the newest generation over whatever is there. Raises what prevents it."""
        await self._catch_up()
        if self._newest is None or self._volume not in self._newest.volumes:
            raise Unavailable("there is no generation of it yet", hint=f"limpet sync {self.record.name}")
        await self._publish(confirmed=True)

    async def final(self, timeout: float) -> str | None:
        """The last publication before the VM ends, tried until `timeout` seconds are over; why the directory is not
        the guest's newest generation, or None."""
        await self.close()
        deadline = time.monotonic() + timeout
        while True:
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0.1)):
                    if self._waits:
                        await self._publish()
                    else:
                        await self._look()
                return self.problem()
            except (Drifted, HeldBack):
                return self.problem()
            except (LimpetError, TimeoutError) as error:
                told = error if isinstance(error, LimpetError) else DeadlineExceeded("it was not published in time")
                if time.monotonic() + _RETRY_S > deadline:
                    return f"payload {self.payload.host_dir}: {told.message}"
                await asyncio.sleep(_RETRY_S)

    def problem(self) -> str | None:
        """Why the host directory is not in step, in words."""
        reason = self.publisher.state.reason if self.publisher.state.trouble else self._reason
        return f"payload {self.payload.host_dir}: {reason}" if reason else None

    def status(self) -> PayloadStatus:
        """How it is, without looking."""
        state = self.publisher.state
        age = time.monotonic() - self._behind if self._behind is not None else 0.0
        seeding = self.seeding or state.seeded != self.record.incarnation
        late = age > _LATE * max(self.payload.interval, _SHARE * self._took)
        return PayloadStatus(
            payload=self.payload, sandbox=self.record.name,
            state="seeding" if seeding else state.trouble or ("failing" if self._failures else "ok"),
            generation=self._done or None, time=state.published.time if state.published else None,
            age=round(age, 3), failures=self._failures, degraded=late,
            reason=state.reason or self._reason, hint=self._hint(),
        )  # fmt: skip

    def _hint(self) -> str | None:
        trouble = self.publisher.state.trouble
        confirm = f"limpet payload confirm {self.record.name} {self.payload.id} --keep"
        if trouble == "held":
            return f"{confirm} guest lets the deletion through, {confirm} host seeds the guest anew"
        if trouble == "drifted":
            return f"{confirm} guest publishes (your edits stay beside it), {confirm} host seeds the guest anew"
        return None

    def _emit(self, kind: str, **data: object) -> None:
        self._events.emit(kind, sandbox=self.record, payload=self.payload.id, host_dir=self.payload.host_dir, **data)


def stopped(payload: Payload, sandbox: str, state: PayloadState | None) -> PayloadStatus:
    """How a payload is whose sandbox does not run."""
    published = state.published if state is not None else None
    found = PayloadStatus(payload=payload, sandbox=sandbox, state="stopped", reason=state.reason if state else None)
    if published is None or published.time is None:
        return found
    age = max((datetime.now(UTC) - published.time).total_seconds(), 0.0)
    return found.model_copy(update={"generation": published.generation, "time": published.time, "age": age})


def _explained(error: Exception) -> LimpetError:
    if isinstance(error, OSError):
        return Unavailable(f"{error.strerror or error}: {error.filename or 'the host directory'}")
    _log.exception("a publication failed with a bug", exc_info=error)
    return Unavailable(f"{type(error).__name__}: {error}")
