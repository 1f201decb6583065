# Made by tools/unasync.py from ../_async/sandbox.py: edit that one.
"""One sandbox, and all that can be done with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, overload

from limpet import models
from limpet.client import _wire
from limpet.client._sync import exec as exec_module
from limpet.client._sync.exec import Exec, ExecHandle, OnNotice
from limpet.client._sync.files import Archive, Files
from limpet.client._sync.operations import Operations, OnStage
from limpet.client._sync.payloads import Payloads
from limpet.client._sync.ports import Ports
from limpet.client._sync.runtime import Runtime
from limpet.client._sync.transport import Transport
from limpet.client._sync.vaults import Vault
from limpet.client._sync.workspace import Workspace
from limpet.client._results import ExecResult
from limpet.errors import FailedPrecondition, LimpetError, NotFound, from_dict
from limpet.models import (
    CheckpointInfo,
    CommitResult,
    ExecInfo,
    ForkResult,
    RestoreResult,
    RiskReport,
    SetResult,
    State,
    Stats,
    StopResult,
    SyncResult,
    SyncStatus,
    SystemInfo,
)
from limpet.names import check_name

LogSource = Literal["console", "agent", "qemu"]
_STOP_TIMEOUT = 30.0  # seconds, as the daemon's default


class Sandbox:
    """One sandbox. As a context manager it removes an ephemeral sandbox at the end and leaves any other as it is."""

    def __init__(self, transport: Transport, name: str, info: models.Sandbox | None = None) -> None:
        self._transport, self.name, self._info = transport, name, info
        self._operations = Operations(transport)
        self.files = Files(transport, self)
        self.archive = Archive(transport, self)
        self.workspace = Workspace(transport, self)
        self.ports = Ports(transport, self)
        self.payloads = Payloads(transport, self)
        self.runtime = Runtime(transport, self)

    def path(self, *more: str) -> str:
        """The route of this sandbox, or of something in it."""
        return _wire.path_of("sandboxes", check_name(self.name), *more)

    @property
    def vault(self) -> Vault:
        """What it wrote, generation by generation."""
        return Vault(self._transport, check_name(self.name))

    @property
    def info(self) -> models.Sandbox:
        """What was known of it when the daemon was last asked; `refresh` asks."""
        if self._info is None:
            raise FailedPrecondition(f"nothing is known of '{self.name}' yet", hint="call refresh() first")
        return self._info

    @property
    def docker_host(self) -> str:
        """What DOCKER_HOST has to be for the stock client to use its engine. Raises as `info`."""
        return f"unix://{self._transport.paths.sandbox(self.info.id).docker_socket}"

    def refresh(self) -> models.Sandbox:
        """Ask the daemon what the sandbox is now."""
        self._info = models.Sandbox.model_validate(self._transport.request("GET", self.path()))
        self.name = self._info.name
        return self._info

    def _run(self, verb: str, body: Mapping[str, Any], on_stage: OnStage | None) -> dict[str, Any]:
        return self._operations.run("POST", self.path(verb), body=body, on_stage=on_stage)

    def _become(self, verb: str, on_stage: OnStage | None) -> models.Sandbox:
        """A verb whose answer is what the sandbox is then."""
        self._info = models.Sandbox.model_validate(self._run(verb, {}, on_stage))
        return self._info

    def start(self, *, on_stage: OnStage | None = None) -> models.Sandbox:
        """Boot it; nothing happens when it runs."""
        return self._become("start", on_stage)

    def stop(
        self, *, force: bool = False, timeout: float = _STOP_TIMEOUT, on_stage: OnStage | None = None
    ) -> StopResult:
        """Make its data durable and power it off, within `timeout` seconds. `force`: go on when the data cannot be
        flushed. The result tells how far the ladder had to go."""
        body = {"force": force, "timeout": timeout}
        return StopResult.model_validate(self._run("stop", body, on_stage))

    def restart(
        self, *, force: bool = False, timeout: float = _STOP_TIMEOUT, on_stage: OnStage | None = None
    ) -> models.Sandbox:
        """`stop` and `start`."""
        body = {"force": force, "timeout": timeout}
        self._info = models.Sandbox.model_validate(self._run("restart", body, on_stage))
        return self._info

    def kill(self, signal: str = "KILL", *, on_stage: OnStage | None = None) -> StopResult:
        """End the virtual machine at once: what the guest did not sync is lost."""
        return StopResult.model_validate(self._run("kill", {"signal": signal}, on_stage))

    def remove(self, *, force: bool = False, purge: bool = False, on_stage: OnStage | None = None) -> None:
        """Put it into the trash (`client.trash`), or with `purge` (and an ephemeral one always) delete it with all
        that is kept of it. A running one only with `force`."""
        params = {"force": force, "purge": purge}
        self._operations.run("DELETE", self.path(), params=params, on_stage=on_stage)

    def risk(self) -> RiskReport:
        """What only this sandbox has: commits, stashes, changed and untracked files."""
        return RiskReport.model_validate(self._transport.request("GET", self.path("risk")))

    def sync(self, *, on_stage: OnStage | None = None) -> SyncResult:
        """Bring everything that was written before this call to the host; the generation that has it."""
        return SyncResult.model_validate(self._run("sync", {}, on_stage))

    def sync_status(self, *, pending: bool = True) -> SyncStatus:
        """How far behind the host is. `pending`: also ask the guest what is not on the host yet."""
        answer = self._transport.request("GET", self.path("sync"), params={"pending": pending})
        return SyncStatus.model_validate(answer)

    def set(
        self, *, vcpus: int | None = None, memory_mib: int | None = None, env: Mapping[str, str | None] | None = None,
        labels: Mapping[str, str | None] | None = None, ttl: float | None = None, idle_timeout: float | None = None,
        idle_suspend: float | None = None, every_exec: bool | None = None, user: str | None = None,
        workdir: str | None = None, name: str | None = None, dry_run: bool = False,
    ) -> SetResult:  # fmt: skip
        """Change what is not None; None as a value of `env` and `labels` removes that key, 0 removes a time-out (in
        seconds), "" sets `user` and `workdir` back. The result tells what is in force now and what at the next start;
        `dry_run` only tells."""
        body = {
            "name": name, "vcpus": vcpus, "memory_mib": memory_mib, "env": _plain(env), "labels": _plain(labels),
            "ttl": ttl, "idle_timeout": idle_timeout, "idle_suspend": idle_suspend, "every_exec": every_exec,
            "user": user, "workdir": workdir, "dry_run": dry_run or None,
        }  # fmt: skip
        result = SetResult.model_validate(self._transport.request("PATCH", self.path(), body=body))
        if not dry_run:
            self._info, self.name = result.sandbox, result.sandbox.name
        return result

    def rename(self, name: str) -> None:
        self.set(name=check_name(name))

    def pause(self, *, on_stage: OnStage | None = None) -> models.Sandbox:
        """Stop its vCPUs; its memory stays where it is."""
        return self._become("pause", on_stage)

    def suspend(self, *, on_stage: OnStage | None = None) -> models.Sandbox:
        """Write its memory to disk and end its process."""
        return self._become("suspend", on_stage)

    def resume(self, *, on_stage: OnStage | None = None) -> models.Sandbox:
        """Let a paused or suspended one go on, with the clock set."""
        return self._become("resume", on_stage)

    def wake(self, *, on_stage: OnStage | None = None) -> models.Sandbox:
        """Make it run, whatever it is doing now: `resume` when it is paused or suspended, else `start`."""
        info = self._info or self.refresh()
        if info.state in (State.PAUSED, State.SUSPENDED):
            return self.resume(on_stage=on_stage)
        return info if info.state is State.RUNNING else self.start(on_stage=on_stage)

    def checkpoint(
        self, *, label: str | None = None, disk_only: bool = False, on_stage: OnStage | None = None
    ) -> CheckpointInfo:
        """Keep disks and memory as they are at one instant; it runs on. `disk_only` leaves the memory out, as is done
        for one that does not run."""
        body = {"label": label, "disk_only": disk_only}
        return CheckpointInfo.model_validate(self._run("checkpoints", body, on_stage))

    def checkpoints(self) -> list[CheckpointInfo]:
        """Its checkpoints, the oldest first."""
        answer = self._transport.request("GET", self.path("checkpoints"))
        return [CheckpointInfo.model_validate(item) for item in answer]

    def restore(
        self, checkpoint: str, *, as_name: str | None = None, force: bool = False, disk_only: bool = False,
        on_stage: OnStage | None = None,
    ) -> RestoreResult:  # fmt: skip
        """Back to a checkpoint (an id, the beginning of one, or a label), after one of the present, which the result
        names. `as_name`: make a new sandbox of it instead. `force`: also while it runs. `disk_only`: boot the disks,
        do not go on with the memory."""
        body = {"checkpoint": checkpoint, "as_name": as_name, "force": force, "disk_only": disk_only}
        result = RestoreResult.model_validate(self._run("restore", body, on_stage))
        if as_name is None:
            self._info = result.sandbox
        return result

    def undo(self, *, on_stage: OnStage | None = None) -> RestoreResult:
        """Back to the newest checkpoint, running or not, after one of the present."""
        result = RestoreResult.model_validate(self._run("undo", {}, on_stage))
        self._info = result.sandbox
        return result

    def fork(
        self, count: int = 1, *, name: str | None = None, prefix: str | None = None, on_stage: OnStage | None = None
    ) -> list[Sandbox]:
        """Running copies of it, named `prefix`-1, -2, … (default: its own name); `name` names a single one. Those
        that could not be made are missing; when there is none, the first one's error is raised. `try_fork` tells
        them all."""
        result = self.try_fork(count, name=name, prefix=prefix, on_stage=on_stage)
        if result.failed and not result.forks:
            raise from_dict(result.failed[0].error)
        return [type(self)(self._transport, info.name, info) for info in result.forks]

    def try_fork(
        self, count: int = 1, *, name: str | None = None, prefix: str | None = None, on_stage: OnStage | None = None
    ) -> ForkResult:
        """As `fork`, with what went wrong for each copy that could not be made."""
        body = {"count": count, "name": name, "prefix": prefix}
        return ForkResult.model_validate(self._run("fork", body, on_stage))

    def commit(self, image: str, *, comment: str | None = None, on_stage: OnStage | None = None) -> CommitResult:
        """Make an image (`NAME[:TAG]`) of it as it is now; it runs on."""
        return CommitResult.model_validate(self._run("commit", {"image": image, "comment": comment}, on_stage))

    def stats(self) -> Stats:
        return Stats.model_validate(self._transport.request("GET", self.path("stats")))

    def system(self) -> SystemInfo:
        """The guest's own view of itself."""
        return SystemInfo.model_validate(self._transport.request("GET", self.path("system")))

    def logs(self, source: LogSource = "console", tail: int | None = None) -> bytes:
        """The last `tail` lines (all when None) of a log; also of a stopped sandbox."""
        params = {"source": source, "tail": tail}
        with self._transport.stream("GET", self.path("logs"), params=params) as response:
            return response.read()

    @overload
    def exec(
        self, command: str | Sequence[str], *, stream: Literal[True], stdin: bytes | bool = ...,
        env: Mapping[str, str] | None = ...,
        cwd: str | None = ..., user: str | None = ..., timeout: float | None = ..., tty: bool = ..., rows: int = ...,
        cols: int = ..., start: bool = ..., on_notice: OnNotice | None = ...,
    ) -> Exec: ...  # fmt: skip
    @overload
    def exec(
        self, command: str | Sequence[str], *, detach: Literal[True], env: Mapping[str, str] | None = ...,
        cwd: str | None = ..., user: str | None = ..., timeout: float | None = ..., tty: bool = ..., rows: int = ...,
        cols: int = ..., start: bool = ..., on_notice: OnNotice | None = ...,
    ) -> ExecHandle: ...  # fmt: skip
    @overload
    def exec(
        self, command: str | Sequence[str], *, stdin: bytes = ..., env: Mapping[str, str] | None = ...,
        cwd: str | None = ..., user: str | None = ..., timeout: float | None = ..., tty: bool = ..., rows: int = ...,
        cols: int = ..., start: bool = ..., on_notice: OnNotice | None = ...,
    ) -> ExecResult: ...  # fmt: skip
    def exec(
        self, command: str | Sequence[str], *, stream: bool = False, detach: bool = False, **options: Any
    ) -> Exec | ExecHandle | ExecResult:
        """Run a command: a string as a line for `sh`, a sequence as an argument vector.

        By default waits and returns an ExecResult. `stream`: return at once what can be iterated over for
        `(lane, bytes)`; with `stdin=True` it has a `stdin` to write to. `detach`: start it and let go.
        `stdin` bytes are its input. `timeout` in seconds ends its whole process group. `start`: boot a stopped
        sandbox first. `user` and `cwd` default to the image's user and the workspace."""
        mode: exec_module.Mode = "detach" if detach else "follow" if stream else "wait"
        return exec_module.run(self._transport, check_name(self.name), command, mode, **options)

    def attach(
        self, exec_id: str, *, stdout: int | None = 0, stderr: int | None = 0, stdin: bool = False, steal: bool = False
    ) -> Exec:
        """Follow a running or ended command from these offsets in bytes; None leaves that lane out."""
        handle = ExecHandle(self._transport, check_name(self.name), exec_id)
        return handle.attach(stdout=stdout, stderr=stderr, stdin=stdin, steal=steal)

    def execs(self) -> list[ExecInfo]:
        """The commands that run and the last ones that ended."""
        return [ExecInfo.model_validate(item) for item in self._transport.request("GET", self.path("execs"))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._info is None or not self._info.spec.ephemeral:
            return
        try:
            self.remove(force=True)
        except NotFound:
            pass  # it stopped by itself, and with that was removed
        except LimpetError:
            if error is None:
                raise  # but never hide the error with which the block was left

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self._info.state if self._info else '?'}>"


def _plain(mapping: Mapping[str, str | None] | None) -> dict[str, str | None] | None:
    return None if mapping is None else dict(mapping)
