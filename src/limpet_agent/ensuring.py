"""See that something runs, however many ask at once: one drives, the others wait for it and share what comes of it.

    idle ── ensure ──► probe ── it is ready ──► idle (reused)
     ▲                   │ it is not
     │                   ▼
     ├──── started ── starting ── stop ──► stopping ──► idle
     └──── failed ───────┘

Nothing is believed: every ensure probes. The driver has a thread of its own, so that callers may come and go, and
whatever ends that thread ends the attempt.
"""

from __future__ import annotations

import time
from _queue import SimpleQueue
from _thread import allocate_lock, start_new_thread

from limpet_agent.faults import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")
    Told = Callable[["Stage"], None]

STARTED, REUSED, NOT_READY = "started", "reused", "not_ready"


class Stage:
    """How far a start has come; `state` is "running" or "done"."""

    __slots__ = ("detail", "name", "state")

    def __init__(self, name: str, state: str, detail: str | None = None) -> None:
        self.name, self.state, self.detail = name, state, detail


class Outcome:
    """What an ensure found or did; `started` names what had to be started."""

    __slots__ = ("how", "seconds", "started")

    def __init__(self, how: str, started: list[str], seconds: float) -> None:
        self.how, self.started, self.seconds = how, started, seconds


class Attempt:
    """One probe and, when it says no, one drive. Every follower gets all of its news in a queue of his own."""

    def __init__(self) -> None:
        self.driving = False
        self._began = time.monotonic()
        self._lock = allocate_lock()
        self._news: list[Stage | Outcome | Fault] = []
        self._followers: list[SimpleQueue[Stage | Outcome | Fault]] = []
        self._cancelled = allocate_lock()  # held until somebody cancels: waiting for it is a pause that can be cut off
        self._cancelled.acquire()

    # -- for the driver

    def tell(self, name: str, state: str, detail: str | None = None) -> None:
        """Tell all followers of a stage. Raises Fault when the attempt was cancelled."""
        self.check()
        self._post(Stage(name, state, detail))

    def check(self) -> None:
        """Raises Fault when the attempt was cancelled."""
        self.pause(0)

    def pause(self, seconds: float) -> None:
        """Wait a little. Raises Fault as soon as the attempt is cancelled."""
        if self._cancelled.acquire(timeout=seconds) if seconds else self._cancelled.acquire(blocking=False):
            self._cancelled.release()
            raise Fault("unavailable", "the start was cut off: the container runtime is being stopped")

    def run(self, probe: Callable[[], bool], drive: Callable[[Attempt], list[str]]) -> Outcome:
        """Probe, and drive if need be. Raises whatever those raise."""
        if probe():
            return Outcome(REUSED, [], self._seconds())
        self.driving = True
        return Outcome(STARTED, drive(self), self._seconds())

    def settle(self, end: Outcome | Fault) -> None:
        """This is how it ended."""
        self._post(end)

    # -- for everybody else

    def cancel(self) -> None:
        """Have the driver give up at its next step. Once for an attempt."""
        self._cancelled.release()

    def follow(self, told: Told) -> Outcome:
        """Hear all stages, those that were before too, until the end. Raises Fault, and whatever `told` raises."""
        mailbox: SimpleQueue[Stage | Outcome | Fault] = SimpleQueue()
        with self._lock:
            for news in self._news:
                mailbox.put(news)
            self._followers.append(mailbox)
        while True:
            news = mailbox.get()
            if isinstance(news, Outcome):
                return news
            if isinstance(news, Fault):
                raise Fault(news.code, news.message, news.hint)  # one of his own: raising changes an exception
            told(news)

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _post(self, news: Stage | Outcome | Fault) -> None:
        with self._lock:
            self._news.append(news)
            for mailbox in self._followers:
                mailbox.put(news)


class Ensuring:
    """`probe()`: whether it is ready, by asking it. `drive(attempt)`: make it so; which parts had to be started.
    `done()`: an attempt has gone well."""

    def __init__(
        self, probe: Callable[[], bool], drive: Callable[[Attempt], list[str]], done: Callable[[], None] = lambda: None
    ) -> None:
        self._probe, self._drive, self._done = probe, drive, done
        self._lock = allocate_lock()
        self._one_stop = allocate_lock()
        self._attempt: Attempt | None = None
        self._stopping = False
        self._refused_until = 0.0
        self.error: Fault | None = None  # of the last attempt; None after one that went well

    @property
    def state(self) -> str:
        """idle, starting or stopping."""
        with self._lock:
            if self._stopping:
                return "stopping"
            return "starting" if self._attempt is not None and self._attempt.driving else "idle"

    def look(self) -> Outcome:
        """Only look: nothing is ever started. Waits for nobody."""
        began = time.monotonic()
        how = REUSED if self._probe() else NOT_READY
        return Outcome(how, [], round(time.monotonic() - began, 3))

    def ensure(self, told: Told = lambda _stage: None) -> Outcome:
        """See that it is ready; blocks. Raises the Fault that every other caller of this attempt gets too."""
        return self._join().follow(told)

    def begin(self) -> None:
        """`ensure` in the background. Raises Fault when it is being stopped."""
        self._join()

    def stop(self, work: Callable[[], T], refuse: float = 0.0) -> T:
        """Cut off a start that is under way, then do `work` with none beginning meanwhile, nor for `refuse` seconds
        afterwards, nor until `allow`. Stops come one after another."""
        with self._one_stop:
            with self._lock:
                attempt, self._stopping = self._attempt, True
            try:
                if attempt is not None:
                    _end(attempt)
                return work()
            finally:
                with self._lock:
                    self._stopping, self.error = False, None
                    self._refused_until = time.monotonic() + refuse

    def allow(self) -> None:
        """It may be started again, as soon as a stop that is under way is done."""
        with self._one_stop, self._lock:
            self._refused_until = 0.0

    def _join(self) -> Attempt:
        with self._lock:
            if self._stopping or time.monotonic() < self._refused_until:
                raise Fault("unavailable", "the container runtime is being stopped", "try again in a moment")
            if self._attempt is None:
                self._attempt = Attempt()
                try:
                    start_new_thread(self._run, (self._attempt,))
                except BaseException:
                    self._attempt = None
                    raise
            return self._attempt

    def _run(self, attempt: Attempt) -> None:
        """The driver's thread."""
        end: Outcome | Fault = Fault("internal", "the start of the container runtime broke off")
        try:
            outcome = attempt.run(self._probe, self._drive)
            self._done()
            end = outcome
        except Fault as fault:
            end = fault
        except BaseException as error:
            end = Fault("internal", f"the start of the container runtime failed: {error!r}")
        finally:
            with self._lock:  # from here on nobody joins it
                self._attempt = None
                self.error = end if isinstance(end, Fault) else None
            attempt.settle(end)


def _end(attempt: Attempt) -> Any:
    attempt.cancel()
    try:
        return attempt.follow(lambda _stage: None)
    except Fault:
        return None  # it was cut off, or had failed by itself
