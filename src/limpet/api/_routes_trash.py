"""The trash: removed sandboxes, for as long as they can be had back."""

from __future__ import annotations

from collections.abc import Sequence

from limpet.api._endpoint import Call, Endpoint, Many
from limpet.models import Operation, RiskReport, TrashEntry, UndeleteRequest

_ONE = "/v1/trash/{id}"


async def list_trash(call: Call) -> Sequence[TrashEntry]:
    return await call.services.trash.list()


async def empty_trash(call: Call) -> Operation:
    return await call.services.trash.empty(None)


async def purge_trashed(call: Call) -> Operation:
    return await call.services.trash.empty(call.path("id"))


async def undelete(call: Call) -> Operation:
    return await call.services.trash.undelete(call.path("id"), call.body(UndeleteRequest))


async def removal_risk(call: Call) -> RiskReport:
    return await call.services.trash.risk(call.name)


ROUTES = (
    Endpoint("GET", "/v1/trash", list_trash, "List removed sandboxes, the newest first", Many(TrashEntry)),
    Endpoint("DELETE", "/v1/trash", empty_trash, "Remove all of them for good (result: PruneResult)", Operation,
             status=202),
    Endpoint("DELETE", _ONE, purge_trashed, "Remove one for good (result: PruneResult)", Operation, status=202),
    Endpoint("POST", _ONE + "/undelete", undelete, "Take one back, by id or name (result: Sandbox)", Operation,
             body=UndeleteRequest, status=202),
    Endpoint("GET", "/v1/sandboxes/{name}/risk", removal_risk, "What only this sandbox has", RiskReport),
)  # fmt: skip
