"""A daemon to try the client and the command line on: the real API on a real Unix socket, over a "guest" that is this
machine. Commands are local processes, files are in a directory, sandboxes are records."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from limpet.api.app import create_app
from limpet.api.door import Services
from limpet.api.server import serving
from limpet.errors import BadRequest, FailedPrecondition
from limpet.models import (
    ApplyRequest,
    ApplyResult,
    Change,
    Changes,
    DoctorReport,
    Drift,
    ImportRequest,
    ImportResult,
    Operation,
    PortMapping,
    Row,
    Sandbox,
    SandboxSpec,
    State,
    WorkspaceInfo,
)
from limpet.names import new_id
from limpet.paths import discover
from limpet.services.config import Config
from limpet.services.events import Events
from limpet.services.operations import Operations, Stages
from limpet.services.streams import PatchBody
from limpet.store import Store
from tests.contract.local_moments import PlayedCheckpoints, PlayedImages, PlayedStorage, PlayedTemplates
from tests.contract.local_runtime import PlayedRuntimes
from tests.contract.local_services import LocalStats, LocalSystem
from tests.contract.local_vaults import PlayedPayloads, PlayedSyncing, PlayedTrash, PlayedVaults

from .client_guest import Boxes, GuestFiles, LocalExecs

PATCH = b"diff --git a/x b/x\n\xff\x00 binary\n"
CHANGES = [Change(status="A", path="new.txt", added=2, removed=0), Change(status="M", path="x\x1b[31m", added=1)]


class PlayedWorkspaces:
    """Records what was imported; the changes are always the same."""

    def __init__(self, boxes: Boxes) -> None:
        self._boxes = boxes
        self.imports: list[ImportRequest] = []
        self.moved = False

    async def import_dir(self, name: str, request: ImportRequest) -> Operation:
        async def work(stages: Stages) -> ImportResult:
            self.imports.append(request)
            if (Path(request.host_dir) / "unreadable").exists():
                raise BadRequest("cannot read unreadable")
            info = WorkspaceInfo(host_dir=request.host_dir, guest_dir="/workspace", status="complete", kind="git")
            if not request.dry_run:
                self._boxes.one(name).workspace = info
            return ImportResult(workspace=info, files=3, bytes=10, paths=["a"] if request.dry_run else None)

        return self._boxes.operations.start("import", name, work)

    async def changes(self, name: str, base: str | None) -> Changes:
        return Changes(base=base or "0123", changes=CHANGES, patch_bytes=len(PATCH))

    async def patch(self, name: str, base: str | None) -> PatchBody:
        async def chunks() -> AsyncIterator[bytes]:
            yield PATCH

        return PatchBody(base or "0123", chunks())

    async def apply(self, name: str, request: ApplyRequest) -> ApplyResult:
        if request.base == "conflict":
            raise FailedPrecondition("the patch does not apply: x", hint="limpet export -o FILE")
        return ApplyResult(
            host_dir=request.host_dir or "/src", base="0123", changes=CHANGES[:1], applied=not request.check
        )

    async def drift(self, name: str) -> Drift:
        return Drift(moved=self.moved, why="HEAD moved" if self.moved else None)


class PlayedPorts:
    def __init__(self, boxes: Boxes) -> None:
        self._boxes = boxes

    async def list(self, name: str) -> Sequence[PortMapping]:
        return self._boxes.one(name).ports

    async def add(self, name: str, mapping: PortMapping) -> PortMapping:
        given = PortMapping(host=mapping.host or 40123, guest=mapping.guest)
        self._boxes.one(name).ports.append(given)
        return given

    async def remove(self, name: str, host: int) -> None:
        box = self._boxes.one(name)
        box.ports = [port for port in box.ports if port.host != host]


class PlayedSystem(LocalSystem):
    """Set-up of three pieces, and a shutdown that is one."""

    def __init__(self, home: Path, operations: Operations, end: Any) -> None:
        super().__init__(home)
        self._operations, self._end = operations, end

    async def shutdown(self) -> None:
        self._end()

    async def setup(self, mirror: str | None) -> Operation:
        async def work(stages: Stages) -> dict[str, Any]:
            async with stages.run("kernel"):
                return {"done": ["kernel", mirror or "no mirror"]}

        return self._operations.start("setup", None, work)


class PlayedDoctor:
    async def run(self) -> DoctorReport:
        return DoctorReport(rows=[Row(check="kvm", status="WARN", detail="opens, but does not work", remedy="none")])

    async def repair(self) -> DoctorReport:
        return DoctorReport(rows=[Row(check="disk", status="FAIL", detail="full")], repaired=["a lock"])


class StandIn:
    """The daemon of these tests, in a thread."""

    def __init__(self, home: Path) -> None:
        self.home, self.guest = home, home / "guest"
        self.paths = discover(home)
        self.paths.make()
        self.guest.mkdir()
        self._started: list[subprocess.Popen[bytes]] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    def __enter__(self) -> StandIn:
        self._thread.start()
        assert self._ready.wait(10)
        self.add("web")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:  # one that a failed test left would start a real daemon to come back to
            process.kill()
            process.wait()
        with contextlib.suppress(RuntimeError):  # it ended already
            self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        store = Store.open(self.paths)
        self.operations, self.events = Operations(store), Events(store)
        self.boxes = Boxes(self.operations)
        self.local_execs = LocalExecs(self.boxes, self.guest)
        self.workspaces = PlayedWorkspaces(self.boxes)
        self.checkpoints = PlayedCheckpoints(self.boxes)
        self.images, self.storage = PlayedImages(self.operations), PlayedStorage(self.operations)
        self.vaults, self.payloads = PlayedVaults(self.boxes), PlayedPayloads(self.boxes)
        self.trash, syncing = PlayedTrash(self.boxes), PlayedSyncing(self.boxes)
        self.runtimes = PlayedRuntimes(self.boxes)
        self.boxes.removed, syncing.payloads = self.trash.take, self.payloads
        services = Services(
            system=PlayedSystem(self.paths.data, self.operations, self._end.set), sandboxes=self.boxes,
            standing=self.boxes, forks=self.boxes, commits=self.boxes,
            execs=self.local_execs, files=GuestFiles(self.guest), ports=PlayedPorts(self.boxes),
            workspaces=self.workspaces, images=self.images, checkpoints=self.checkpoints,
            templates=PlayedTemplates(self.operations), config=Config(store), storage=self.storage,
            doctor=PlayedDoctor(), stats=LocalStats(), operations=self.operations, events=self.events,
            syncing=syncing, vaults=self.vaults, payloads=self.payloads, trash=self.trash,
            runtimes=self.runtimes,
        )  # fmt: skip
        try:
            async with serving(create_app(services), self.paths.daemon_socket):
                self._ready.set()
                await self._end.wait()
                await self.operations.close()
                self.events.close()
        finally:
            await self.local_execs.end()
            store.close()

    def emit(self, kind: str, **data: Any) -> None:
        """Emit an event from the test's thread."""

        async def do() -> None:
            self.events.emit(kind, **data)

        asyncio.run_coroutine_threadsafe(do(), self.loop).result(10)

    def add(self, name: str, state: State = State.RUNNING, **changes: Any) -> Sandbox:
        """A sandbox that is there already."""
        box = Sandbox(id=new_id("sb"), name=name, state=state, spec=SandboxSpec(), created_at=datetime.now(UTC))
        self.boxes.known[name] = box.model_copy(update=changes)
        return self.boxes.known[name]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "LIMPET_HOME": str(self.home), "COLUMNS": "100", "TERM": "xterm"}

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """The command line, running."""
        process = subprocess.Popen(
            [sys.executable, "-m", "limpet.cli.main", *words], env=self.environment(),
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )  # fmt: skip
        self._started.append(process)
        return process

    def cli(
        self, *words: str, input: bytes | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """The command line, run to its end."""
        return subprocess.run(
            [sys.executable, "-m", "limpet.cli.main", *words], env=self.environment(), cwd=cwd or self.home,
            input=input, stdin=subprocess.DEVNULL if input is None else None, capture_output=True, timeout=30,
            check=False,
        )  # fmt: skip

    def complete(self, line: str) -> list[str]:
        """What the shell would offer at the end of this command line."""
        extra = {"_LIMPET_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = subprocess.run(
            [sys.executable, "-m", "limpet.cli.main"], env=self.environment() | extra, capture_output=True,
            text=True, timeout=30, check=False,
        )  # fmt: skip
        return done.stdout.split()


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    """A stand-in daemon in a home of its own with one running sandbox, `web`."""
    home = Path(tempfile.mkdtemp(prefix="limpet-cli-"))
    try:
        with StandIn(home) as server:
            yield server
    finally:
        shutil.rmtree(home, ignore_errors=True)


def read_until(file: IO[bytes] | None, wanted: bytes) -> bytes:
    assert file is not None
    seen = b""
    while wanted not in seen:
        assert select.select([file], [], [], 10)[0], f"waited for {wanted!r}, saw {seen!r}"
        data = os.read(file.fileno(), 4096)
        assert data, f"waited for {wanted!r}, saw {seen!r}"
        seen += data
    return seen


class Terminal:
    """The command line at a terminal of its own."""

    def __init__(self, daemon: StandIn, *words: str) -> None:
        self.master, slave = pty.openpty()
        self.process = daemon.popen(*words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.seen = b""

    def until(self, wanted: bytes) -> None:
        while wanted not in self.seen:
            assert select.select([self.master], [], [], 10)[0], f"waited for {wanted!r}, saw {self.seen!r}"
            self.seen += os.read(self.master, 4096)

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        code = self.process.wait(10)
        while select.select([self.master], [], [], 0.2)[0]:
            try:
                self.seen += os.read(self.master, 4096)
            except OSError:
                break
        os.close(self.master)
        return code
