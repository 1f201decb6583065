"""Services for the API's tests: real operations, events and store; sandboxes in a dict, files in a directory, commands
that are played."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from limpet import PROTOCOL
from limpet.api.door import LaneName, LogSource
from limpet.errors import AlreadyExists, FailedPrecondition, NotFound
from limpet.models import (
    CreateRequest,
    DaemonStatus,
    ExecInfo,
    ExecRequest,
    FileInfo,
    KillRequest,
    Operation,
    PortMapping,
    Sandbox,
    SandboxSpec,
    SetRequest,
    SetResult,
    State,
    Stats,
    StopRequest,
    StopResult,
    SystemInfo,
    Unpacked,
)
from limpet.names import new_id
from limpet.services.operations import Operations, Stages
from limpet.services.streams import ExecEvent, Exit, FileBody, Gap, Output, Started
from tests.contract.local_moments import PlayedMoments

CHUNK = 256 << 10


class PlayedSandboxes(PlayedMoments):
    """Sandboxes that are records only. A create of the image "slow" waits until it is cancelled."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.known: dict[str, Sandbox] = {}
        self.removed: Callable[[Sandbox], None] = lambda _: None
        self.undone: list[str] = []

    async def create(self, request: CreateRequest) -> Operation:
        name = request.name or "made-up"
        if name in self.known:
            raise AlreadyExists(f"there is a sandbox named {name!r} already")

        async def work(stages: Stages) -> Sandbox:
            async with stages.run("boot") as stage:
                stage.update(fraction=0.5)
                try:
                    if request.image == "slow":
                        await asyncio.Event().wait()
                    if request.image == "bug":
                        raise ZeroDivisionError("an image that finds a bug")
                except asyncio.CancelledError:
                    self.undone.append(name)
                    raise
            spec = SandboxSpec(labels=request.labels)
            made = Sandbox(id=new_id("sb"), name=name, state=State.RUNNING, spec=spec, created_at=datetime.now(UTC))
            self.known[name] = made
            return made

        return self.operations.start("create", name, work)

    async def list(self, labels: Mapping[str, str]) -> Sequence[Sandbox]:
        return [one for one in self.known.values() if labels.items() <= one.spec.labels.items()]

    async def set(self, name: str, request: SetRequest) -> SetResult:
        return SetResult(sandbox=await self.get(name), applied=[*request.model_fields_set], at_next_start=[])

    async def start(self, name: str) -> Operation:
        raise ZeroDivisionError("a bug")

    async def stop(self, name: str, request: StopRequest) -> Operation:
        async def work(stages: Stages) -> StopResult:
            return StopResult(name=name, rung="sigkill" if request.force else "poweroff", durability="clean")

        return self.operations.start("stop", name, work)

    async def restart(self, name: str, request: StopRequest) -> Operation:
        return await self.stop(name, request)

    async def kill(self, name: str, request: KillRequest) -> Operation:
        return await self.stop(name, StopRequest())

    async def remove(self, name: str, force: bool, purge: bool) -> Operation:
        async def work(stages: Stages) -> None:
            box = self.known.pop(name)
            if not purge:
                self.removed(box)

        return self.operations.start("remove", name, work)


class PlayedSession:
    """`cat` echoes its input; `flood` never stops writing; `split` writes to both lanes; `lost` has a gap."""

    def __init__(self, argv: list[str], pulled: list[int]) -> None:
        self.argv = argv
        self.pulled = pulled  # bytes that were asked for, for the back-pressure test
        self.inputs: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        self.heard: list[str] = []
        self.detached = asyncio.Event()
        self.read_input = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[ExecEvent]:
        yield Started("ex_1", 42)
        match self.argv[0]:
            case "cat":
                while (data := await self.inputs.get()) is not None:
                    yield Output(1, data)
            case "flood":
                while True:
                    self.pulled[0] += CHUNK
                    yield Output(1, bytes(CHUNK))
            case "split":
                yield Output(1, b"out")
                yield Output(2, b"err")
                yield Output(1, bytes(600_000))
            case "lost":
                yield Gap(2, 10, 30)
            case "sleep":
                await asyncio.Event().wait()
            case "breaks":
                raise FailedPrecondition("the guest went away", hint="limpet start NAME")
        yield Exit(played_info(self.argv))

    async def write_stdin(self, data: bytes) -> None:
        await self.inputs.put(data)

    async def close_stdin(self) -> None:
        await self.inputs.put(None)

    async def resize(self, rows: int, cols: int) -> None:
        self.heard.append(f"{rows}x{cols}")
        await self.inputs.put(f"{rows}x{cols}".encode())

    async def signal(self, signal: str) -> None:
        self.heard.append(signal)
        await self.inputs.put(signal.encode())

    async def detach(self) -> None:
        self.detached.set()


def played_info(argv: list[str]) -> ExecInfo:
    return ExecInfo(id="ex_1", argv=argv, user="user", cwd="/", tty=False, running=False, exit_code=7, started_at=1.0)


