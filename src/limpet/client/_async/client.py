"""The client itself: everything that is not inside of one sandbox.

Models are imported where they are used, since `limpet exec` comes through here and must not wait for pydantic.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from limpet.client import _wire
from limpet.client._async import exec as exec_module
from limpet.client._async.exec import AsyncExec, AsyncExecHandle
from limpet.client._async.transport import AsyncTransport
from limpet.errors import DeadlineExceeded, Unavailable
from limpet.names import check_name

if TYPE_CHECKING:
    from limpet.client._async.checkpoints import AsyncCheckpoints
    from limpet.client._async.images import AsyncImages
    from limpet.client._async.operations import AsyncOperations, OnStage
    from limpet.client._async.sandboxes import AsyncSandboxes
    from limpet.client._async.trash import AsyncTrash
    from limpet.client._async.upkeep import AsyncConfig, AsyncSystem, AsyncTemplates
    from limpet.client._async.vaults import AsyncVaults
    from limpet.models import DaemonStatus, DoctorReport, Event, PayloadStatus, Stats, SyncStatus

_STOP_POLL = 0.05  # seconds between two looks whether the daemon is gone


class AsyncClient:
    """A client of this user's daemon, which is started when none runs.

    `home` stands for LIMPET_HOME. `timeout`: seconds without a byte after which a request is given up; commands and
    long operations may be silent for longer. Usable as a context manager; several threads or tasks may share one.
    """

    def __init__(
        self,
        home: str | os.PathLike[str] | None = None,
        *,
        timeout: float = _wire.TIMEOUT,
        autostart: bool = True,
    ) -> None:
        self._transport = AsyncTransport(home, timeout=timeout, autostart=autostart)

    @cached_property
    def sandboxes(self) -> AsyncSandboxes:
        from limpet.client._async.sandboxes import AsyncSandboxes

        return AsyncSandboxes(self._transport)

    @cached_property
    def operations(self) -> AsyncOperations:
        from limpet.client._async.operations import AsyncOperations

        return AsyncOperations(self._transport)

    @cached_property
    def checkpoints(self) -> AsyncCheckpoints:
        from limpet.client._async.checkpoints import AsyncCheckpoints

        return AsyncCheckpoints(self._transport)

    @cached_property
    def vaults(self) -> AsyncVaults:
        from limpet.client._async.vaults import AsyncVaults

        return AsyncVaults(self._transport)

    @cached_property
    def trash(self) -> AsyncTrash:
        from limpet.client._async.trash import AsyncTrash

        return AsyncTrash(self._transport)

    @cached_property
    def images(self) -> AsyncImages:
        from limpet.client._async.images import AsyncImages

        return AsyncImages(self._transport)

    @cached_property
    def templates(self) -> AsyncTemplates:
        from limpet.client._async.upkeep import AsyncTemplates

        return AsyncTemplates(self._transport)

    @cached_property
    def config(self) -> AsyncConfig:
        from limpet.client._async.upkeep import AsyncConfig

        return AsyncConfig(self._transport)

    @cached_property
    def system(self) -> AsyncSystem:
        from limpet.client._async.upkeep import AsyncSystem

        return AsyncSystem(self._transport)

    async def exec(self, name: str, command: str | Sequence[str], **options: Any) -> AsyncExec:
        """Start a command in the sandbox of this name and follow it: the quickest way in, one round trip. `options`
        as for `AsyncSandbox.exec`."""
        followed = await exec_module.run(self._transport, check_name(name), command, "follow", **options)
        assert isinstance(followed, AsyncExec)
        return followed

    async def attach(
        self, name: str, exec_id: str, *, stdout: int | None = 0, stderr: int | None = 0, stdin: bool = False,
        steal: bool = False,
    ) -> AsyncExec:  # fmt: skip
        """Follow a command of the sandbox of this name; see `AsyncSandbox.attach`."""
        handle = self.exec_handle(name, exec_id)
        return await handle.attach(stdout=stdout, stderr=stderr, stdin=stdin, steal=steal)

    def exec_handle(self, name: str, exec_id: str) -> AsyncExecHandle:
        """A command of the sandbox of this name, without asking whether there is one."""
        return AsyncExecHandle(self._transport, check_name(name), exec_id)

    async def signal(self, name: str, exec_id: str, signal: str) -> None:
        """Signal a command's whole process group on a connection of its own, whatever else is under way."""
        await self.exec_handle(name, exec_id).signal(signal)

    async def events(self, after: int | None = None, *, follow: bool = False) -> AsyncIterator[Event]:
        """Events behind the cursor `after` (a `seq`; 0: all that are kept). `follow`: and those to come; a broken
        stream is taken up again behind the last event that was given out. An event of kind `gap` tells of lost ones."""
        from limpet.models import Event

        while True:
            try:
                params = {"after": after, "follow": follow}
                lines = self._transport.lines(
                    "/v1/events", params=params, silence=_wire.STREAM_SILENCE if follow else None
                )
                async with contextlib.aclosing(lines):
                    async for line in lines:
                        event = Event.model_validate(line)
                        after = event.seq
                        yield event
            except (DeadlineExceeded, Unavailable):
                if not follow or after is None:
                    raise
            else:
                if not follow:
                    return
            await _pause()

    async def stats(self) -> Sequence[Stats]:
        """Of every sandbox."""
        from limpet.models import Stats

        return [Stats.model_validate(item) for item in await self._transport.request("GET", "/v1/stats")]

    async def sync_status(self) -> Sequence[SyncStatus]:
        """How far behind the host is, for every sandbox that has a virtual machine."""
        from limpet.models import SyncStatus

        return [SyncStatus.model_validate(item) for item in await self._transport.request("GET", "/v1/sync")]

    async def payloads(self) -> Sequence[PayloadStatus]:
        """Of every sandbox; `sandbox.payloads` adds, removes and confirms."""
        from limpet.models import PayloadStatus

        return [PayloadStatus.model_validate(item) for item in await self._transport.request("GET", "/v1/payloads")]

    async def status(self) -> DaemonStatus:
        from limpet.models import DaemonStatus

        return DaemonStatus.model_validate(await self._transport.request("GET", "/v1/status"))

    async def doctor(self, *, repair: bool = False) -> DoctorReport:
        """Check what limpet needs; `repair` fixes what is safe to fix."""
        from limpet.models import DoctorReport

        method, path = ("POST", "/v1/doctor/repair") if repair else ("GET", "/v1/doctor")
        return DoctorReport.model_validate(await self._transport.request(method, path))

    async def setup(self, *, mirror: str | None = None, on_stage: OnStage | None = None) -> list[str]:
        """Make the guest pieces and the image `base`; what was done (nothing the second time)."""
        result = await self.operations.run("POST", "/v1/setup", body={"mirror": mirror}, on_stage=on_stage)
        return list(result.get("done", []))

    async def start_daemon(self) -> int | None:
        """Start the daemon unless it runs; its pid when it was started now."""
        return await self._transport.start_daemon()

    async def shutdown(self, *, timeout: float = 20.0) -> bool:
        """End the daemon; sandboxes keep running. False when none ran. Returns when its socket is gone; raises
        DeadlineExceeded after `timeout` seconds."""
        from limpet.client import _aio, _daemon

        socket = self._transport.paths.daemon_socket
        if not _daemon.listening(socket):
            return False
        with contextlib.suppress(Unavailable):  # it may be gone before its answer is out
            await self._transport.request("POST", "/v1/shutdown")
        await self._transport.aclose()
        for _ in range(int(timeout / _STOP_POLL)):
            if not _daemon.listening(socket):
                return True
            await _aio.sleep(_STOP_POLL)
        raise DeadlineExceeded(f"the daemon still listens after {timeout:g} s", hint="limpet daemon logs")

    async def close(self) -> None:
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _pause() -> None:
    from limpet.client import _aio

    await _aio.sleep(0.5)
