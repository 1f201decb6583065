"""The container runtime of a sandbox: containerd and dockerd in the guest, the Docker API on the host."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from limpet.models._base import Model, Request

ServiceName = Literal["containerd", "dockerd"]


class ServiceStatus(Model):
    """One service of the runtime. `not_ready`: it does not run; `error`: it should answer and does not, `reason` says
    what was seen (`socket exists but does not answer`). A `ready` one has just answered a call of its API."""

    name: ServiceName
    state: Literal["ready", "not_ready", "error"]
    reason: str | None = None
    pid: int | None = None


class RuntimeStatus(Model):
    """How the container runtime of a running sandbox is, asked now. `unavailable`: it cannot be started, `error` says
    why (programs that the image lacks, no data disk); `failed`: the last attempt to start it, with its `error`;
    `degraded`: it should run and a service does not."""

    state: Literal["ready", "starting", "stopping", "stopped", "degraded", "failed", "unavailable"]
    error: str | None = None
    services: list[ServiceStatus] = []
    version: str | None = None  # of dockerd, when it is ready
    autostart: bool = False  # it comes back with the sandbox
    socket: str = ""  # of the Docker API, on this host


class RuntimeResult(Model):
    """What `ensure` found or did. `started` names the services that had to be started, in that order."""

    how: Literal["started", "reused"]
    seconds: float
    started: list[str] = []


class RuntimeStopRequest(Request):
    """POST …/runtime/stop. `timeout`: seconds that containers have to end in; then they are killed."""

    timeout: Annotated[float, Field(ge=0, le=3600)] = 20.0


class RuntimeStopped(Model):
    """`killed` names the services that did not end in time."""

    stopped: list[str]
    killed: list[str] = []
    seconds: float


class ContainerPort(Model):
    """A port that a container publishes in its guest. `host`: the port of this host that leads there, None: none."""

    container: str
    image: str
    guest: int
    port: int  # in the container
    protocol: Literal["tcp", "udp", "sctp"]
    host: int | None = None


class ImageBuildRequest(Request):
    """POST /v1/images/build: make the image of one of limpet's own recipes. `force`: although it is current."""

    name: str
    force: bool = False
