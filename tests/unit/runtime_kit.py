"""A running sandbox whose guest has a container engine that is only played: the real channel and the real client of the
agent, on a real Unix socket. What a real engine does is tests/vm/test_runtime.py's to prove."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from limpet.errors import DeadlineExceeded
from limpet.models import State
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.store import SandboxRecord
from limpet.vmm.machine import Machine
from limpet_agent import frames
from tests.unit.services_kit import add_sandbox, host_in

SERVICES = ["containerd", "dockerd"]
CONTAINER = {
    "id": "0123456789ab",
    "name": "web",
    "image": "nginx",
    "state": "running",
    "ports": [
        {"ip": "0.0.0.0", "public": 8080, "private": 80, "protocol": "tcp"},
        {"ip": "::", "public": 8080, "private": 80, "protocol": "tcp"},
        {"ip": "0.0.0.0", "public": 53, "private": 53, "protocol": "udp"},
    ],
}
Reply = tuple[int, Any]


def fault(code: str, message: str) -> Reply:
    return frames.RESET, {"code": code, "message": message}


@dataclass
class PlayedGuest:
    """`faults`: what operations are answered with instead. `silent`: those that are never answered. A start waits for
    `gate`."""

    ready: bool = False
    killed: list[str] = field(default_factory=list)
    faults: dict[str, Reply] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    heard: list[dict[str, Any]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    off: asyncio.Event = field(default_factory=asyncio.Event)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def ops(self) -> list[str]:
        return [request["op"] for request in self.heard]

    def asked(self, op: str) -> list[dict[str, Any]]:
        return [request for request in self.heard if request["op"] == op]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        answering: set[asyncio.Task[None]] = set()
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                writer.write(await reader.readexactly(frames.HEADER.size + 24))  # the greeting
                while True:
                    length, stream, kind = frames.HEADER.unpack(await reader.readexactly(frames.HEADER.size))
                    payload = await reader.readexactly(length)
                    if kind == frames.OPEN:
                        self.heard.append(json.loads(payload))
                        answering.add(asyncio.create_task(self._answer(writer, stream, self.heard[-1])))
        finally:
            for task in answering:
                task.cancel()
            writer.close()

    async def hang_up(self) -> None:
        while self.writers:
            writer = self.writers.pop()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, writer: asyncio.StreamWriter, stream: int, request: dict[str, Any]) -> None:
        if request["op"] in self.silent:
            return
        async for kind, body in self._replies(request):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            writer.write(frames.encode(stream, kind, data))
        writer.write(frames.encode(stream, frames.END))

    async def _replies(self, request: dict[str, Any]) -> AsyncIterator[Reply]:
        op = request["op"]
        if op == "rt.ensure" and not self.ready:
            for stage in ("prerequisites", *SERVICES):
                yield frames.MSG, {"stage": stage, "state": "running", "detail": None}
                await self.gate.wait()
                if op in self.faults:
                    break
                yield frames.MSG, {"stage": stage, "state": "done", "detail": None}
        if op in self.faults:
            yield self.faults[op]
        elif op == "rt.ensure":
            how = "reused" if self.ready else "started"
            self.ready = True
            yield frames.MSG, {"ensured": {"how": how, "started": SERVICES if how == "started" else [], "seconds": 1.0}}
        elif op == "rt.stop":
            yield frames.MSG, {"stopped": SERVICES[::-1] if self.ready else [], "killed": self.killed}
            self.ready = False
        elif op == "rt.status":
            yield frames.MSG, {"state": "ready" if self.ready else "stopped", "error": None, "services": [],
                               "version": None, "autostart": True}  # fmt: skip
        elif op == "rt.containers":
            yield (frames.MSG, {"containers": [CONTAINER]}) if self.ready else fault("failed_precondition", "not ready")
        elif op == "rt.log":
            yield frames.DATA, f"{request['service']} {request['tail']}\n".encode()
        else:
            if op == "poweroff":
                self.off.set()
            yield frames.MSG, {"ok": True}


class PlayedMachine:
    """It ends when its guest powers itself off, or is told to."""

    pid, accel = 1, "tcg"

    def __init__(self, guest: PlayedGuest) -> None:
        self._off = guest.off

    def alive(self) -> bool:
        return not self._off.is_set()

    async def wait(self, timeout: float | None = None) -> int:
        try:
            await asyncio.wait_for(self._off.wait(), timeout)
        except TimeoutError:
            raise DeadlineExceeded("it runs on") from None
        return 0

    async def end(self, *, patience: float) -> str:
        self._off.set()
        return "quit"

    async def close(self) -> None:
        pass


@dataclass
class Running:
    """A sandbox that runs."""

    host: Host
    record: SandboxRecord
    vm: LiveVM
    guest: PlayedGuest

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The data of all events of a kind."""
        return [event.data for event in self.host.events._store.events_after(0, limit=1000) if event.kind == kind]

    def become(self, state: State) -> None:
        self.host.records.update(self.record.id, state=state)


@contextlib.asynccontextmanager
async def running(home: Path) -> AsyncIterator[Running]:
    """The sandbox `box`. `home` has to be short: sockets are in it."""
    with host_in(home) as host:
        record = add_sandbox(host, "box", state=State.RUNNING, disks=None)
        files, guest = host.paths.sandbox(record.id), PlayedGuest()
        files.sockets.mkdir(parents=True)
        files.intake.write_bytes(bytes(1 << 20))
        server = await asyncio.start_unix_server(guest.serve, files.channel)
        vm = LiveVM(record.id, cast(Machine, PlayedMachine(guest)), files)
        host.live.add(vm)
        try:
            async with asyncio.timeout(30):
                yield Running(host, record, vm, guest)
        finally:
            await host.operations.close()
            await host.engines.close()
            await vm.close()
            server.close()
            await guest.hang_up()
            await asyncio.sleep(0.01)  # for the handlers to notice