class PlayedExecs:
    def __init__(self) -> None:
        self.sessions: list[PlayedSession] = []
        self.pulled = [0]
        self.attached: list[Any] = []

    async def start(self, name: str, request: ExecRequest, *, start_if_stopped: bool) -> PlayedSession:
        if name != "web":
            raise NotFound(f"no sandbox named {name!r}", hint="did you mean 'web'?")
        if request.argv[0] == "bug":
            raise ZeroDivisionError("a bug")
        self.sessions.append(PlayedSession(request.argv, self.pulled))
        return self.sessions[-1]

    async def attach(
        self, name: str, exec_id: str, *, stdout: int | None, stderr: int | None, stdin: bool, steal: bool
    ) -> PlayedSession:
        self.attached.append((name, exec_id, stdout, stderr, stdin, steal))
        return await self.start(name, ExecRequest(argv=["split"]), start_if_stopped=False)

    async def list(self, name: str) -> Sequence[ExecInfo]:
        return [played_info(["true"])]

    async def get(self, name: str, exec_id: str) -> ExecInfo:
        return played_info(["true"])

    async def signal(self, name: str, exec_id: str, signal: str) -> None:
        self.attached.append(signal)

    async def output(self, name: str, exec_id: str, lane: LaneName, offset: int) -> AsyncIterator[bytes]:
        async def kept() -> AsyncIterator[bytes]:
            yield f"{lane} from {offset}".encode()

        return kept()


class DirectoryFiles:
    """A guest whose root is a directory of the host. `/endless` is a file without an end, `/broken` one that breaks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.closed = threading.Event()  # a reader of /endless was closed
        self.given_up = threading.Event()  # an upload was broken off
        self.produced = 0

    def _at(self, path: str) -> Path:
        return Path(os.fsdecode(os.fsencode(self.root) + b"/" + os.fsencode(path.lstrip("/"))))

    def _info(self, path: str) -> FileInfo:
        found = self._at(path).stat()
        mode = found.st_mode & 0o7777
        return FileInfo(path=path, type="file", size=found.st_size, mode=mode, uid=0, gid=0, mtime_ns=1)

    async def read(self, name: str, path: str) -> FileBody:
        info = FileInfo(path=path, type="file", size=0, mode=0, uid=0, gid=0, mtime_ns=1)
        if path == "/endless":
            return FileBody(info, self._endless())
        if path == "/broken":
            return FileBody(info, self._broken())
        if not self._at(path).exists():
            raise NotFound(f"{path} does not exist in the guest")
        return FileBody(self._info(path), self._chunks(path))

    async def _chunks(self, path: str) -> AsyncIterator[bytes]:
        with self._at(path).open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                yield chunk

    async def _endless(self) -> AsyncIterator[bytes]:
        try:
            while True:
                self.produced += CHUNK
                yield bytes(CHUNK)
                await asyncio.sleep(0)
        finally:
            self.closed.set()

    async def _broken(self) -> AsyncIterator[bytes]:
        yield b"some"
        raise FailedPrecondition("the guest went away")

    async def write(
        self, name: str, path: str, chunks: AsyncIterator[bytes], *,
        mode: int | None, user: str | None, parents: bool, size: int | None,
    ) -> FileInfo:  # fmt: skip
        try:
            with self._at(path).open("wb", buffering=0) as file:
                async for chunk in chunks:
                    file.write(chunk)
        except BaseException:
            self._at(path).unlink()
            self.given_up.set()
            raise
        if mode is not None:
            self._at(path).chmod(mode)
        return self._info(path)

    async def stat(self, name: str, path: str) -> FileInfo:
        return self._info(path)

    async def list(self, name: str, path: str) -> Sequence[FileInfo]:
        return [self._info(f"{path.rstrip('/')}/{child.name}") for child in sorted(self._at(path).iterdir())]

    async def mkdir(self, name: str, path: str, *, parents: bool, mode: int | None) -> None:
        self._at(path).mkdir(parents=parents)

    async def rename(self, name: str, source: str, target: str) -> None:
        self._at(source).rename(self._at(target))

    async def remove(self, name: str, path: str, *, recursive: bool) -> None:
        self._at(path).unlink()

    async def pack(self, name: str, path: str) -> AsyncIterator[bytes]:
        return self._chunks(path)

    async def unpack(self, name: str, path: str, chunks: AsyncIterator[bytes], *, user: str | None) -> Unpacked:
        return Unpacked(files=1, bytes=sum([len(chunk) async for chunk in chunks]))


class LocalSystem:
    def __init__(self, home: Path) -> None:
        self.home = home

    async def status(self) -> DaemonStatus:
        home = str(self.home)
        return DaemonStatus(
            pid=os.getpid(), version="0", protocol=PROTOCOL, started_at=datetime.now(UTC), data_dir=home,
            cache_dir=home, socket=home, sandboxes=0, running=0,
        )  # fmt: skip

    async def shutdown(self) -> None:
        pass

    async def setup(self, mirror: str | None) -> Operation:
        raise FailedPrecondition(f"no set-up here from {mirror}")


class LocalStats:
    async def one(self, name: str) -> Stats:
        return Stats(name=name, state=State.RUNNING)

    async def all(self) -> Sequence[Stats]:
        return [await self.one("web")]

    async def system(self, name: str) -> SystemInfo:
        raise FailedPrecondition(f"{name} is not running")

    async def logs(self, name: str, source: LogSource, tail: int | None) -> bytes:
        return f"{source} {tail}\n".encode()


class NoPorts:
    async def list(self, name: str) -> Sequence[PortMapping]:
        return []

    async def add(self, name: str, mapping: PortMapping) -> PortMapping:
        return mapping

    async def remove(self, name: str, host: int) -> None:
        raise NotFound(f"{name} does not publish host port {host}")
