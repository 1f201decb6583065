"""The imported directory: into the guest, and its changes back."""

from __future__ import annotations

from starlette.responses import Response

from limpet.api._endpoint import RAW, Call, Endpoint, Raw, stream
from limpet.api.queries import BaseQuery
from limpet.models import ApplyRequest, ApplyResult, Changes, Drift, ImportRequest, Operation

_WORKSPACE = "/v1/sandboxes/{name}/workspace"


async def import_workspace(call: Call) -> Operation:
    return await call.services.workspaces.import_dir(call.name, call.body(ImportRequest))


async def workspace_changes(call: Call) -> Changes:
    return await call.services.workspaces.changes(call.name, call.query(BaseQuery).base)


async def workspace_patch(call: Call) -> Response:
    patch = await call.services.workspaces.patch(call.name, call.query(BaseQuery).base)
    return await stream(patch.chunks, RAW, {"Limpet-Base": patch.base})


async def apply_workspace(call: Call) -> ApplyResult:
    return await call.services.workspaces.apply(call.name, call.body(ApplyRequest))


async def workspace_drift(call: Call) -> Drift:
    return await call.services.workspaces.drift(call.name)


ROUTES = (
    Endpoint("POST", _WORKSPACE + "/import", import_workspace, "Bring a host directory in (result: ImportResult)",
             Operation, body=ImportRequest, status=202),
    Endpoint("GET", _WORKSPACE + "/changes", workspace_changes, "What changed since the import", Changes,
             query=BaseQuery),
    Endpoint("GET", _WORKSPACE + "/patch", workspace_patch, "The changes as a binary patch (header Limpet-Base)",
             Raw(), query=BaseQuery),
    Endpoint("POST", _WORKSPACE + "/apply", apply_workspace, "Apply the changes to the host directory", ApplyResult,
             body=ApplyRequest),
    Endpoint("GET", _WORKSPACE + "/drift", workspace_drift, "Whether the host directory moved on", Drift),
)  # fmt: skip
