"""What surrounds every request: operation id, protocol version, and errors in their one shape (VM-15)."""

from __future__ import annotations

import json
import re
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from limpet import log
from limpet.errors import BadRequest, FailedPrecondition, Internal, LimpetError, NotFound
from limpet.names import new_id
from limpet.version import PROTOCOL

ANY_PROTOCOL = frozenset({"/v1/status", "/v1/shutdown", "/v1/openapi.json"})  # to find out, and to replace a daemon
_OP_ID = re.compile(r"op_[0-9a-z]{1,40}")
_CLOSE_ERROR, _CLOSE_BUG = 1000, 1011  # RFC 6455 §7.4.1; the error itself was told in a text message

_log = log.get("api")


class Envelope:
    """ASGI middleware around the routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("limpet-op-id")
        valid = given is None or _OP_ID.fullmatch(given) is not None
        with log.operation(given if valid else new_id("op")) as op_id:
            answer = _Answer(scope, receive, send, op_id)
            try:
                if not valid:
                    raise BadRequest(f"Limpet-Op-Id {given!r:.60} is not an operation id", hint="for example op_01k8…")
                _check_protocol(scope)
                await self._app(scope, receive, answer.send)
            except (ClientDisconnect, WebSocketDisconnect):
                pass  # nobody is left to be told
            except Exception as error:
                await answer.fail(error)


class _Answer:
    """Passes the answer on with our headers; knows how much of it is out when an error has to be told."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, op_id: str) -> None:
        self._scope, self._receive, self._send, self._op_id = scope, receive, send, op_id
        self._begun = False

    async def send(self, message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.accept"):
            self._begun = True
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            headers["Limpet-Op-Id"], headers["Limpet-Protocol"] = self._op_id, str(PROTOCOL)
        await self._send(message)

    async def fail(self, error: Exception) -> None:
        told = as_limpet_error(error, self._op_id)
        _log.info("request failed", path=self._scope["path"], code=told.code, message=told.message)
        if self._scope["type"] == "websocket":
            await self._fail_socket(told)
        elif self._begun:
            raise error  # too late to tell: the server breaks the connection off, so that it cannot look complete
        else:
            await _json(told)(self._scope, self._receive, self.send)

    async def _fail_socket(self, error: LimpetError) -> None:
        try:
            if not self._begun:
                await self._receive()  # websocket.connect
                await self.send({"type": "websocket.accept"})
            await self._send({"type": "websocket.send", "text": json.dumps({"error": error.to_dict()})})
            code = _CLOSE_BUG if isinstance(error, Internal) else _CLOSE_ERROR
            await self._send({"type": "websocket.close", "code": code})
        except (OSError, RuntimeError):
            pass  # the client is gone


def as_limpet_error(error: BaseException, op_id: str | None) -> LimpetError:
    """The error as the client shall see it. An unknown one is a bug: logged with its traceback, told with its id."""
    if not isinstance(error, LimpetError):
        _log.error("a request failed with a bug", exc_info=error)
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        error = Internal(told, hint="a bug in limpet; `limpet daemon logs` has the details")
    error.op_id = error.op_id or op_id
    return error


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such route, wrong method) in our shape."""
    assert isinstance(error, HTTPException)
    told: LimpetError = BadRequest(f"{request.method} is not allowed here: {error.detail}")
    if error.status_code == 404:
        told = NotFound(f"no endpoint {request.url.path}", hint="GET /v1/openapi.json lists them")
    told.op_id = log.current_op()
    return _json(told, error.status_code)


def _json(error: LimpetError, status: int | None = None) -> Response:
    return Response(json.dumps(error.to_dict()), status or error.http_status, media_type="application/json")


def _check_protocol(scope: MutableMapping[str, Any]) -> None:
    spoken = Headers(scope=scope).get("limpet-protocol")
    if spoken == str(PROTOCOL) or scope["path"] in ANY_PROTOCOL:
        return
    if spoken is None:
        raise FailedPrecondition("the header Limpet-Protocol is missing", hint=f"send Limpet-Protocol: {PROTOCOL}")
    raise FailedPrecondition(
        f"this daemon speaks protocol {PROTOCOL}, the client {spoken!r:.20}",
        hint="`limpet daemon stop` ends this daemon (VMs go on); the next command starts that of the client's version",
    )
