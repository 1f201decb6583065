"""Sandboxes: what they are and their lifecycle; their ports, statistics and logs."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response

from limpet.api._endpoint import TEXT, Call, Endpoint, Many, Raw
from limpet.api.queries import ListQuery, LogsQuery, RemoveQuery
from limpet.errors import BadRequest
from limpet.models import (
    CommitRequest,
    CreateRequest,
    ForkRequest,
    KillRequest,
    Operation,
    PortMapping,
    Sandbox,
    SetRequest,
    SetResult,
    Stats,
    StopRequest,
    SystemInfo,
)

_ONE = "/v1/sandboxes/{name}"


async def create_sandbox(call: Call) -> Operation:
    return await call.services.sandboxes.create(call.body(CreateRequest))


async def list_sandboxes(call: Call) -> Sequence[Sandbox]:
    labels = {}
    for label in call.query(ListQuery).label:
        key, equals, value = label.partition("=")
        if not key or not equals:
            raise BadRequest(f"{label!r} is not key=value", hint="for example label=project=web")
        labels[key] = value
    return await call.services.sandboxes.list(labels)


async def get_sandbox(call: Call) -> Sandbox:
    return await call.services.sandboxes.get(call.name)


async def set_sandbox(call: Call) -> SetResult:
    return await call.services.sandboxes.set(call.name, call.body(SetRequest))


async def remove_sandbox(call: Call) -> Operation:
    query = call.query(RemoveQuery)
    return await call.services.sandboxes.remove(call.name, query.force, query.purge)


async def start_sandbox(call: Call) -> Operation:
    return await call.services.sandboxes.start(call.name)


async def stop_sandbox(call: Call) -> Operation:
    return await call.services.sandboxes.stop(call.name, call.body(StopRequest))


async def restart_sandbox(call: Call) -> Operation:
    return await call.services.sandboxes.restart(call.name, call.body(StopRequest))


async def kill_sandbox(call: Call) -> Operation:
    return await call.services.sandboxes.kill(call.name, call.body(KillRequest))


async def pause_sandbox(call: Call) -> Operation:
    return await call.services.standing.pause(call.name)


async def resume_sandbox(call: Call) -> Operation:
    return await call.services.standing.resume(call.name)


async def suspend_sandbox(call: Call) -> Operation:
    return await call.services.standing.suspend(call.name)


async def fork_sandbox(call: Call) -> Operation:
    return await call.services.forks.fork(call.name, call.body(ForkRequest))


async def commit_sandbox(call: Call) -> Operation:
    return await call.services.commits.commit(call.name, call.body(CommitRequest))


async def list_ports(call: Call) -> Sequence[PortMapping]:
    return await call.services.ports.list(call.name)


async def add_port(call: Call) -> PortMapping:
    return await call.services.ports.add(call.name, call.body(PortMapping))


async def remove_port(call: Call) -> None:
    text = call.path("host")
    if not (text.isascii() and text.isdigit()):
        raise BadRequest(f"{text!r} is not a port number")
    await call.services.ports.remove(call.name, int(text))


async def sandbox_stats(call: Call) -> Stats:
    return await call.services.stats.one(call.name)


async def all_stats(call: Call) -> Sequence[Stats]:
    return await call.services.stats.all()


async def system_info(call: Call) -> SystemInfo:
    return await call.services.stats.system(call.name)


async def sandbox_logs(call: Call) -> Response:
    query = call.query(LogsQuery)
    return Response(await call.services.stats.logs(call.name, query.source, query.tail), media_type=TEXT)


ROUTES = (
    Endpoint("POST", "/v1/sandboxes", create_sandbox, "Create a sandbox (result: Sandbox)", Operation,
             body=CreateRequest, status=202),
    Endpoint("GET", "/v1/sandboxes", list_sandboxes, "List sandboxes", Many(Sandbox), query=ListQuery),
    Endpoint("GET", _ONE, get_sandbox, "Show one sandbox", Sandbox),
    Endpoint("PATCH", _ONE, set_sandbox, "Change a sandbox", SetResult, body=SetRequest),
    Endpoint("DELETE", _ONE, remove_sandbox, "Into the trash with it", Operation, query=RemoveQuery, status=202),
    Endpoint("POST", _ONE + "/start", start_sandbox, "Boot it (result: Sandbox)", Operation, status=202),
    Endpoint("POST", _ONE + "/stop", stop_sandbox, "Stop it without losing data (result: StopResult)", Operation,
             body=StopRequest, status=202),
    Endpoint("POST", _ONE + "/restart", restart_sandbox, "Stop and boot it (result: Sandbox)", Operation,
             body=StopRequest, status=202),
    Endpoint("POST", _ONE + "/kill", kill_sandbox, "End it at once (result: StopResult)", Operation,
             body=KillRequest, status=202),
    Endpoint("POST", _ONE + "/pause", pause_sandbox, "Stop its vCPUs, keep its memory (result: Sandbox)", Operation,
             status=202),
    Endpoint("POST", _ONE + "/resume", resume_sandbox, "Let a paused or suspended one go on (result: Sandbox)",
             Operation, status=202),
    Endpoint("POST", _ONE + "/suspend", suspend_sandbox, "Memory to a checkpoint, no process (result: Sandbox)",
             Operation, status=202),
    Endpoint("POST", _ONE + "/fork", fork_sandbox, "Running copies of it (result: ForkResult)", Operation,
             body=ForkRequest, status=202),
    Endpoint("POST", _ONE + "/commit", commit_sandbox, "Make an image of it (result: CommitResult)", Operation,
             body=CommitRequest, status=202),
    Endpoint("GET", _ONE + "/ports", list_ports, "List published ports", Many(PortMapping)),
    Endpoint("POST", _ONE + "/ports", add_port, "Publish a port; host 0: any free one", PortMapping, body=PortMapping),
    Endpoint("DELETE", _ONE + "/ports/{host}", remove_port, "Stop publishing a host port"),
    Endpoint("GET", _ONE + "/stats", sandbox_stats, "Statistics of one sandbox", Stats),
    Endpoint("GET", "/v1/stats", all_stats, "Statistics of all sandboxes", Many(Stats)),
    Endpoint("GET", _ONE + "/system", system_info, "What the guest says about itself", SystemInfo),
    Endpoint("GET", _ONE + "/logs", sandbox_logs, "Console, agent or QEMU log", Raw(TEXT), query=LogsQuery),
)  # fmt: skip
