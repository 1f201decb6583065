"""The route table's vocabulary: what an endpoint takes and gives, as data. Routes and OpenAPI are both made from it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from limpet.api import _parse
from limpet.api.door import Services
from limpet.api.queries import NoParameters, Parameters
from limpet.errors import BadRequest, Unavailable

M = TypeVar("M", bound=BaseModel)
BODY_MAX = 1 << 20  # bytes of a JSON body
RAW = "application/octet-stream"
TAR = "application/x-tar"
NDJSON = "application/x-ndjson"
TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Many:
    """A JSON array of one model."""

    model: type[BaseModel]


@dataclass(frozen=True)
class Raw:
    """A body of bytes; with a model: lines of it."""

    media: str = RAW
    model: type[BaseModel] | None = None


Result = BaseModel | Sequence[BaseModel] | Response | None
Answer = type[BaseModel] | Many | Raw | None  # None: an empty object


@dataclass(frozen=True)
class Endpoint:
    """One line of the route table. `body` is the model of a JSON body, or Raw for bytes that are streamed."""

    method: str
    path: str
    handle: Callable[[Call], Awaitable[Result]]
    summary: str
    answer: Answer = None
    query: type[Parameters] = NoParameters
    body: type[BaseModel] | Raw | None = None
    status: int = 200

    def route(self, services: Services) -> Route:
        async def endpoint(request: Request) -> Response:
            call = Call(services, request, _parse.query(self.query, request.scope["query_string"]))
            if self.body is not None and not isinstance(self.body, Raw):
                call.parsed = _parse.body(self.body, await _whole_body(request))
            return _response(await self.handle(call), self.status)

        return Route(self.path, endpoint, methods=[self.method], name=self.name)

    @property
    def name(self) -> str:
        """Names the operation in the OpenAPI document."""
        return self.handle.__name__.strip("_")


@dataclass(frozen=True)
class Socket:
    """A web socket of the route table. `handle` runs after the handshake; what it raises is told to the client."""

    path: str
    handle: Callable[[Services, WebSocket, Any], Awaitable[None]]
    summary: str
    query: type[Parameters]
    receives: type[BaseModel]  # first text message, or any

    def route(self, services: Services) -> WebSocketRoute:
        async def endpoint(socket: WebSocket) -> None:
            query = _parse.query(self.query, socket.scope["query_string"])
            await self.handle(services, socket, query)

        return WebSocketRoute(self.path, endpoint, name=self.name)

    @property
    def name(self) -> str:
        return self.handle.__name__.strip("_")


@dataclass
class Call:
    """One request on its way through a handler."""

    services: Services
    request: Request
    parameters: Parameters
    parsed: BaseModel | None = None

    @property
    def name(self) -> str:
        """The sandbox that the path names."""
        return self.path("name")

    def path(self, key: str) -> str:
        return cast(str, self.request.path_params[key])

    def query(self, model: type[M]) -> M:
        assert isinstance(self.parameters, model)
        return self.parameters

    def body(self, model: type[M]) -> M:
        assert isinstance(self.parsed, model)
        return self.parsed

    @property
    def size(self) -> int | None:
        """The announced length of the body in bytes."""
        text = self.request.headers.get("content-length")
        return int(text) if text else None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, in constant memory. Raises Unavailable when the client goes before its end."""
        try:
            async for chunk in self.request.stream():
                if chunk:
                    yield chunk
        except ClientDisconnect:
            raise Unavailable("the client went away in the middle of the body") from None


async def stream(chunks: AsyncIterator[bytes], media: str = RAW, headers: dict[str, str] | None = None) -> Response:
    """A streamed answer. The first chunk is awaited here, so that an error before it is answered as one; an error
    after it breaks the connection off without the closing chunk."""
    source = chunks.__aiter__()
    try:
        first = await anext(source, b"")
    except BaseException:
        await _close(source)
        raise
    return _Streamed(first, source, media, headers)


async def lines(models: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
    """One JSON object a line, as NDJSON wants it."""
    try:
        async for model in models:
            yield _parse.dump(model) + b"\n"
    finally:
        await _close(models)


class _Streamed(StreamingResponse):
    """Closes its source at once when the client goes, not whenever it is collected."""

    def __init__(self, first: bytes, source: AsyncIterator[bytes], media: str, headers: dict[str, str] | None) -> None:
        self._source = source

        async def body() -> AsyncIterator[bytes]:
            yield first
            async for chunk in source:
                yield chunk

        super().__init__(body(), media_type=media, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await _close(self.body_iterator)
            await _close(self._source)


async def _close(source: object) -> None:
    if close := getattr(source, "aclose", None):
        with contextlib.suppress(RuntimeError):  # it is being closed by its own cancellation already
            await close()


async def _whole_body(request: Request) -> bytes:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > BODY_MAX:
            raise BadRequest(f"the body is larger than {BODY_MAX >> 20} MiB")
    return bytes(content)


def _response(result: Result, status: int) -> Response:
    if isinstance(result, Response):
        return result
    if result is None:
        content = b"{}"
    elif isinstance(result, BaseModel):
        content = _parse.dump(result)
    else:
        content = b"[" + b",".join(_parse.dump(item) for item in result) + b"]"
    return Response(content, status, media_type="application/json")


def routes(table: Sequence[Endpoint | Socket], services: Services) -> list[BaseRoute]:
    """The Starlette routes of a table."""
    return [line.route(services) for line in table]
