"""The container runtime of a guest: start it, ask it, stop it, read its logs. See limpet_agent/runtime.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from limpet import errors
from limpet.guest.agent import Agent
from limpet.guest.answers import given_up, valid
from limpet.guest.streams import Data, nonsense
from limpet.models import RuntimeStatus, ServiceName, ServiceStatus

Text = Annotated[str, StringConstraints(max_length=4096)]
Name = Annotated[str, StringConstraints(max_length=256)]
Port = Annotated[int, Field(gt=0, lt=1 << 16)]
Told = Callable[[str, str, str | None], None]

SERVICES: tuple[ServiceName, ...] = ("containerd", "dockerd")
_START = 120.0  # seconds that containerd and dockerd may need together
_LOOK = 30.0  # seconds for questions to both services, each of which may be silent
_MORE = 30.0  # seconds beyond those that containers get
_GO_ON = 60.0  # seconds that a stop which is under way may still need; the guest goes on after a longer one, too
_MOST_STAGES = 64
_LONGEST_LOG = 4 << 20
_MOST_CONTAINERS = 200


class Ensured(BaseModel):
    """`not_ready` is an answer only when nothing was to be started."""

    how: Literal["started", "reused", "not_ready"]
    started: list[ServiceName] = Field(default=[], max_length=2)
    seconds: float = Field(ge=0, allow_inf_nan=False)


class Stopped(BaseModel):
    """Which services ended, and which of them had to be killed."""

    stopped: list[ServiceName] = Field(max_length=2)
    killed: list[ServiceName] = Field(max_length=2)


class Bound(BaseModel):
    """A port that a container publishes: `public` at the guest's address `ip`, `private` in the container."""

    ip: Name
    public: Port
    private: Port
    protocol: Literal["tcp", "udp", "sctp"]


class Container(BaseModel):
    """A container, running or not."""

    id: Annotated[str, StringConstraints(pattern="^[0-9a-f]{12,64}$")]
    name: Name
    image: Name
    state: Name
    ports: list[Bound] = Field(max_length=256)


class _Stage(BaseModel):
    stage: Annotated[str, StringConstraints(pattern="^[a-z][a-z ]{0,31}$")]
    state: Literal["running", "done"]
    detail: Text | None = None


class _EnsuredAnswer(BaseModel):
    ensured: Ensured


class _Service(BaseModel):
    name: ServiceName
    state: Literal["ready", "not_ready", "error"]
    reason: Text | None = None
    pid: int | None = Field(default=None, gt=0)


class _Status(BaseModel):
    state: Literal["ready", "starting", "stopping", "stopped", "degraded", "failed", "unavailable"]
    error: Text | None = None
    services: list[_Service] = Field(max_length=2)
    version: Name | None = None
    autostart: bool


class _Containers(BaseModel):
    containers: list[Container] = Field(max_length=_MOST_CONTAINERS)


class _Ok(BaseModel):
    ok: Literal[True]


def _untold(_stage: str, _state: str, _detail: str | None) -> None:
    """For callers that do not want to know."""


class Runtime:
    """The operations of one guest. All raise what those of `Agent` do."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def ensure(self, told: Told = _untold, *, start: bool = True, timeout: float = _START) -> Ensured:
        """See that the runtime answers; with `start=False` only look. `told(stage, state, detail)` hears how it goes:
        stages are prerequisites, containerd, dockerd, the state is running or done. Leaving early does not end the
        start. Raises FailedPrecondition when the guest lacks something, Unavailable when a service ended at its start
        or the runtime is being stopped, DeadlineExceeded."""
        stream = await self._agent.opened("rt.ensure", start=start)
        stream.patience = None
        try:
            async with given_up(stream), asyncio.timeout(timeout):
                for _ in range(_MOST_STAGES):
                    message = await stream.message()
                    if "ensured" in message:
                        return valid(_EnsuredAnswer, message, stream).ensured
                    stage = valid(_Stage, message, stream)
                    told(stage.stage, stage.state, stage.detail)
                raise nonsense("a start without an end")
        except TimeoutError:
            raise errors.DeadlineExceeded(
                f"the container runtime was not ready within {timeout:g} s", hint="limpet runtime status NAME"
            ) from None

    async def status(self) -> RuntimeStatus:
        """How it is, asked now; `socket` is left empty."""
        found = await self._agent.ask(_Status, "rt.status", _LOOK)
        services = [ServiceStatus(**service.model_dump()) for service in found.services]
        return RuntimeStatus(**found.model_dump(exclude={"services"}), services=services)

    async def stop(self, seconds: float, *, keep: bool) -> Stopped:
        """End the containers, within `seconds`, then the services; at once when nothing runs. With `keep` it comes
        back at the next boot if it would have, or with `go_on`, and nobody starts it for a while."""
        return await self._agent.ask(Stopped, "rt.stop", seconds + _MORE, seconds=seconds, keep=keep)

    async def go_on(self) -> None:
        """The machine was not stopped after all: bring the runtime back, in the background, if a boot would. A stop
        that is under way in the guest ends first."""
        await self._agent.ask(_Ok, "rt.go_on", _GO_ON)

    async def log(self, service: str, tail: int | None = None) -> AsyncGenerator[bytes, None]:
        """The last `tail` lines of a service's log, at most the newest 4 MiB."""
        left = _LONGEST_LOG
        stream = await self._agent.opened("rt.log", service=service, tail=tail)
        async with given_up(stream):
            async for piece in self._agent.pieces(stream):
                left -= len(piece)
                if left < 0:
                    raise nonsense("a longer log than there may be")
                yield piece

    async def containers(self) -> list[Container]:
        """At most 200 containers, running ones first. Raises FailedPrecondition unless the engine is ready."""
        found: list[Container] = []
        stream = await self._agent.opened("rt.containers")
        stream.patience = _LOOK
        async with given_up(stream):
            while (item := await stream.receive()) is not None:
                if isinstance(item, Data):
                    raise nonsense("no list of containers")
                found += valid(_Containers, item.body, stream).containers
                if len(found) > _MOST_CONTAINERS:
                    raise nonsense("more containers than it may tell of")
        return found
