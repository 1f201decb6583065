"""The daemon: operations, events, configuration, disk space, the state of this host."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from limpet.models._base import Model, Request


class Stage(Model):
    """One step of a long operation. `fraction` is between 0 and 1 where progress can be told."""

    name: str
    state: Literal["running", "done", "failed", "undone"]
    seconds: float | None = None
    fraction: float | None = None
    detail: str | None = None


class Operation(Model):
    """A long request: `result` is the kind's own answer as JSON once `state` is `done`."""

    id: str
    kind: str
    target: str | None = None
    state: Literal["running", "done", "failed", "cancelled"]
    stages: list[Stage] = []
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    started_at: datetime
    ended_at: datetime | None = None


class Event(Model):
    """One line of the durable event stream; `seq` grows by one, a gap is told by an event of kind `gap`."""

    seq: int
    time: datetime
    kind: str
    sandbox: str | None = None  # name
    sandbox_id: str | None = None
    op_id: str | None = None
    data: dict[str, Any] = {}


class Setting(Model):
    """One entry of the configuration."""

    key: str
    value: str
    default: str
    help: str


class SettingRequest(Request):
    """PUT /v1/config/{key}; None: back to the default."""

    value: str | None


class Usage(Model):
    """What one kind of thing takes of the host's disk. `reclaimable` bytes are what `system prune` would free."""

    kind: Literal["images", "templates", "checkpoints", "sandboxes", "trash", "vaults", "artifacts", "other"]
    count: int
    active: int
    size: int
    reclaimable: int


class DiskUsage(Model):
    rows: list[Usage]
    total: int
    free: int


class PruneRequest(Request):
    """What to remove: all that nothing uses. `images`: also untagged versions and images that no sandbox uses;
    `dry_run`: only say."""

    images: bool = False
    templates: bool = True
    dry_run: bool = False


class PruneResult(Model):
    removed: list[str]
    freed: int


class Row(Model):
    """One line of `doctor`."""

    check: str
    status: Literal["PASS", "WARN", "FAIL"]
    detail: str
    remedy: str | None = None


class DoctorReport(Model):
    rows: list[Row]
    repaired: list[str] = []


class DaemonStatus(Model):
    pid: int
    version: str
    protocol: int
    started_at: datetime
    data_dir: str
    cache_dir: str
    socket: str
    sandboxes: int
    running: int
    pooled: int = 0  # warm VMs that wait for a create
