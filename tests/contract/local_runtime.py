"""Container runtimes that are records, for the API's tests: sandboxes are those of `known`. The image of `bare` lacks
programs, so that its runtime never starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from limpet.errors import FailedPrecondition
from limpet.models import (
    ContainerPort,
    Operation,
    RuntimeResult,
    RuntimeStatus,
    RuntimeStopped,
    RuntimeStopRequest,
    Sandbox,
    ServiceName,
    ServiceStatus,
    Stage,
    State,
)
from limpet.services.operations import Stages
from tests.contract.local_moments import PlayedMoments

SERVICES: tuple[ServiceName, ...] = ("containerd", "dockerd")
MISSING = "the image lacks dockerd, containerd"
LINES = 1000
PORTS = [
    ContainerPort(container="db", image="postgres:17", guest=5432, port=5432, protocol="tcp"),
    ContainerPort(container="web", image="nginx", guest=8080, port=80, protocol="tcp", host=40123),
]


class PlayedRuntimes:
    def __init__(self, boxes: PlayedMoments) -> None:
        self._boxes = boxes
        self.ready: set[str] = set()
        self.asked: list[RuntimeStopRequest] = []

    async def _running(self, name: str) -> Sandbox:
        box = await self._boxes.get(name)
        if box.state not in (State.RUNNING, State.PAUSED, State.SUSPENDED):
            raise FailedPrecondition(f"{name} is not running", hint=f"limpet start {name}")
        return box

    async def ensure(self, name: str) -> Operation:
        box = await self._running(name)

        async def work(stages: Stages) -> RuntimeResult:
            box.state = State.RUNNING
            if name == "bare":
                stages.report(Stage(name="prerequisites", state="failed"))
                raise FailedPrecondition(MISSING, hint="limpet create --image docker")
            if name in self.ready:
                return RuntimeResult(how="reused", seconds=0.01)
            for stage in ("prerequisites", *SERVICES):
                stages.report(Stage(name=stage, state="running"))
                await asyncio.sleep(0)
                stages.report(Stage(name=stage, state="done", seconds=2.0))
            self.ready.add(name)
            return RuntimeResult(how="started", seconds=6.0, started=[*SERVICES])

        return self._boxes.operations.start("runtime ensure", name, work)

    async def status(self, name: str) -> RuntimeStatus:
        box = await self._running(name)
        if box.state is not State.RUNNING:
            raise FailedPrecondition(f"{name} is {box.state.value}", hint=f"limpet resume {name}")
        up = name in self.ready
        services = [
            ServiceStatus(name=service, state="ready" if up else "not_ready", pid=100 + number if up else None)
            for number, service in enumerate(SERVICES)
        ]
        state: Literal["ready", "stopped", "unavailable"] = "ready" if up else "stopped"
        return RuntimeStatus(
            state="unavailable" if name == "bare" else state, error=MISSING if name == "bare" else None,
            services=services, version="20.10.24" if up else None, autostart=up, socket=f"/run/{name}/docker.sock",
        )  # fmt: skip

    async def stop(self, name: str, request: RuntimeStopRequest) -> Operation:
        await self._running(name)
        self.asked.append(request)

        async def work(stages: Stages) -> RuntimeStopped:
            async with stages.run("stop"):
                stopped: list[str] = [*reversed(SERVICES)] if name in self.ready else []
                self.ready.discard(name)
            return RuntimeStopped(stopped=stopped, killed=["dockerd"] if stopped and not request.timeout else [],
                                  seconds=0.5)  # fmt: skip

        return self._boxes.operations.start("runtime stop", name, work)

    async def logs(self, name: str, service: ServiceName, tail: int | None) -> AsyncIterator[bytes]:
        await self._running(name)

        async def kept() -> AsyncIterator[bytes]:
            for number in range(LINES)[-(tail or 0) :] if tail != 0 else ():
                yield f"{service} line {number}\n".encode()

        return kept()

    async def ports(self, name: str) -> Sequence[ContainerPort]:
        await self._boxes.get(name)
        return PORTS if name in self.ready else []
