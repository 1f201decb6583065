"""What travels between the daemon and its clients: the nouns of the API, as pydantic models.

Sizes are bytes unless the name says otherwise, times are ISO 8601 in UTC or seconds, ids are `names.new_id` strings.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator

from limpet.version import PROTOCOL as PROTOCOL

MIN_MEMORY_MIB = 192  # the least with which the base image boots and git works
DEFAULT_MEMORY_MIB = 1024
DEFAULT_VCPUS = 2


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")  # an unknown key in a request is a mistake worth telling


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


# A path: any bytes, those that are not UTF-8 as surrogate escapes (PEP 383), which pydantic's own `str` refuses.
AnyPath = Annotated[
    str, PlainValidator(_text), PlainSerializer(lambda value: value), WithJsonSchema({"type": "string"})
]


class State(StrEnum):
    """Where a sandbox is in its life; the arrows are drawn in services/sandboxes.py."""

    CREATING = "creating"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ERROR = "error"


class PortMapping(_Model):
    """`host` on the host's 127.0.0.1 leads to `guest` on the guest's 127.0.0.1; host 0: any free one."""

    host: Annotated[int, Field(ge=0, le=65535)]
    guest: Annotated[int, Field(ge=1, le=65535)]


EnvMap = dict[str, str]


def _check_env(env: dict[str, str] | None) -> dict[str, str] | None:
    for key, value in (env or {}).items():
        if not key or "=" in key or "\0" in key + value:
            raise ValueError(f"{key!r} is not a valid environment variable")
    return env


class SandboxSpec(_Model):
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

    _env = field_validator("env")(_check_env)


class CreateRequest(_Request):
    """POST /v1/sandboxes. Without a name one is made up. `start`: boot it at once."""

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
    start: bool = True

    _env = field_validator("env")(_check_env)


class SetRequest(_Request):
    """PATCH /v1/sandboxes/{name}: what is None stays. A None value inside env or labels removes that key."""

    name: str | None = None
    vcpus: Annotated[int, Field(ge=1, le=64)] | None = None
    memory_mib: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    env: dict[str, str | None] | None = None
    labels: dict[str, str | None] | None = None
    ttl: Annotated[float, Field(ge=0)] | None = None  # 0: none
    idle_timeout: Annotated[float, Field(ge=0)] | None = None  # 0: none


class SetResult(_Model):
    sandbox: Sandbox
    applied: list[str]  # in force now
    at_next_start: list[str]  # in force after the next start


class WorkspaceInfo(_Model):
    """The directory that was imported. `base` is the commit of the imported state: what `diff` compares with."""

    host_dir: str
    guest_dir: str
    status: Literal["partial", "complete"]
    kind: Literal["git", "directory"]
    base: str | None = None
    head: str | None = None  # the host's HEAD at import, to notice that it moved
    fingerprint: str | None = None  # of the host tree at import
    imported_at: datetime | None = None
    files: int = 0
    bytes: int = 0


class Sandbox(_Model):
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


class Stage(_Model):
    """One step of a long operation. `fraction` is between 0 and 1 where progress can be told."""

    name: str
    state: Literal["running", "done", "failed", "undone"]
    seconds: float | None = None
    fraction: float | None = None
    detail: str | None = None


class Operation(_Model):
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


class StopRequest(_Request):
    """`timeout` bounds the whole stop in seconds. `force` goes on when the guest's data cannot be flushed."""

    force: bool = False
    timeout: Annotated[float, Field(gt=0, le=600)] = 30.0


class StopResult(_Model):
    """How far the ladder had to go. `clean`: the guest powered itself off after a sync; `synced`: its data is on disk,
    then it was cut off; `killed`: nothing is known beyond what it had fsynced."""

    name: str
    rung: Literal["none", "poweroff", "quit", "sigterm", "sigkill"]
    durability: Literal["clean", "synced", "killed"]
    at_risk: list[str] = []
    seconds: float = 0.0


class KillRequest(_Request):
    signal: str = "KILL"


