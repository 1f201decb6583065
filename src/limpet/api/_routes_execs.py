"""Commands in the guest: web sockets to run and follow them, plain requests for the rest.

    client → server   text ExecRequest (only on …/exec); then binary: stdin;
                      text {"eof": true}, {"resize": [rows, cols]}, {"signal": "INT"}
    server → client   text {"started"}; binary: 1 byte lane (1 stdout, 2 stderr) + bytes;
                      text {"gap"}, {"exit"}, {"error"}

Both directions hold back: the next message is read when the guest took the last stdin, the next output is asked for
when the client took the last. So a signal waits behind stdin that the command does not read; POST …/signal does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Sequence
from typing import Any

from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from limpet.api import _parse
from limpet.api._endpoint import Call, Endpoint, Many, Raw, Socket, stream
from limpet.api.door import Services
from limpet.api.queries import AttachQuery, Control, ExecQuery, OutputQuery, SignalBody
from limpet.errors import BadRequest, DeadlineExceeded
from limpet.models import ExecInfo, ExecRequest
from limpet.services.streams import LANE_NAMES, ExecEvent, ExecSession, Exit, Gap, Notice, Output, Started

PAYLOAD_MAX = 256 << 10  # bytes of output in one message
_REQUEST_WAIT = 10.0  # seconds in which a client has to say what it wants to run

_EXECS = "/v1/sandboxes/{name}/execs"


async def run_command(services: Services, socket: WebSocket, query: ExecQuery) -> None:
    await socket.accept()
    try:
        async with asyncio.timeout(_REQUEST_WAIT):
            message = await socket.receive()
    except TimeoutError:
        raise DeadlineExceeded(f"no ExecRequest came within {_REQUEST_WAIT:g} s") from None
    if message["type"] == "websocket.disconnect":
        return
    if message.get("text") is None:
        raise BadRequest("the first message must be an ExecRequest as text")
    request = _parse.body(ExecRequest, message["text"].encode(errors="surrogateescape"))
    name = socket.path_params["name"]
    await _follow(socket, await services.execs.start(name, request, start_if_stopped=query.start))


async def attach_command(services: Services, socket: WebSocket, query: AttachQuery) -> None:
    await socket.accept()
    session = await services.execs.attach(
        socket.path_params["name"], socket.path_params["id"],
        stdout=query.stdout, stderr=query.stderr, stdin=query.stdin, steal=query.steal,
    )  # fmt: skip
    await _follow(socket, session)


async def _follow(socket: WebSocket, session: ExecSession) -> None:
    """Carry both directions until the output is at its end or the client goes; the first error ends both."""
    gone: asyncio.Event = socket.scope["state"]["gone"]  # set by the server, also while nothing is read
    try:
        await _first(_carry_out(socket, session), _carry_in(socket, session), gone.wait())
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client was quicker
            await socket.close()
    finally:
        await session.detach()


async def _first(*works: Coroutine[Any, Any, object]) -> None:
    """Wait for the first of these to end, and cancel the others. Raises what it raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _carry_out(socket: WebSocket, session: ExecSession) -> None:
    async for event in session:
        if isinstance(event, Output):
            lane = bytes((event.lane,))
            for start in range(0, len(event.data), PAYLOAD_MAX):
                await socket.send_bytes(lane + event.data[start : start + PAYLOAD_MAX])
        else:
            await socket.send_text(json.dumps(_message(event)))


def _message(event: ExecEvent) -> dict[str, Any]:
    match event:
        case Started():
            return {"started": {"id": event.id, "pid": event.pid}}
        case Gap():
            return {"gap": {"lane": LANE_NAMES[event.lane], "from": event.start, "to": event.end}}
        case Notice():
            return {"notice": {"message": event.message, "hint": event.hint}}
        case Exit():
            return {"exit": event.info.model_dump(mode="json")}
        case Output():
            raise AssertionError("output travels as binary")


async def _carry_in(socket: WebSocket, session: ExecSession) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        if (data := message.get("bytes")) is not None:
            await session.write_stdin(data)
        else:
            await _control(session, _parse.body(Control, message["text"].encode(errors="surrogateescape")))


async def _control(session: ExecSession, control: Control) -> None:
    if control.resize is not None:
        await session.resize(*control.resize)
    if control.signal is not None:
        await session.signal(control.signal)
    if control.eof:
        await session.close_stdin()


async def list_execs(call: Call) -> Sequence[ExecInfo]:
    return await call.services.execs.list(call.name)


async def get_exec(call: Call) -> ExecInfo:
    return await call.services.execs.get(call.name, call.path("id"))


async def signal_exec(call: Call) -> None:
    await call.services.execs.signal(call.name, call.path("id"), call.body(SignalBody).signal)


async def exec_output(call: Call) -> Response:
    query = call.query(OutputQuery)
    return await stream(await call.services.execs.output(call.name, call.path("id"), query.lane, query.offset))


ROUTES = (
    Socket("/v1/sandboxes/{name}/exec", run_command, "Run a command and follow it", ExecQuery, ExecRequest),
    Socket(_EXECS + "/{id}/attach", attach_command, "Follow a command that was started before", AttachQuery, Control),
    Endpoint("GET", _EXECS, list_execs, "List commands, running and ended", Many(ExecInfo)),
    Endpoint("GET", _EXECS + "/{id}", get_exec, "Show one command", ExecInfo),
    Endpoint("POST", _EXECS + "/{id}/signal", signal_exec, "Signal its whole process group", body=SignalBody),
    Endpoint("GET", _EXECS + "/{id}/output", exec_output, "What is kept of its output", Raw(), query=OutputQuery),
)
