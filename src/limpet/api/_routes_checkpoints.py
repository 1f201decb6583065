"""Checkpoints of sandboxes, and the ways back to them."""

from __future__ import annotations

from collections.abc import Sequence

from limpet.api._endpoint import Call, Endpoint, Many
from limpet.models import CheckpointInfo, CheckpointRequest, Operation, RestoreRequest, VerifyRequest

_SANDBOX = "/v1/sandboxes/{name}"
_ONE = "/v1/checkpoints/{id}"


async def create_checkpoint(call: Call) -> Operation:
    return await call.services.checkpoints.create(call.name, call.body(CheckpointRequest))


async def sandbox_checkpoints(call: Call) -> Sequence[CheckpointInfo]:
    return await call.services.checkpoints.list(call.name)


async def list_checkpoints(call: Call) -> Sequence[CheckpointInfo]:
    return await call.services.checkpoints.list(None)


async def get_checkpoint(call: Call) -> CheckpointInfo:
    return await call.services.checkpoints.get(call.path("id"))


async def verify_checkpoint(call: Call) -> Operation:
    return await call.services.checkpoints.verify(call.path("id"), call.body(VerifyRequest))


async def remove_checkpoint(call: Call) -> Operation:
    return await call.services.checkpoints.remove(call.path("id"))


async def restore_sandbox(call: Call) -> Operation:
    return await call.services.checkpoints.restore(call.name, call.body(RestoreRequest))


async def undo_sandbox(call: Call) -> Operation:
    return await call.services.checkpoints.undo(call.name)


ROUTES = (
    Endpoint("POST", _SANDBOX + "/checkpoints", create_checkpoint, "Keep it as it is now (result: CheckpointInfo)",
             Operation, body=CheckpointRequest, status=202),
    Endpoint("GET", _SANDBOX + "/checkpoints", sandbox_checkpoints, "List its checkpoints, the oldest first",
             Many(CheckpointInfo)),
    Endpoint("POST", _SANDBOX + "/restore", restore_sandbox, "Back to a checkpoint, or a new sandbox from one "
             "(result: RestoreResult)", Operation, body=RestoreRequest, status=202),
    Endpoint("POST", _SANDBOX + "/undo", undo_sandbox, "Back to the newest checkpoint (result: RestoreResult)",
             Operation, status=202),
    Endpoint("GET", "/v1/checkpoints", list_checkpoints, "List the checkpoints of all sandboxes, the oldest first",
             Many(CheckpointInfo)),
    Endpoint("GET", _ONE, get_checkpoint, "Show one checkpoint", CheckpointInfo),
    Endpoint("POST", _ONE + "/verify", verify_checkpoint, "Compare it with its digests (result: VerifyResult)",
             Operation, body=VerifyRequest, status=202),
    Endpoint("DELETE", _ONE, remove_checkpoint, "Remove it and what only it needed (result: PruneResult)", Operation,
             status=202),
)  # fmt: skip
