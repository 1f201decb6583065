"""The primitives of the asynchronous client. `_sio.py` has the same names, for threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import websockets.exceptions

from limpet.client._wire import CONNECT_TIMEOUT

P = ParamSpec("P")
T = TypeVar("T")

_OPTIONS: dict[str, Any] = {
    "compression": None, "proxy": None, "open_timeout": CONNECT_TIMEOUT, "close_timeout": 2.0, "max_size": 8 << 20,
    "ping_interval": None,  # who pauses a pager must not lose the connection
}  # fmt: skip


class Refused(Exception):
    """The handshake of a web socket was answered with an HTTP error."""

    def __init__(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers


class WebSocket:
    """One web socket. Sending and receiving may happen at the same time."""

    def __init__(self, stack: contextlib.AsyncExitStack, connection: Any) -> None:
        self._stack, self._connection = stack, connection

    @classmethod
    async def connect(cls, socket: Path, target: str, headers: dict[str, str]) -> WebSocket:
        """Raises OSError when nobody listens, Refused when the server does not want this one."""
        from websockets.asyncio.client import unix_connect

        stack = contextlib.AsyncExitStack()
        try:
            connection = await stack.enter_async_context(
                unix_connect(str(socket), f"ws://limpet{target}", additional_headers=headers, **_OPTIONS)
            )
        except websockets.exceptions.InvalidStatus as error:
            answer = error.response
            raise Refused(answer.status_code, bytes(answer.body or b""), _lower(answer.headers)) from None
        except websockets.exceptions.InvalidHandshake as error:
            raise ConnectionError(str(error)) from None
        return cls(stack, connection)

    async def recv(self) -> str | bytes | None:
        """The next message; None when the connection is closed, by whomever."""
        try:
            message: str | bytes = await self._connection.recv()
        except websockets.exceptions.ConnectionClosed:
            return None
        return message

    async def send(self, message: str | bytes) -> None:
        """Raises BrokenPipeError when the connection is closed."""
        try:
            await self._connection.send(message)
        except websockets.exceptions.ConnectionClosed:
            raise BrokenPipeError("the connection is closed") from None

    async def close(self) -> None:
        await self._stack.aclose()


def _lower(headers: Any) -> dict[str, str]:
    return {key.lower(): value for key, value in headers.raw_items()}


class Background:
    """Something that goes on beside the caller."""

    def __init__(self, function: Callable[P, Awaitable[None]], *args: P.args, **kwargs: P.kwargs) -> None:
        async def body() -> None:
            await function(*args, **kwargs)

        self._task = asyncio.create_task(body())

    async def join(self) -> None:
        """Wait for its end; raises what it raised."""
        await self._task

    async def close(self) -> None:
        """End it where it can be ended and forget its outcome."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of a function that blocks."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def iterate(data: Iterable[bytes] | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The pieces, whichever way they come."""
    if isinstance(data, AsyncIterable):
        async for chunk in data:
            yield chunk
    else:
        for chunk in data:
            yield chunk
