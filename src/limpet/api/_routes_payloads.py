"""Payloads: host directories that guest directories are kept in step with."""

from __future__ import annotations

from collections.abc import Sequence

from limpet.api._endpoint import Call, Endpoint, Many
from limpet.models import Operation, PayloadConfirm, PayloadRequest, PayloadStatus

_ALL = "/v1/sandboxes/{name}/payloads"
_ONE = _ALL + "/{id}"


async def list_payloads(call: Call) -> Sequence[PayloadStatus]:
    return await call.services.payloads.status(call.name)


async def all_payloads(call: Call) -> Sequence[PayloadStatus]:
    return await call.services.payloads.status(None)


async def add_payload(call: Call) -> Operation:
    return await call.services.payloads.add(call.name, call.body(PayloadRequest))


async def remove_payload(call: Call) -> Operation:
    return await call.services.payloads.remove(call.name, call.path("id"))


async def confirm_payload(call: Call) -> Operation:
    return await call.services.payloads.confirm(call.name, call.path("id"), call.body(PayloadConfirm))


ROUTES = (
    Endpoint("GET", _ALL, list_payloads, "List its payloads and how they are", Many(PayloadStatus)),
    Endpoint("POST", _ALL, add_payload, "Keep a host directory in step (result: PayloadStatus)", Operation,
             body=PayloadRequest, status=202),
    Endpoint("DELETE", _ONE, remove_payload, "Publish a last time and let go of it", Operation, status=202),
    Endpoint("POST", _ONE + "/confirm", confirm_payload, "Let what was held back go on (result: PayloadStatus)",
             Operation, body=PayloadConfirm, status=202),
    Endpoint("GET", "/v1/payloads", all_payloads, "List the payloads of all sandboxes", Many(PayloadStatus)),
)  # fmt: skip
