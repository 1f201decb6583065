"""The "guest" of the stand-in daemon: commands are processes of this machine, files are in a directory."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import os
import pty
import shutil
import signal
import struct
import subprocess
import tarfile
import termios
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from limpet.api.door import LaneName
from limpet.errors import AlreadyExists, FailedPrecondition, NotFound, nearest
from limpet.models import (
    CreateRequest,
    ExecInfo,
    ExecRequest,
    FileInfo,
    KillRequest,
    Operation,
    Sandbox,
    SandboxSpec,
    SetRequest,
    SetResult,
    State,
    StopRequest,
    StopResult,
    Unpacked,
)
from limpet.names import new_id
from limpet.services.operations import Operations, Stages
from limpet.services.streams import ExecEvent, Exit, Output, Started
from tests.contract.local_moments import PlayedMoments
from tests.contract.local_services import DirectoryFiles


class Boxes(PlayedMoments):
    """Sandboxes that are records. A create of the image "slow" waits until it is cancelled."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.known: dict[str, Sandbox] = {}
        self.begun: list[str] = []
        self.undone: list[str] = []
        self.created: list[CreateRequest] = []
        self.removed: Callable[[Sandbox], None] = lambda _: None

    async def create(self, request: CreateRequest) -> Operation:
        name = request.name or "made-up"
        if name in self.known:
            raise AlreadyExists(f"there is a sandbox named '{name}' already")

        async def work(stages: Stages) -> Sandbox:
            self.begun.append(name)
            async with stages.run("boot") as stage:
                stage.update(fraction=0.5)
                try:
                    if request.image == "slow":
                        await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.undone.append(name)
                    raise
            self.created.append(request)
            given = request.model_dump(exclude={"name", "start", "payloads"})
            if request.image == "served":
                given["entrypoint"] = request.entrypoint or ["echo", "from the entrypoint"]
            state = State.RUNNING if request.start else State.STOPPED
            self.known[name] = Sandbox(
                id=new_id("sb"), name=name, state=state, spec=SandboxSpec(**given), created_at=datetime.now(UTC),
                ports=request.ports,
            )  # fmt: skip
            return self.known[name]

        return self.operations.start("create", name, work)

    async def list(self, labels: Any) -> Sequence[Sandbox]:
        return [one for one in self.known.values() if labels.items() <= one.spec.labels.items()]

    def one(self, name: str) -> Sandbox:
        if name not in self.known:
            raise NotFound(f"no sandbox named '{name}'", hint=nearest(name, self.known))
        return self.known[name]

    async def set(self, name: str, request: SetRequest) -> SetResult:
        if request.dry_run:
            return SetResult(sandbox=self.one(name), applied=[], at_next_start=sorted(request.model_fields_set))
        box = self.known.pop(self.one(name).name)
        box.name = request.name or name
        self.known[box.name] = box
        return SetResult(sandbox=box, applied=sorted(request.model_fields_set), at_next_start=[])

    def _become(self, name: str, state: State) -> Sandbox:
        self.one(name).state = state
        return self.one(name)

    async def start(self, name: str) -> Operation:
        self.one(name)

        async def work(stages: Stages) -> Sandbox:
            return self._become(name, State.RUNNING)

        return self.operations.start("start", name, work)

    async def stop(self, name: str, request: StopRequest) -> Operation:
        self.one(name)

        async def work(stages: Stages) -> StopResult:
            self._become(name, State.STOPPED)
            return StopResult(name=name, rung="poweroff", durability="clean")

        return self.operations.start("stop", name, work)

    async def restart(self, name: str, request: StopRequest) -> Operation:
        return await self.start(name)

    async def kill(self, name: str, request: KillRequest) -> Operation:
        return await self.stop(name, StopRequest())

    async def remove(self, name: str, force: bool, purge: bool) -> Operation:
        if self.one(name).state is State.RUNNING and not force:
            raise FailedPrecondition(f"'{name}' is running", hint=f"limpet stop {name}, or --force")

        async def work(stages: Stages) -> None:
            box = self.known.pop(name)
            if not (purge or box.spec.ephemeral):
                self.removed(box)

        return self.operations.start("remove", name, work)


