"""The container runtime of a sandbox. Its Docker API has a socket of its own, which `RuntimeStatus` names."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response

from limpet.api._endpoint import TEXT, Call, Endpoint, Many, Raw, stream
from limpet.api.queries import TailQuery
from limpet.errors import NotFound, nearest
from limpet.models import ContainerPort, Operation, RuntimeStatus, RuntimeStopRequest, ServiceName

_ONE = "/v1/sandboxes/{name}/runtime"
_SERVICES: dict[str, ServiceName] = {"containerd": "containerd", "dockerd": "dockerd"}


async def runtime_status(call: Call) -> RuntimeStatus:
    return await call.services.runtimes.status(call.name)


async def ensure_runtime(call: Call) -> Operation:
    return await call.services.runtimes.ensure(call.name)


async def stop_runtime(call: Call) -> Operation:
    return await call.services.runtimes.stop(call.name, call.body(RuntimeStopRequest))


async def runtime_logs(call: Call) -> Response:
    name, tail = call.path("service"), call.query(TailQuery).tail
    if (service := _SERVICES.get(name)) is None:
        hint = nearest(name, _SERVICES) or " or ".join(_SERVICES)
        raise NotFound(f"the container runtime has no service {name!r}", hint=hint)
    return await stream(await call.services.runtimes.logs(call.name, service, tail), TEXT)


async def container_ports(call: Call) -> Sequence[ContainerPort]:
    return await call.services.runtimes.ports(call.name)


ROUTES = (
    Endpoint("GET", _ONE, runtime_status, "How its container runtime is, asked now", RuntimeStatus),
    Endpoint("POST", _ONE + "/ensure", ensure_runtime, "Start its container runtime unless it is ready "
             "(result: RuntimeResult)", Operation, status=202),
    Endpoint("POST", _ONE + "/stop", stop_runtime, "Stop containers, then the engine (result: RuntimeStopped)",
             Operation, body=RuntimeStopRequest, status=202),
    Endpoint("GET", _ONE + "/logs/{service}", runtime_logs, "What containerd or dockerd wrote", Raw(TEXT),
             query=TailQuery),
    Endpoint("GET", _ONE + "/ports", container_ports, "What its containers publish", Many(ContainerPort)),
)  # fmt: skip
