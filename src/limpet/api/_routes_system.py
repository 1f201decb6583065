"""The daemon, its events and operations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from starlette.responses import Response

from limpet.api._endpoint import NDJSON, Call, Endpoint, Many, Raw, lines, stream
from limpet.api.queries import EventsQuery, SetupBody
from limpet.models import DaemonStatus, DoctorReport, Event, Operation


async def daemon_status(call: Call) -> DaemonStatus:
    return await call.services.system.status()


async def shut_down(call: Call) -> None:
    await call.services.system.shutdown()


async def set_up(call: Call) -> Operation:
    return await call.services.system.setup(call.body(SetupBody).mirror)


async def run_doctor(call: Call) -> DoctorReport:
    return await call.services.doctor.run()


async def repair(call: Call) -> DoctorReport:
    return await call.services.doctor.repair()


async def list_operations(call: Call) -> Sequence[Operation]:
    return call.services.operations.list()


async def get_operation(call: Call) -> Operation:
    return call.services.operations.get(call.path("id"))


async def stream_operation(call: Call) -> Response:
    return await stream(lines(call.services.operations.stream(call.path("id"))), NDJSON)


async def cancel_operation(call: Call) -> Operation:
    return await call.services.operations.cancel(call.path("id"))


async def prune_operation(call: Call) -> None:
    call.services.operations.prune(call.path("id"))


async def follow_events(call: Call) -> Response:
    events, query = call.services.events, call.query(EventsQuery)
    after = events.last() if query.after == "now" else query.after
    found = lines(events.follow(after, wait=query.follow))
    # While following, the answer begins at once: the first event may be long in coming.
    return await stream(_with_empty_start(found) if query.follow else found, NDJSON)


async def _with_empty_start(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield b""
    async for line in content:
        yield line


_OPERATION = "/v1/operations/{id}"

ROUTES = (
    Endpoint("GET", "/v1/status", daemon_status, "The daemon: pid, version, protocol, directories", DaemonStatus),
    Endpoint("POST", "/v1/shutdown", shut_down, "End the daemon; VMs go on"),
    Endpoint("POST", "/v1/setup", set_up, "Make kernel, agent disk and base image", Operation, body=SetupBody,
             status=202),
    Endpoint("GET", "/v1/doctor", run_doctor, "Check this machine", DoctorReport),
    Endpoint("POST", "/v1/doctor/repair", repair, "Check and repair what is safe", DoctorReport),
    Endpoint("GET", "/v1/operations", list_operations, "List operations", Many(Operation)),
    Endpoint("GET", _OPERATION, get_operation, "Show one operation", Operation),
    Endpoint("GET", _OPERATION + "/stream", stream_operation, "One line per change; the last is final",
             Raw(NDJSON, Operation)),
    Endpoint("POST", _OPERATION + "/cancel", cancel_operation, "Cancel it; what it did is undone", Operation),
    Endpoint("DELETE", _OPERATION, prune_operation, "Forget one that ended"),
    Endpoint("GET", "/v1/events", follow_events, "Events from a cursor on; a gap is told", Raw(NDJSON, Event),
             query=EventsQuery),
)  # fmt: skip