class LocalSession:
    """A local process as if it ran in a guest."""

    def __init__(self, request: ExecRequest) -> None:
        self._request = request
        self.id = new_id("ex")
        self._closed_stdin = False
        self._master = -1
        self.started_at = time.time()
        self.ended: ExecInfo | None = None

    async def spawn(self) -> None:
        request = self._request
        slave = -1
        if request.tty:
            self._master, slave = pty.openpty()
            os.set_blocking(self._master, False)
        stdin = slave if request.tty else subprocess.PIPE if request.stdin else subprocess.DEVNULL
        out = slave if request.tty else subprocess.PIPE
        try:
            self.process = await asyncio.create_subprocess_exec(
                *request.argv, stdin=stdin, stdout=out, stderr=out, cwd=request.cwd, env={**os.environ, **request.env},
                start_new_session=True,
                preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if request.tty else None,
            )  # fmt: skip
        except FileNotFoundError:
            raise NotFound(f"{request.argv[0]}: command not found in the guest") from None
        finally:
            if slave >= 0:
                os.close(slave)

    async def __aiter__(self) -> AsyncIterator[ExecEvent]:
        yield Started(self.id, self.process.pid)
        if self._request.detach:
            return
        chunks: asyncio.Queue[ExecEvent | None] = asyncio.Queue(4)
        sources = [self._terminal(chunks)] if self._request.tty else [self._pipe(1, chunks), self._pipe(2, chunks)]
        tasks = [asyncio.ensure_future(source) for source in sources]
        waiting = asyncio.ensure_future(self.wait())
        try:
            left = len(tasks)
            while left:
                event = await chunks.get()
                if event is None:
                    left -= 1
                else:
                    yield event
            yield Exit(await waiting)
        finally:
            for task in (*tasks, waiting):
                task.cancel()

    async def _pipe(self, lane: Any, chunks: asyncio.Queue[ExecEvent | None]) -> None:
        stream = self.process.stdout if lane == 1 else self.process.stderr
        assert stream is not None
        while data := await stream.read(64 << 10):
            await chunks.put(Output(lane, data))
        await chunks.put(None)

    async def _terminal(self, chunks: asyncio.Queue[ExecEvent | None]) -> None:
        while True:
            try:
                data = os.read(self._master, 4096)
            except BlockingIOError:
                await asyncio.sleep(0.01)
                continue
            except OSError:  # the last one closed its side
                break
            await chunks.put(Output(1, data))
        await chunks.put(None)

    async def wait(self) -> ExecInfo:
        limit, timed_out = self._request.timeout, False
        try:
            await asyncio.wait_for(self.process.wait(), limit)
        except TimeoutError:
            timed_out = True
            os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()
        code = self.process.returncode
        assert code is not None
        self.ended = self.info().model_copy(
            update={
                "running": False,
                "exit_code": code if code >= 0 else None,
                "signal": -code if code < 0 else None,
                "timed_out": timed_out,
            }
        )
        return self.ended

    def info(self) -> ExecInfo:
        request = self._request
        return self.ended or ExecInfo(
            id=self.id, argv=request.argv, user="user", cwd=request.cwd or "/", tty=request.tty, pid=self.process.pid,
            running=True, started_at=self.started_at,
        )  # fmt: skip

    async def write_stdin(self, data: bytes) -> None:
        if self._request.tty:
            os.write(self._master, data)
            return
        assert self.process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self.process.stdin.write(data)
            await self.process.stdin.drain()

    async def close_stdin(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()

    async def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    async def signal(self, name: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, getattr(signal, f"SIG{name}"))

    async def detach(self) -> None:
        pass


class LocalExecs:
    """Commands of all sandboxes. `attach` follows what a detached one has still to say."""

    def __init__(self, boxes: Boxes, guest: Path) -> None:
        self._boxes, self._guest = boxes, guest
        self.sessions: dict[str, LocalSession] = {}
        self.requests: list[ExecRequest] = []
        self.attached: list[tuple[str, int | None, int | None]] = []

    async def start(self, name: str, request: ExecRequest, *, start_if_stopped: bool) -> LocalSession:
        box = self._boxes.one(name)
        if box.state is not State.RUNNING:
            if not start_if_stopped:
                raise FailedPrecondition(f"'{name}' is {box.state}", hint=f"limpet start {name}")
            box.state = State.RUNNING
        self.requests.append(request)
        local = request.model_copy(update={"cwd": str(self._guest), "user": None})
        session = LocalSession(local)
        await session.spawn()
        self.sessions[session.id] = session
        return session

    def one(self, exec_id: str) -> LocalSession:
        if exec_id not in self.sessions:
            raise NotFound(f"no command {exec_id}", hint="limpet ps lists them")
        return self.sessions[exec_id]

    async def attach(
        self, name: str, exec_id: str, *, stdout: int | None, stderr: int | None, stdin: bool, steal: bool
    ) -> LocalSession:
        session = self.one(exec_id)
        self.attached.append((exec_id, stdout, stderr))
        session._request = session._request.model_copy(update={"detach": False})
        return session

    async def list(self, name: str) -> Sequence[ExecInfo]:
        return [session.info() for session in self.sessions.values()]

    async def get(self, name: str, exec_id: str) -> ExecInfo:
        return self.one(exec_id).info()

    async def signal(self, name: str, exec_id: str, signal: str) -> None:
        await self.one(exec_id).signal(signal)

    async def output(self, name: str, exec_id: str, lane: LaneName, offset: int) -> AsyncIterator[bytes]:
        raise NotFound("nothing is kept here")

    async def end(self) -> None:
        for session in self.sessions.values():
            if session.process.returncode is None:
                os.killpg(session.process.pid, signal.SIGKILL)
            cast(Any, session.process)._transport.close()  # or else asyncio complains of what nobody read
            await session.process.wait()


class GuestFiles(DirectoryFiles):
    """Directories too, and archives of them."""

    async def stat(self, name: str, path: str) -> FileInfo:
        if not self._at(path).exists():
            raise NotFound(f"{path} does not exist in the guest")
        kind: Any = "directory" if self._at(path).is_dir() else "file"
        return self._info(path).model_copy(update={"type": kind})

    async def remove(self, name: str, path: str, *, recursive: bool) -> None:
        shutil.rmtree(self._at(path)) if recursive else self._at(path).unlink()

    async def pack(self, name: str, path: str) -> AsyncIterator[bytes]:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            place = self._at(path)  # as the agent does: names are relative to a directory
            tar.add(place, arcname="." if place.is_dir() else place.name)

        async def chunks() -> AsyncIterator[bytes]:
            yield buffer.getvalue()

        return chunks()

    async def unpack(self, name: str, path: str, chunks: AsyncIterator[bytes], *, user: str | None) -> Unpacked:
        data = b"".join([chunk async for chunk in chunks])
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(self._at(path))
            return Unpacked(files=len(tar.getmembers()), bytes=len(data))
