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
    CreateRequest,
    DaemonStatus,
    DoctorReport,
    Drift,
    ExecInfo,
    ExecRequest,
    FileInfo,
    ImageInfo,
    ImportRequest,
    KillRequest,
    Operation,
    PortMapping,
    Sandbox,
    SetRequest,
    SetResult,
    Stats,
    StopRequest,
    SystemInfo,
    Unpacked,
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
    async def list(self) -> Sequence[ImageInfo]: ...


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
    execs: Execs
    files: Files
    ports: Ports
    workspaces: Workspaces
    images: Images
    doctor: Doctor
    stats: StatsService
    operations: Operations
    events: Events
