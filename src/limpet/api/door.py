"""What the API asks of the daemon's services. The services implement these shapes without importing the API.

Every method raises `errors.LimpetError`s. Methods that return an `Operation` return at once; the work goes on as a
task and its outcome is the operation's `result` (named behind each).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from limpet.models import (
    ApplyRequest,
    ApplyResult,
    Changes,
    CheckpointInfo,
    CheckpointRequest,
    CommitRequest,
    CreateRequest,
    DaemonStatus,
    DiskUsage,
    DoctorReport,
    Drift,
    ExecInfo,
    ExecRequest,
    FileInfo,
    ForkRequest,
    ImageFileRequest,
    ImageInfo,
    ImageVersion,
    ImportRequest,
    KillRequest,
    Operation,
    PortMapping,
    PruneRequest,
    PruneResult,
    RestoreRequest,
    Sandbox,
    SetRequest,
    SetResult,
    Setting,
    Stats,
    StopRequest,
    SystemInfo,
    TemplateInfo,
    TemplateRequest,
    Unpacked,
    VerifyRequest,
)
from limpet.services.events import Events
from limpet.services.operations import Operations
from limpet.services.streams import ExecSession, FileBody, PatchBody

LogSource = Literal["console", "agent", "qemu"]
LaneName = Literal["stdout", "stderr"]


class System(Protocol):
    """The daemon itself."""

    async def status(self) -> DaemonStatus: ...
    async def shutdown(self) -> None:
        """Ask for the end of the daemon; returns before it ends, so that the answer still gets out."""

    async def setup(self, mirror: str | None) -> Operation: ...  # result {"done": [str, …]}


class Sandboxes(Protocol):
    async def create(self, request: CreateRequest) -> Operation: ...  # Sandbox
    async def list(self, labels: Mapping[str, str]) -> Sequence[Sandbox]: ...
    async def get(self, name: str) -> Sandbox: ...
    async def set(self, name: str, request: SetRequest) -> SetResult: ...
    async def start(self, name: str) -> Operation: ...  # Sandbox
    async def stop(self, name: str, request: StopRequest) -> Operation: ...  # StopResult
    async def restart(self, name: str, request: StopRequest) -> Operation: ...  # Sandbox
    async def kill(self, name: str, request: KillRequest) -> Operation: ...  # StopResult
    async def remove(self, name: str, force: bool) -> Operation: ...  # {}


class Standing(Protocol):
    async def pause(self, name: str) -> Operation: ...  # Sandbox
    async def resume(self, name: str) -> Operation: ...  # Sandbox; of a paused or suspended one
    async def suspend(self, name: str) -> Operation: ...  # Sandbox


class Forks(Protocol):
    async def fork(self, name: str, request: ForkRequest) -> Operation: ...  # ForkResult


class Commits(Protocol):
    async def commit(self, name: str, request: CommitRequest) -> Operation: ...  # CommitResult


class Checkpoints(Protocol):
    async def create(self, name: str, request: CheckpointRequest) -> Operation: ...  # CheckpointInfo
    async def list(self, name: str | None) -> Sequence[CheckpointInfo]:
        """Of one sandbox or of all, the oldest first."""

    async def get(self, checkpoint: str) -> CheckpointInfo:
        """By id or the beginning of one. Raises NotFound, BadRequest when several match."""

    async def verify(self, checkpoint: str, request: VerifyRequest) -> Operation: ...  # VerifyResult
    async def remove(self, checkpoint: str) -> Operation: ...  # PruneResult
    async def restore(self, name: str, request: RestoreRequest) -> Operation: ...  # RestoreResult
    async def undo(self, name: str) -> Operation: ...  # RestoreResult


class Templates(Protocol):
    async def list(self) -> Sequence[TemplateInfo]: ...
    async def build(self, request: TemplateRequest) -> Operation: ...  # TemplateInfo
    async def remove(self, key: str) -> None: ...


class Config(Protocol):
    async def list(self) -> Sequence[Setting]: ...
    async def set(self, key: str, value: str | None) -> Setting: ...


class Storage(Protocol):
    async def usage(self) -> DiskUsage: ...
    async def prune(self, request: PruneRequest) -> Operation: ...  # PruneResult


class Execs(Protocol):
    async def start(self, name: str, request: ExecRequest, *, start_if_stopped: bool) -> ExecSession:
        """Start a command. With `request.detach` the session yields Started and nothing else."""

    async def attach(
        self, name: str, exec_id: str, *, stdout: int | None, stderr: int | None, stdin: bool, steal: bool
    ) -> ExecSession:
        """Follow a command from these offsets in bytes; None leaves that lane out."""

    async def list(self, name: str) -> Sequence[ExecInfo]: ...
    async def get(self, name: str, exec_id: str) -> ExecInfo: ...
    async def signal(self, name: str, exec_id: str, signal: str) -> None: ...
    async def output(self, name: str, exec_id: str, lane: LaneName, offset: int) -> AsyncIterator[bytes]:
        """What is kept of one lane from `offset` (or the oldest byte kept, if later) up to now."""


class Files(Protocol):
    async def read(self, name: str, path: str) -> FileBody: ...
    async def write(
        self,
        name: str,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        mode: int | None,
        user: str | None,
        parents: bool,
        size: int | None,
    ) -> FileInfo:
        """Replace the file atomically. `size` is the announced number of bytes, when it was announced."""

    async def stat(self, name: str, path: str) -> FileInfo: ...
    async def list(self, name: str, path: str) -> Sequence[FileInfo]: ...
    async def mkdir(self, name: str, path: str, *, parents: bool, mode: int | None) -> None: ...
    async def rename(self, name: str, source: str, target: str) -> None: ...
    async def remove(self, name: str, path: str, *, recursive: bool) -> None: ...
    async def pack(self, name: str, path: str) -> AsyncIterator[bytes]: ...
    async def unpack(self, name: str, path: str, chunks: AsyncIterator[bytes], *, user: str | None) -> Unpacked: ...


class Ports(Protocol):
    async def list(self, name: str) -> Sequence[PortMapping]: ...
    async def add(self, name: str, mapping: PortMapping) -> PortMapping: ...
    async def remove(self, name: str, host: int) -> None: ...


class Workspaces(Protocol):
    async def import_dir(self, name: str, request: ImportRequest) -> Operation: ...  # ImportResult
    async def changes(self, name: str, base: str | None) -> Changes: ...
    async def patch(self, name: str, base: str | None) -> PatchBody: ...
    async def apply(self, name: str, request: ApplyRequest) -> ApplyResult: ...
    async def drift(self, name: str) -> Drift: ...


class Images(Protocol):
    """`image` is `NAME[:TAG]`."""

    async def list(self) -> Sequence[ImageInfo]: ...
    async def get(self, image: str) -> ImageInfo: ...
    async def history(self, name: str) -> Sequence[ImageVersion]: ...
    async def remove(self, image: str) -> None: ...
    async def prune(self) -> PruneResult: ...
    async def verify(self, image: str) -> Operation: ...  # VerifyResult
    async def export(self, image: str, request: ImageFileRequest) -> Operation: ...  # ImageInfo
    async def import_file(self, request: ImageFileRequest) -> Operation: ...  # ImageInfo; .limpet or a root tar


class Doctor(Protocol):
    async def run(self) -> DoctorReport: ...
    async def repair(self) -> DoctorReport: ...


class StatsService(Protocol):
    async def one(self, name: str) -> Stats: ...
    async def all(self) -> Sequence[Stats]: ...
    async def system(self, name: str) -> SystemInfo: ...
    async def logs(self, name: str, source: LogSource, tail: int | None) -> bytes:
        """The last `tail` lines (all when None); works on stopped sandboxes too."""


@dataclass(frozen=True)
class Services:
    """Everything that the routes call."""

    system: System
    sandboxes: Sandboxes
    standing: Standing
    forks: Forks
    commits: Commits
    execs: Execs
    files: Files
    ports: Ports
    workspaces: Workspaces
    images: Images
    checkpoints: Checkpoints
    templates: Templates
    config: Config
    storage: Storage
    doctor: Doctor
    stats: StatsService
    operations: Operations
    events: Events
