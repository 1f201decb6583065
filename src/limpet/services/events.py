"""The event stream: ordered, durable, resumed from a cursor; what is not kept any more is told by a `gap` (EVT-1)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

from limpet import log
from limpet.models import Event
from limpet.services.bell import Bell
from limpet.store import SandboxRecord, Store

_BATCH = 500  # events read from the store at a time


class Events:
    """Emits and follows. An event is on the disk before any follower sees it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._bell = Bell()
        self._closed = False

    def emit(self, kind: str, sandbox: SandboxRecord | None = None, **data: Any) -> Event:
        """Record that something happened, under the current operation id. `data` must be JSON."""
        event = self._store.append_event(
            kind,
            sandbox=sandbox.name if sandbox else None,
            sandbox_id=sandbox.id if sandbox else None,
            op_id=log.current_op(),
            data=data,
        )
        self._bell.ring()
        return event

    def last(self) -> int:
        """The number of the newest event: the cursor that means "from now on"."""
        return self._store.last_event()

    async def follow(self, after: int | None = None, *, wait: bool = True) -> AsyncGenerator[Event, None]:
        """The events with a number above `after` (None: all that are kept); with `wait` also those to come, until
        the daemon ends. A cursor whose successor is not kept any more, or that is ahead of the stream, first gets an
        event of kind `gap` whose data says which numbers are missing."""
        cursor = self._store.first_event() - 1 if after is None else after
        while True:
            changed = self._bell.next()
            if (gap := self._gap(cursor)) is not None:
                yield gap
                cursor = gap.seq
            batch = self._store.events_after(cursor, limit=_BATCH)
            for event in batch:
                yield event
                cursor = event.seq
            if batch:
                continue
            if not wait or self._closed:
                return
            await changed.wait()

    def _gap(self, cursor: int) -> Event | None:
        first, last = self._store.first_event(), self._store.last_event()
        if cursor + 1 < first:
            return _gap_event(first - 1, cursor + 1, first - 1, "these events are no longer kept")
        if cursor > last:
            return _gap_event(last, last + 1, cursor, "the cursor is ahead of this stream: it was reset")
        return None

    def close(self) -> None:
        """End all followers once they have seen everything."""
        self._closed = True
        self._bell.ring()


def _gap_event(seq: int, start: int, end: int, why: str) -> Event:
    return Event(seq=seq, time=datetime.now(UTC), kind="gap", data={"from": start, "to": end, "why": why})
