# Made by tools/unasync.py from ../_async/client.py: edit that one.
"""The client itself: everything that is not inside of one sandbox.

Models are imported where they are used, since `limpet exec` comes through here and must not wait for pydantic.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from limpet.client import _wire
from limpet.client._sync import exec as exec_module
from limpet.client._sync.exec import Exec, ExecHandle
from limpet.client._sync.transport import Transport
from limpet.errors import DeadlineExceeded, Unavailable
from limpet.names import check_name

if TYPE_CHECKING:
    from limpet.client._sync.checkpoints import Checkpoints
    from limpet.client._sync.images import Images
    from limpet.client._sync.operations import Operations, OnStage
    from limpet.client._sync.sandboxes import Sandboxes
    from limpet.client._sync.trash import Trash
    from limpet.client._sync.upkeep import Config, System, Templates
    from limpet.client._sync.vaults import Vaults
    from limpet.models import DaemonStatus, DoctorReport, Event, PayloadStatus, Stats, SyncStatus

_STOP_POLL = 0.05  # seconds between two looks whether the daemon is gone


class Client:
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
        self._transport = Transport(home, timeout=timeout, autostart=autostart)

    @cached_property
    def sandboxes(self) -> Sandboxes:
        from limpet.client._sync.sandboxes import Sandboxes

        return Sandboxes(self._transport)

    @cached_property
    def operations(self) -> Operations:
        from limpet.client._sync.operations import Operations

        return Operations(self._transport)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        from limpet.client._sync.checkpoints import Checkpoints

        return Checkpoints(self._transport)

    @cached_property
    def vaults(self) -> Vaults:
        from limpet.client._sync.vaults import Vaults

        return Vaults(self._transport)

    @cached_property
    def trash(self) -> Trash:
        from limpet.client._sync.trash import Trash

        return Trash(self._transport)

    @cached_property
    def images(self) -> Images:
        from limpet.client._sync.images import Images

        return Images(self._transport)

    @cached_property
    def templates(self) -> Templates:
        from limpet.client._sync.upkeep import Templates

        return Templates(self._transport)

    @cached_property
    def config(self) -> Config:
        from limpet.client._sync.upkeep import Config

        return Config(self._transport)

    @cached_property
    def system(self) -> System:
        from limpet.client._sync.upkeep import System

        return System(self._transport)

    def exec(self, name: str, command: str | Sequence[str], **options: Any) -> Exec:
        """Start a command in the sandbox of this name and follow it: the quickest way in, one round trip. `options`
        as for `Sandbox.exec`."""
        followed = exec_module.run(self._transport, check_name(name), command, "follow", **options)
        assert isinstance(followed, Exec)
        return followed

    def attach(
        self, name: str, exec_id: str, *, stdout: int | None = 0, stderr: int | None = 0, stdin: bool = False,
        steal: bool = False,
    ) -> Exec:  # fmt: skip
        """Follow a command of the sandbox of this name; see `Sandbox.attach`."""
        handle = self.exec_handle(name, exec_id)
        return handle.attach(stdout=stdout, stderr=stderr, stdin=stdin, steal=steal)

    def exec_handle(self, name: str, exec_id: str) -> ExecHandle:
        """A command of the sandbox of this name, without asking whether there is one."""
        return ExecHandle(self._transport, check_name(name), exec_id)

    def signal(self, name: str, exec_id: str, signal: str) -> None:
        """Signal a command's whole process group on a connection of its own, whatever else is under way."""
        self.exec_handle(name, exec_id).signal(signal)

    def events(self, after: int | None = None, *, follow: bool = False) -> Iterator[Event]:
        """Events behind the cursor `after` (a `seq`; 0: all that are kept). `follow`: and those to come; a broken
        stream is taken up again behind the last event that was given out. An event of kind `gap` tells of lost ones."""
        from limpet.models import Event

        while True:
            try:
                params = {"after": after, "follow": follow}
                lines = self._transport.lines(
                    "/v1/events", params=params, silence=_wire.STREAM_SILENCE if follow else None
                )
                with contextlib.closing(lines):
                    for line in lines:
                        event = Event.model_validate(line)
                        after = event.seq
                        yield event
            except (DeadlineExceeded, Unavailable):
                if not follow or after is None:
                    raise
            else:
                if not follow:
                    return
            _pause()

    def stats(self) -> Sequence[Stats]:
        """Of every sandbox."""
        from limpet.models import Stats

        return [Stats.model_validate(item) for item in self._transport.request("GET", "/v1/stats")]

    def sync_status(self) -> Sequence[SyncStatus]:
        """How far behind the host is, for every sandbox that has a virtual machine."""
        from limpet.models import SyncStatus

        return [SyncStatus.model_validate(item) for item in self._transport.request("GET", "/v1/sync")]

    def payloads(self) -> Sequence[PayloadStatus]:
        """Of every sandbox; `sandbox.payloads` adds, removes and confirms."""
        from limpet.models import PayloadStatus

        return [PayloadStatus.model_validate(item) for item in self._transport.request("GET", "/v1/payloads")]

    def status(self) -> DaemonStatus:
        from limpet.models import DaemonStatus

        return DaemonStatus.model_validate(self._transport.request("GET", "/v1/status"))

    def doctor(self, *, repair: bool = False) -> DoctorReport:
        """Check what limpet needs; `repair` fixes what is safe to fix."""
        from limpet.models import DoctorReport

        method, path = ("POST", "/v1/doctor/repair") if repair else ("GET", "/v1/doctor")
        return DoctorReport.model_validate(self._transport.request(method, path))

    def setup(self, *, mirror: str | None = None, on_stage: OnStage | None = None) -> list[str]:
        """Make the guest pieces and the image `base`; what was done (nothing the second time)."""
        result = self.operations.run("POST", "/v1/setup", body={"mirror": mirror}, on_stage=on_stage)
        return list(result.get("done", []))

    def start_daemon(self) -> int | None:
        """Start the daemon unless it runs; its pid when it was started now."""
        return self._transport.start_daemon()

    def shutdown(self, *, timeout: float = 20.0) -> bool:
        """End the daemon; sandboxes keep running. False when none ran. Returns when its socket is gone; raises
        DeadlineExceeded after `timeout` seconds."""
        from limpet.client import _sio, _daemon

        socket = self._transport.paths.daemon_socket
        if not _daemon.listening(socket):
            return False
        with contextlib.suppress(Unavailable):  # it may be gone before its answer is out
            self._transport.request("POST", "/v1/shutdown")
        self._transport.close()
        for _ in range(int(timeout / _STOP_POLL)):
            if not _daemon.listening(socket):
                return True
            _sio.sleep(_STOP_POLL)
        raise DeadlineExceeded(f"the daemon still listens after {timeout:g} s", hint="limpet daemon logs")

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pause() -> None:
    from limpet.client import _sio

    _sio.sleep(0.5)
