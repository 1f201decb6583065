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
    ContainerPort,
    CreateRequest,
    DaemonStatus,
    DiskUsage,
    DoctorReport,
    Drift,
    ExecInfo,
    ExecRequest,
    FileInfo,
    ForkRequest,
    GenerationInfo,
    ImageBuildRequest,
    ImageFileRequest,
    ImageInfo,
    ImageVersion,
    ImportRequest,
    KillRequest,
    Operation,
    PathChange,
    PathVersion,
    PayloadConfirm,
    PayloadRequest,
    PayloadStatus,
    PortMapping,
    PruneRequest,
    PruneResult,
    RestoreRequest,
    RiskReport,
    RuntimeStatus,
    RuntimeStopRequest,
    Sandbox,
    ServiceName,
    SetRequest,
    SetResult,
    Setting,
    Stats,
    StopRequest,
    SyncStatus,
    SystemInfo,
    TemplateInfo,
    TemplateRequest,
    TrashEntry,
    UndeleteRequest,
    Unpacked,
    VaultListing,
    VaultRestoreRequest,
    VaultUsage,
    VerifyRequest,
)
from limpet.services.events import Events
from limpet.services.operations import Operations
from limpet.services.streams import ExecSession, FileBody, PatchBody, VaultFile

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
    async def remove(self, name: str, force: bool, purge: bool) -> Operation:
        """Into the trash; with `purge` (and for ephemeral ones) for good, with its vault. Result: {}."""


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


class Syncing(Protocol):
    """What sandboxes wrote, on its way to the host."""

    async def sync(self, name: str) -> Operation:
        """Now; everything written before this call is in the generation that the result, a SyncResult, names."""

    async def status(self, name: str, *, pending: bool) -> SyncStatus:
        """Of any sandbox that is not in the trash. `pending`: also ask the guest, within a bounded time, how many
        files and bytes are not on the host yet; they stay None when it cannot answer."""

    async def all_status(self) -> Sequence[SyncStatus]:
        """Of all sandboxes that have a VM, by name, without asking any guest (`pending_*` are None)."""


class Vaults(Protocol):
    """Generations, from the host's disk alone: no VM is needed but for `restore` without `to`.

    `name`: a sandbox's name; the name that a trashed one had, where no other has it now; an id or the beginning of
    one. `at`: a generation's number or a time (see `moments.parse`), the newest generation when None. `path`: absolute
    in the guest. Raises NotFound for a generation (naming the nearest kept ones) or a path that is not there."""

    async def history(self, name: str) -> Sequence[GenerationInfo]:
        """The oldest first."""

    async def versions(self, name: str, path: str) -> Sequence[PathVersion]:
        """The generations in which the path, or anything below it, changed; the oldest first. Raises NotFound when no
        kept generation has it."""

    async def listing(self, name: str, path: str, at: str | None) -> VaultListing:
        """What the path is and, for a directory, what it holds, by name. `/` and the directories above the volumes
        list those."""

    async def read(self, name: str, path: str, at: str | None) -> VaultFile:
        """A regular file's bytes, verified before they are passed on. Raises BadRequest for anything else."""

    async def diff(self, name: str, a: str, b: str | None) -> AsyncIterator[PathChange]:
        """What differs from `a` to `b` (both as `at`), by path."""

    async def restore(self, name: str, request: VaultRestoreRequest) -> Operation: ...  # VaultRestored
    async def check(self, name: str | None) -> Operation:
        """Every hash of one vault or of all. Result: VaultChecks; damage is no failure of the operation."""

    async def repair(self, name: str | None) -> Operation: ...  # VaultChecks, with `repaired` filled
    async def collect(self, name: str | None) -> Operation: ...  # PruneResult; `removed`: `NAME@GENERATION`
    async def usage(self) -> Sequence[VaultUsage]:
        """Of all vaults, by the sandbox's name; those of trashed sandboxes too."""


class Payloads(Protocol):
    """`payload` is an id (pl_…) or the beginning of one."""

    async def add(self, name: str, request: PayloadRequest) -> Operation:
        """Result: PayloadStatus. On a sandbox that does not run: it is seeded at the next start."""

    async def remove(self, name: str, payload: str) -> Operation:
        """Publish a last time (when it can be), let the host directory go, take the guest's away. Result: {}."""

    async def status(self, name: str | None) -> Sequence[PayloadStatus]:
        """Of one sandbox or of all, in the order in which they were added."""

    async def confirm(self, name: str, payload: str, request: PayloadConfirm) -> Operation: ...  # PayloadStatus


class Runtimes(Protocol):
    """The container runtime in a sandbox's guest."""

    async def ensure(self, name: str) -> Operation:
        """Start it unless it is ready; paused and suspended sandboxes go on first. Result: RuntimeResult."""

    async def status(self, name: str) -> RuntimeStatus: ...
    async def stop(self, name: str, request: RuntimeStopRequest) -> Operation: ...  # RuntimeStopped
    async def logs(self, name: str, service: ServiceName, tail: int | None) -> AsyncIterator[bytes]:
        """The last `tail` lines of one service; None: all that can be had, at most 4 MiB."""

    async def ports(self, name: str) -> Sequence[ContainerPort]:
        """What containers publish; nothing when the engine does not run."""


class Trash(Protocol):
    """`trashed`: the name that the sandbox had (the newest of several), its id or the beginning of one."""

    async def list(self) -> Sequence[TrashEntry]:
        """The newest first."""

    async def empty(self, trashed: str | None) -> Operation: ...  # PruneResult; one or all, for good
    async def undelete(self, trashed: str, request: UndeleteRequest) -> Operation:
        """Result: Sandbox. Raises AlreadyExists when its name is taken and the request has no other."""

    async def risk(self, name: str) -> RiskReport:
        """What only this sandbox has, in bounded time."""


class Images(Protocol):
    """`image` is `NAME[:TAG]`."""

    async def list(self) -> Sequence[ImageInfo]: ...
    async def get(self, image: str) -> ImageInfo: ...
    async def history(self, name: str) -> Sequence[ImageVersion]: ...
    async def remove(self, image: str) -> None: ...
    async def prune(self) -> PruneResult: ...
    async def verify(self, image: str) -> Operation: ...  # VerifyResult
    async def build(self, request: ImageBuildRequest) -> Operation: ...  # ImageInfo
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
    syncing: Syncing
    vaults: Vaults
    payloads: Payloads
    trash: Trash
    runtimes: Runtimes
