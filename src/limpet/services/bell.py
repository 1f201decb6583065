"""Waking everybody who waits for a change, without polling and without a queue per waiter."""

from __future__ import annotations

import asyncio


class Bell:
    """Take `next()` before looking at the state, look, then wait for it: a ring in between is not missed."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def next(self) -> asyncio.Event:
        """What the next `ring` will set."""
        return self._next

    def ring(self) -> None:
        """Wake all who wait now."""
        self._next.set()
        self._next = asyncio.Event()
