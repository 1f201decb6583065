"""Sandboxes as they were, and copies of them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from limpet.models._base import Model, Request
from limpet.models._sandboxes import Sandbox, SandboxSpec
from limpet.models._workspace import WorkspaceInfo


class CheckpointRequest(Request):
    """POST …/checkpoints. `disk_only` leaves the memory out; it is implied when the sandbox does not run."""

    label: Annotated[str, Field(max_length=200)] | None = None
    disk_only: bool = False


class CheckpointInfo(Model):
    """A sandbox at one instant. `parent` is the checkpoint that the sandbox was made at or restored from before."""

    id: str  # ck_…
    sandbox: str  # its name when the checkpoint was made
    sandbox_id: str
    parent: str | None = None
    created_at: datetime
    label: str | None = None
    kind: Literal["full", "disk"]  # full: disks and memory
    made_by: Literal["user", "restore", "exec", "suspend"] = "user"  # restore: of what a restore replaced
    spec: SandboxSpec
    workspace: WorkspaceInfo | None = None
    memory_bytes: int = 0  # on the host's disk
    disk_bytes: int = 0  # of the disk layers that came with this checkpoint
    pause_ms: float = 0.0  # how long the guest stood still


class VerifyRequest(Request):
    """`boot`: also restore it into a throw-away VM and wait for the agent."""

    boot: bool = False


class VerifyResult(Model):
    """Whether everything is as it was written. `problems` name the file and what is wrong with it."""

    id: str
    ok: bool
    problems: list[str] = []
    booted: bool | None = None  # None: not tried
    seconds: float = 0.0


class RestoreRequest(Request):
    """POST …/restore. `checkpoint` is an id, the beginning of one, or a label. In place (after a checkpoint of the
    present) or, with `as_name`, as a new sandbox. `force`: also while the sandbox runs. `disk_only`: boot its disks
    instead of going on with its memory."""

    checkpoint: str
    as_name: str | None = None
    force: bool = False
    disk_only: bool = False


class RestoreResult(Model):
    """`saved` is the checkpoint of what was replaced, None when there was nothing to keep."""

    sandbox: Sandbox
    checkpoint: CheckpointInfo
    saved: CheckpointInfo | None = None


class ForkRequest(Request):
    """POST …/fork: `count` running copies, named `prefix`-1, -2, … (default: the source's name); `name` names a
    single one."""

    count: Annotated[int, Field(ge=1, le=100)] = 1
    prefix: str | None = None
    name: str | None = None


class ForkFailure(Model):
    name: str
    error: dict[str, Any]  # code, message, hint, op_id


class ForkResult(Model):
    """The copies that run, in order, and those that could not be made: they harm neither source nor copies."""

    source: str
    forks: list[Sandbox]
    failed: list[ForkFailure] = []
    pause_ms: float = 0.0  # how long the source stood still
