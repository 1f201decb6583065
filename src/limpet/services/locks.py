"""The lock table: two locks per sandbox, and the order in which they may be taken (VM-11).

    lifecycle   held to check and to change state: start, stop, restart, kill, rm, set. Short, except for a boot.
    workspace   held for long guest I/O: import, export, apply. Two imports run one after the other.

Order: workspace is the outer one, lifecycle the inner one.
- Who holds `workspace` may take `lifecycle` for a moment (to check that the sandbox runs, to record a result).
- Who holds `lifecycle` never waits for `workspace`: a stop would wait for an import then. Whatever needs both takes
  `workspace` first. A stop that finds an import under way does not wait; the import fails when the guest goes.
- Neither is re-entrant, and nobody holds locks of two sandboxes at once.
A violation is a bug and raises RuntimeError at once instead of a deadlock one day.

Waiting is fair (first come, first served) and bounded; when the bound runs out, Busy says who holds the lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from limpet import log
from limpet.errors import Busy

Kind = Literal["lifecycle", "workspace"]


@dataclass
class _Holder:
    what: str
    op_id: str | None
    task: asyncio.Task[object] | None
    since: float = field(default_factory=time.monotonic)


@dataclass
class _Entry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    holder: _Holder | None = None
    users: int = 0  # holder and waiters; at 0 the entry goes


class Locks:
    """Locks by sandbox id. `what` says in a few words what the lock is wanted for, for example "stop of web"."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Kind, str], _Entry] = {}

    def lifecycle(
        self, sandbox_id: str, what: str, *, wait: float = 120.0
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """Hold the lifecycle lock for a block. Raises Busy after `wait` seconds."""
        return self._hold("lifecycle", sandbox_id, what, wait)

    def workspace(
        self, sandbox_id: str, what: str, *, wait: float = 600.0
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """Hold the workspace lock for a block. Raises Busy after `wait` seconds."""
        return self._hold("workspace", sandbox_id, what, wait)

    def holder(self, kind: Kind, sandbox_id: str) -> str | None:
        """What the lock is held for just now, or None when it is free."""
        entry = self._entries.get((kind, sandbox_id))
        return entry.holder.what if entry and entry.holder else None

    @contextlib.asynccontextmanager
    async def _hold(self, kind: Kind, sandbox_id: str, what: str, wait: float) -> AsyncIterator[None]:
        self._check_order(kind, sandbox_id, what)
        key = (kind, sandbox_id)
        entry = self._entries.setdefault(key, _Entry())
        entry.users += 1
        try:
            await _acquire(entry, what, wait)
            entry.holder = _Holder(what, log.current_op(), asyncio.current_task())
            try:
                yield
            finally:
                entry.holder = None
                entry.lock.release()
        finally:
            entry.users -= 1
            if entry.users == 0:
                del self._entries[key]

    def _check_order(self, kind: Kind, sandbox_id: str, what: str) -> None:
        me = asyncio.current_task()
        for (held, of), entry in self._entries.items():
            # The one thing allowed while holding anything is lifecycle inside workspace, of the same sandbox.
            allowed = (held, kind) == ("workspace", "lifecycle") and of == sandbox_id
            if entry.holder and entry.holder.task is me and not allowed:
                raise RuntimeError(f"{what}: {kind} asked for while holding {held} of {of}")


async def _acquire(entry: _Entry, what: str, wait: float) -> None:
    try:
        async with asyncio.timeout(wait):
            await entry.lock.acquire()
    except TimeoutError:
        raise Busy(f"{what} has to wait{_blame(entry.holder)}", hint="try again when that is done") from None


def _blame(holder: _Holder | None) -> str:
    if holder is None:
        return ""
    held = f" for {holder.what}, which has been running for {time.monotonic() - holder.since:.0f} s"
    return held + (f" ({holder.op_id})" if holder.op_id else "")
