"""A small event loop: epoll, timers, and a way in for threads. asyncio's import alone would cost 450 ms of boot."""

from __future__ import annotations

import os
import select
import time
from _heapq import heappop, heappush
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IN, OUT, HUP, EDGE = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP, select.EPOLLET


class Timer:
    """A call that is due at `when`; `cancel` makes it do nothing. An `urgent` one does not wait while `hold` is on."""

    __slots__ = ("call", "urgent", "when")

    def __init__(self, when: float, call: Callable[[], None], urgent: bool) -> None:
        self.when, self.urgent = when, urgent
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when


class Loop:
    """Runs callbacks when descriptors are ready, timers are due or threads ask for it. One thread runs it."""

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._timers: list[Timer] = []
        self._put_off: list[Timer] = []
        self._soon: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._on_error = on_error
        self.before_wait: Callable[[], None] = lambda: None  # the end of every turn
        self._only: frozenset[int] | None = None
        self.watch(self._wake, IN, self._woken)

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` whenever `fd` is ready; replaces an earlier watch of the same descriptor."""
        known = fd in self._handlers
        self._handlers[fd] = (events, handler)
        if self._only is not None and fd not in self._only:
            events = EDGE
        if known:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching; must come before the descriptor is closed. Harmless when it was not watched."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, call: Callable[[], None], *, urgent: bool = False) -> Timer:
        """Call once after `seconds`."""
        timer = Timer(time.monotonic() + seconds, call, urgent)
        heappush(self._timers, timer)
        return timer

    def hold(self, fds: frozenset[int] | None) -> None:
        """Handle these descriptors and urgent timers only, until called with None: the others wait, none is lost."""
        self._only = None if fds is None else fds | {self._wake}
        for fd, (events, _handler) in self._handlers.items():
            wanted = events if self._only is None or fd in self._only else EDGE  # 0 would report a hang-up for ever
            self._epoll.modify(fd, wanted)
        if fds is None:
            for timer in self._put_off:
                heappush(self._timers, timer)
            self._put_off.clear()

    def soon(self, call: Callable[[], None]) -> None:
        """Call in the next turn. Only from the loop's own thread."""
        self._soon.append(call)

    def from_thread(self, call: Callable[[], None]) -> None:
        """Call in the next turn; from any thread."""
        self._soon.append(call)
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Turn until the process ends."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Wait for something and handle it. An exception in one callback is reported and harms no other."""
        self._guarded(self.before_wait)
        for fd, events in self._epoll.poll(self._patience()):
            entry = self._handlers.get(fd)
            if entry is not None and (self._only is None or fd in self._only):
                try:
                    entry[1](events)
                except Exception as error:
                    self._on_error(error)
        for _ in range(len(self._soon)):
            self._guarded(self._soon.popleft())
        while self._timers and self._timers[0].when <= time.monotonic():
            timer = heappop(self._timers)
            if timer.call is not None and self._only is not None and not timer.urgent:
                self._put_off.append(timer)
            elif timer.call is not None:
                self._guarded(timer.call)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._on_error(error)

    def _patience(self) -> float:
        if self._soon:
            return 0
        while self._timers and self._timers[0].call is None:
            heappop(self._timers)
        return max(self._timers[0].when - time.monotonic(), 0) if self._timers else -1

    def _woken(self, _events: int) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass
