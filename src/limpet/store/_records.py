"""Rows as objects. Only this module knows how a value looks in a column."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict

from pydantic import BaseModel

from limpet.models import Event, Operation, Payload, SandboxSpec, State, WorkspaceInfo
from limpet.store import _seals

Row = tuple[Any, ...]

SANDBOX_COLUMNS = _seals.SEALED["sandboxes"]
EVENT_COLUMNS = ("seq", "time", "kind", "sandbox", "sandbox_id", "op_id", "data")
OPERATION_COLUMNS = (
    "id", "kind", "target", "state", "stages", "result", "error", "started_at", "ended_at",
)  # fmt: skip


@dataclass(frozen=True)
class SandboxRecord:
    """What a sandbox is meant to be, and what is known of its last start."""

    id: str
    name: str
    state: State
    spec: SandboxSpec
    created_at: datetime
    started_at: datetime | None = None
    boot_id: str | None = None  # of the guest's kernel
    incarnation: int = 0  # counts starts
    workspace: WorkspaceInfo | None = None
    error: str | None = None
    disks: dict[str, str] | None = None  # the active layers: {"root": "ly_…", "data": "ly_…"}; None: not made yet
    parent: str | None = None  # the checkpoint that its disks began with or went on from
    memory: str | None = None  # the checkpoint that it is suspended to
    payloads: tuple[Payload, ...] = ()
    trash: dict[str, str] | None = None  # while trashed: what it was called, when it was removed, its state before


class SandboxChanges(TypedDict, total=False):
    """What `Store.update_sandbox` can change; a key that is left out stays as it is."""

    name: str
    state: State
    spec: SandboxSpec
    created_at: datetime
    started_at: datetime | None
    boot_id: str | None
    incarnation: int
    workspace: WorkspaceInfo | None
    error: str | None
    disks: dict[str, str] | None
    parent: str | None
    memory: str | None
    payloads: tuple[Payload, ...]
    trash: dict[str, str] | None


def to_column(value: object) -> str | int | float | None:
    """A value as SQLite keeps it: models, lists and dicts as JSON (ASCII only: host paths need not be UTF-8), times as
    ISO 8601, other text with what is not UTF-8 spelled out."""
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json"))
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, tuple):
        return json.dumps([item.model_dump(mode="json") for item in value]) if value else None
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    if isinstance(value, State):
        return value.value
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if value is None or isinstance(value, (int, float)):
        return value
    raise TypeError(f"cannot store {type(value).__name__}")


def sandbox_row(record: SandboxRecord) -> Row:
    return tuple(to_column(getattr(record, column)) for column in SANDBOX_COLUMNS)


def sandbox(row: Row) -> SandboxRecord:
    fields = dict(zip(SANDBOX_COLUMNS, row, strict=True))
    fields["state"] = State(fields["state"])
    fields["spec"] = SandboxSpec.model_validate(json.loads(fields["spec"]))
    fields["created_at"] = datetime.fromisoformat(fields["created_at"])
    if fields["started_at"] is not None:
        fields["started_at"] = datetime.fromisoformat(fields["started_at"])
    if fields["workspace"] is not None:
        fields["workspace"] = WorkspaceInfo.model_validate(json.loads(fields["workspace"]))
    if fields["disks"] is not None:
        fields["disks"] = json.loads(fields["disks"])
    fields["payloads"] = tuple(Payload.model_validate(item) for item in json.loads(fields["payloads"] or "[]"))
    if fields["trash"] is not None:
        fields["trash"] = json.loads(fields["trash"])
    return SandboxRecord(**fields)


def event(row: Row) -> Event:
    fields = dict(zip(EVENT_COLUMNS, row, strict=True))
    fields["data"] = json.loads(fields["data"])
    return Event.model_validate(fields)


def operation_row(operation: Operation) -> Row:
    fields = operation.model_dump(mode="json")
    return tuple(to_column(fields[column]) for column in OPERATION_COLUMNS)


def operation(row: Row) -> Operation:
    fields = dict(zip(OPERATION_COLUMNS, row, strict=True))
    for column in ("stages", "result", "error"):
        if fields[column] is not None:
            fields[column] = json.loads(fields[column])
    return Operation.model_validate(fields)
