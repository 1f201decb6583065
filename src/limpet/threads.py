"""Blocking work in a thread whose end is always awaited, and how such a thread takes what comes on the event loop."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")
_END = object()


async def to_its_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread. A cancellation takes effect when it has ended: nobody cleans up under its feet."""
    return await _ended(asyncio.create_task(asyncio.to_thread(work, *args, **kwargs)))


class Workers:
    """A few threads of their own for work that comes without end: it never takes those that short work waits for. Not
    of a lower priority: one that is made to wait while it holds the interpreter's lock makes everybody wait."""

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, name)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `to_its_end`, in one of these threads."""
        bound = functools.partial(contextvars.copy_context().run, work, *args, **kwargs)
        return await _ended(asyncio.ensure_future(asyncio.wrap_future(self._pool.submit(bound))))

    def later(self, work: Callable[[], object]) -> None:
        """Run `work` some time, with nobody waiting for it."""
        self._pool.submit(work)


class Feed(Generic[T]):
    """What an asynchronous iterator gives, for iteration in a thread: each item is asked for when the one before was
    taken. Made on the event loop; `give_up` ends the wait of the thread."""

    def __init__(self, source: AsyncIterator[T]) -> None:
        self._source, self._loop = source, asyncio.get_running_loop()
        self._asked: asyncio.Task[object] | None = None
        self._over = False

    def __iter__(self) -> Iterator[T]:
        while (item := asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()) is not _END:
            yield cast(T, item)

    async def _next(self) -> object:
        if self._over:
            raise asyncio.CancelledError
        self._asked = asyncio.current_task()
        try:
            return await anext(self._source, _END)
        finally:
            self._asked = None

    def give_up(self) -> None:
        """Nothing more is given; on the event loop."""
        self._over = True
        if self._asked is not None:
            self._asked.cancel()


async def _ended(task: asyncio.Future[T]) -> T:
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