class ExecRequest(_Request):
    """A command to run in the guest. `user` defaults to the image's, `cwd` to the workspace or the user's home.
    `timeout` in seconds kills the whole process group. `detach`: start it and do not follow."""

    argv: Annotated[list[str], Field(min_length=1)]
    env: EnvMap = {}
    cwd: str | None = None
    user: str | None = None
    tty: bool = False
    rows: Annotated[int, Field(ge=1, le=65535)] = 24
    cols: Annotated[int, Field(ge=1, le=65535)] = 80
    stdin: bool = False
    timeout: Annotated[float, Field(gt=0)] | None = None
    detach: bool = False

    _env = field_validator("env")(_check_env)


class ExecInfo(_Model):
    """A command in the guest, running or ended. `*_bytes` count all output ever, `*_start` is the oldest byte kept."""

    id: str
    argv: list[str]
    user: str
    cwd: str
    tty: bool
    pid: int | None = None
    running: bool
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    started_at: float  # seconds since the epoch, guest clock
    ended_at: float | None = None
    stdout_bytes: int = 0
    stdout_start: int = 0
    stderr_bytes: int = 0
    stderr_start: int = 0


class FileInfo(_Model):
    """One path in the guest. Paths that are not UTF-8 use surrogate escapes."""

    path: AnyPath
    type: Literal["file", "directory", "symlink", "fifo", "socket", "block", "char"]
    size: int
    mode: int  # permission bits, with setuid, setgid and sticky
    uid: int
    gid: int
    mtime_ns: int
    target: AnyPath | None = None  # of a symlink


class Unpacked(_Model):
    """What a tar archive brought into the guest."""

    files: int
    bytes: int


class SystemInfo(_Model):
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


class Stats(_Model):
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


class ImageInfo(_Model):
    name: str
    digest: str
    size: int  # virtual, of the root disk
    disk_used: int
    created_at: datetime
    user: str = "user"
    home: str = "/home/user"


class Event(_Model):
    """One line of the durable event stream; `seq` grows by one, a gap is told by an event of kind `gap`."""

    seq: int
    time: datetime
    kind: str
    sandbox: str | None = None  # name
    sandbox_id: str | None = None
    op_id: str | None = None
    data: dict[str, Any] = {}


class ImportRequest(_Request):
    """Bring a host directory into the guest. `dry_run` only says what would be copied. A workspace that is there and
    has changes which `replace` does not give up is kept: the import is refused."""

    host_dir: str
    untracked: bool = True
    replace: bool = False
    dry_run: bool = False


class ImportResult(_Model):
    workspace: WorkspaceInfo
    files: int
    bytes: int
    paths: list[AnyPath] | None = None  # with dry_run: every path that would be copied
    warnings: list[str] = []  # what was left out or comes differently


class Change(_Model):
    """One changed file: git's status letter (A, M, D, T), path, lines added and removed (None: binary)."""

    status: str
    path: AnyPath
    added: int | None = None
    removed: int | None = None


class Changes(_Model):
    base: str
    changes: list[Change]
    patch_bytes: int = 0
    warnings: list[str] = []  # what git in the sandbox could not take along


class ApplyRequest(_Request):
    """Apply the sandbox's changes to `host_dir` (default: where it was imported from)."""

    host_dir: str | None = None
    base: str | None = None
    check: bool = False  # only say whether it would apply


class ApplyResult(_Model):
    host_dir: str
    base: str
    changes: list[Change]
    applied: bool


class Drift(_Model):
    """Whether the host directory changed since its import, and how that shows."""

    moved: bool
    why: str | None = None


class Row(_Model):
    """One line of `doctor`."""

    check: str
    status: Literal["PASS", "WARN", "FAIL"]
    detail: str
    remedy: str | None = None


class DoctorReport(_Model):
    rows: list[Row]
    repaired: list[str] = []


class DaemonStatus(_Model):
    pid: int
    version: str
    protocol: int
    started_at: datetime
    data_dir: str
    cache_dir: str
    socket: str
    sandboxes: int
    running: int


SetResult.model_rebuild()
