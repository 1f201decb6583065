"""The container runtime of a sandbox: containerd and dockerd in its guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limpet.client._async.operations import AsyncOperations, OnStage
from limpet.client._async.transport import AsyncTransport
from limpet.models import ContainerPort, RuntimeResult, RuntimeStatus, RuntimeStopped, ServiceName

if TYPE_CHECKING:
    from limpet.client._async.sandbox import AsyncSandbox

_STOP_TIMEOUT = 20.0  # seconds, as the daemon's default


class AsyncRuntime:
    """`Sandbox.docker_host` is where its Docker API listens; the first use of it does what `ensure` does."""

    def __init__(self, transport: AsyncTransport, sandbox: AsyncSandbox) -> None:
        self._transport, self._sandbox = transport, sandbox
        self._operations = AsyncOperations(transport)

    async def ensure(self, *, on_stage: OnStage | None = None) -> RuntimeResult:
        """Start it unless it is ready. Raises FailedPrecondition, naming it, when something is missing for that."""
        path = self._sandbox.path("runtime", "ensure")
        return RuntimeResult.model_validate(await self._operations.run("POST", path, on_stage=on_stage))

    async def status(self) -> RuntimeStatus:
        """How it is, asked of the services now; nothing is started."""
        return RuntimeStatus.model_validate(await self._transport.request("GET", self._sandbox.path("runtime")))

    async def stop(self, *, timeout: float = _STOP_TIMEOUT, on_stage: OnStage | None = None) -> RuntimeStopped:
        """Stop its containers, then the engine; what has not ended after `timeout` seconds is killed. It comes back
        when it is asked for, not by itself."""
        path, body = self._sandbox.path("runtime", "stop"), {"timeout": timeout}
        return RuntimeStopped.model_validate(await self._operations.run("POST", path, body=body, on_stage=on_stage))

    async def logs(self, service: ServiceName = "dockerd", tail: int | None = None) -> bytes:
        """The last `tail` lines that a service wrote (None: all that can be had, at most 4 MiB)."""
        path = self._sandbox.path("runtime", "logs", service)
        async with self._transport.stream("GET", path, params={"tail": tail}) as response:
            return await response.aread()

    async def ports(self) -> list[ContainerPort]:
        """What containers publish in the guest; `Sandbox.ports.publish` brings it to this host."""
        answer = await self._transport.request("GET", self._sandbox.path("runtime", "ports"))
        return [ContainerPort.model_validate(item) for item in answer]
