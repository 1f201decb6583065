"""Sandboxes: what they are meant to be, what they are, and how that changes."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, field_validator

from limpet.models._base import DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, MIN_MEMORY_MIB, EnvMap, Model, Request, check_env
from limpet.models._payloads import PayloadRequest
from limpet.models._workspace import WorkspaceInfo


class State(StrEnum):
    """Where a sandbox is in its life; the arrows are drawn in services/sandboxes.py."""

    CREATING = "creating"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    PAUSED = "paused"  # vCPUs stopped, memory kept
    SUSPENDED = "suspended"  # memory in a checkpoint, no process
    ERROR = "error"
    TRASHED = "trashed"  # removed, and kept for some days; shown by `trash ls` only
    POOLED = "pooled"  # a warm VM that waits for a `create`; never shown


class PortMapping(Model):
    """`host` on the host's 127.0.0.1 leads to `guest` on the guest's 127.0.0.1; host 0: any free one."""

    host: Annotated[int, Field(ge=0, le=65535)]
    guest: Annotated[int, Field(ge=1, le=65535)]


class SandboxSpec(Model):
    """What a sandbox is meant to be. Changing vcpus or memory_mib takes effect at the next start."""

    image: str = "base"
    vcpus: Annotated[int, Field(ge=1, le=64)] = DEFAULT_VCPUS
    memory_mib: Annotated[int, Field(ge=MIN_MEMORY_MIB, le=1 << 20)] = DEFAULT_MEMORY_MIB
    env: EnvMap = {}
    labels: dict[str, str] = {}
    network: Literal["user", "none"] = "user"
    ports: list[PortMapping] = []
    ephemeral: bool = False  # removed when it stops
    ttl: Annotated[float, Field(gt=0)] | None = None  # seconds after a start at which it is stopped
    idle_timeout: Annotated[float, Field(gt=0)] | None = None  # seconds without a command after which it is stopped
    idle_suspend: Annotated[float, Field(gt=0)] | None = None  # the same, after which it is suspended
    every_exec: bool = False  # a disk checkpoint before each command of `run` and `exec`
    user: str | None = None  # who commands run as; None: the image's user
    workdir: str | None = None  # where commands begin; None: the workspace, or the user's home
    entrypoint: list[str] | None = None  # the command when `run` is given none

    _env = field_validator("env")(check_env)


class CreateRequest(Request):
    """POST /v1/sandboxes. Without a name one is made up. `start`: boot it at once. What is left out the image
    decides, where it was committed with a spec of its own (`NAME[:TAG]` names an image)."""

    name: str | None = None
    image: str = "base"
    vcpus: Annotated[int, Field(ge=1, le=64)] = DEFAULT_VCPUS
    memory_mib: Annotated[int, Field(ge=1, le=1 << 20)] = DEFAULT_MEMORY_MIB
    env: EnvMap = {}
    labels: dict[str, str] = {}
    network: Literal["user", "none"] = "user"
    ports: list[PortMapping] = []
    ephemeral: bool = False
    ttl: Annotated[float, Field(gt=0)] | None = None
    idle_timeout: Annotated[float, Field(gt=0)] | None = None
    idle_suspend: Annotated[float, Field(gt=0)] | None = None
    every_exec: bool = False
    user: str | None = None
    workdir: str | None = None
    entrypoint: list[str] | None = None
    payloads: list[PayloadRequest] = []
    start: bool = True

    _env = field_validator("env")(check_env)


class SetRequest(Request):
    """PATCH /v1/sandboxes/{name}: what is None stays. A None value inside env or labels removes that key."""

    name: str | None = None
    vcpus: Annotated[int, Field(ge=1, le=64)] | None = None
    memory_mib: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    env: dict[str, str | None] | None = None
    labels: dict[str, str | None] | None = None
    ttl: Annotated[float, Field(ge=0)] | None = None  # 0: none
    idle_timeout: Annotated[float, Field(ge=0)] | None = None  # 0: none
    idle_suspend: Annotated[float, Field(ge=0)] | None = None  # 0: none
    every_exec: bool | None = None
    user: str | None = None  # "": the image's
    workdir: str | None = None  # "": the workspace, or the user's home
    dry_run: bool = False  # only say what would be applied now and what at the next start


class Sandbox(Model):
    """One sandbox as the daemon knows it. `boot_id` is the guest kernel's, `incarnation` counts starts."""

    id: str
    name: str
    state: State
    spec: SandboxSpec
    created_at: datetime
    started_at: datetime | None = None
    boot_id: str | None = None
    incarnation: int = 0
    accel: Literal["kvm", "tcg"] | None = None
    isolation: Literal["hardware", "emulated"] | None = None
    workspace: WorkspaceInfo | None = None
    ports: list[PortMapping] = []  # published now, with the host ports that were given
    error: str | None = None  # why it is in `error`, or why it died
    pid: int | None = None  # of QEMU


class SetResult(Model):
    sandbox: Sandbox
    applied: list[str]  # in force now
    at_next_start: list[str]  # in force after the next start


class StopRequest(Request):
    """`timeout` bounds the whole stop in seconds. `force` goes on when the guest's data cannot be flushed."""

    force: bool = False
    timeout: Annotated[float, Field(gt=0, le=600)] = 30.0


class StopResult(Model):
    """How far the ladder had to go. `clean`: the guest powered itself off after a sync; `synced`: its data is on disk,
    then it was cut off; `killed`: nothing is known beyond what it had fsynced."""

    name: str
    rung: Literal["none", "poweroff", "quit", "sigterm", "sigkill"]
    durability: Literal["clean", "synced", "killed"]
    at_risk: list[str] = []
    seconds: float = 0.0
    generation: int | None = None  # the newest on the host after the final sync
    sync: str | None = None  # why the final sync of the vault or of a payload failed; None: it did not


class KillRequest(Request):
    signal: str = "KILL"


class SystemInfo(Model):
    kernel: str
    os: str
    arch: str
    hostname: str
    memory_total: int
    memory_available: int
    cpus: int
    load: tuple[float, float, float]
    uptime: float
    addresses: list[str]
    boot_id: str
    agent_version: str


class Stats(Model):
    """Of one sandbox. `cpu_seconds` and memory are QEMU's on the host; the guest's own view is in `guest`."""

    name: str
    state: State
    cpu_percent: float = 0.0
    cpu_seconds: float = 0.0
    memory_pss: int = 0
    memory_limit: int = 0
    disk_used: int = 0
    disk_read: int = 0
    disk_written: int = 0
    net_received: int | None = None
    net_sent: int | None = None
    guest: SystemInfo | None = None
