"""How a syncer fares: how long the oldest change has waited, failures in a row, and what there was to say.

A change is seen (`changed`), taken by the sync that begins next (`began`), and on the host when that succeeds. Changes
seen while it runs wait for the one after it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import datetime

_LATE_S = 3.0  # seconds that a change may wait: three intervals
_FAILURES = 3  # in a row
_LINES = 20


class Health:
    """`clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: float | None = None  # since when a change has been waiting for a sync
        self._taken: float | None = None  # since when the oldest change of the sync under way has been waiting
        self._began = clock()  # the last sync
        self._in_step: float | None = None  # when the host was last known to have everything
        self.failures = 0
        self.reason: str | None = None  # of the last failure, while there are some
        self.told: str | None = None  # the reason for being degraded that was last told
        self.lines: deque[str] = deque(maxlen=_LINES)

    def changed(self) -> None:
        """The guest has written something."""
        if self._waiting is None:
            self._waiting = self._clock()
            if self._taken is None and not self.failures:
                self._in_step = self._waiting

    def began(self) -> None:
        """A sync takes everything that waits."""
        known = [since for since in (self._taken, self._waiting) if since is not None]
        self._taken, self._waiting = min(known, default=None), None
        self._began = self._clock()

    def succeeded(self) -> None:
        """The host has all that the sync took."""
        self._taken, self._in_step, self.failures, self.reason = None, self._began, 0, None

    def failed(self, reason: str) -> int:
        """It came to nothing; how many did so in a row."""
        self.given_up()
        self.failures += 1
        self.reason = reason
        self.note(f"failed: {reason}")
        if self._waiting is None:  # whatever it would have taken is not on the host
            self._waiting = self._began
        return self.failures

    def given_up(self) -> None:
        """It was called off: what it took waits again."""
        known = [since for since in (self._taken, self._waiting) if since is not None]
        self._taken, self._waiting = None, min(known, default=None)

    def note(self, line: str) -> None:
        """Keep a line for whoever asks how it goes."""
        self.lines.append(f"{datetime.now().astimezone():%H:%M:%S} {line}")

    @property
    def lag(self) -> float:
        """Seconds that the oldest change that is not on the host has waited; 0: none waits."""
        known = [since for since in (self._taken, self._waiting) if since is not None]
        return self._clock() - min(known) if known else 0.0

    @property
    def age(self) -> float | None:
        """Seconds since the host was last known to have everything; None: never yet."""
        if self._in_step is None:
            return None
        return self._clock() - self._in_step if self.lag or self.failures else 0.0

    def degraded(self) -> str | None:
        """Why the promise is not kept just now, or None."""
        if self.failures >= _FAILURES:
            return f"{self.failures} syncs failed in a row: {self.reason}"
        if self.lag > _LATE_S:
            return f"a change has waited for {self.lag:.0f} s" + (f": {self.reason}" if self.reason else "")
        return None
