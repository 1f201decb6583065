# Made by tools/unasync.py from ../_async/sandboxes.py: edit that one.
"""Sandboxes: made, found, and used."""

from __future__ import annotations

import builtins
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

from limpet import models
from limpet.client import _wire, _workdir
from limpet.client._sync import exec as exec_module
from limpet.client._sync.exec import Exec, ExecHandle, OnNotice
from limpet.client._sync.files import Archive, Files
from limpet.client._sync.operations import Operations, OnStage
from limpet.client._sync.ports import Ports
from limpet.client._sync.transport import Transport
from limpet.client._sync.workspace import Workspace
from limpet.client._results import ExecResult
from limpet.errors import AlreadyExists, BadRequest, FailedPrecondition, LimpetError, NotFound
from limpet.models import (
    DEFAULT_MEMORY_MIB,
    DEFAULT_VCPUS,
    ExecInfo,
    Operation,
    SetResult,
    Stats,
    StopResult,
    SystemInfo,
)
from limpet.names import check_name, to_label

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

    def path(self, *more: str) -> str:
        """The route of this sandbox, or of something in it."""
        return _wire.path_of("sandboxes", check_name(self.name), *more)

    @property
    def info(self) -> models.Sandbox:
        """What was known of it when the daemon was last asked; `refresh` asks."""
        if self._info is None:
            raise FailedPrecondition(f"nothing is known of '{self.name}' yet", hint="call refresh() first")
        return self._info

    def refresh(self) -> models.Sandbox:
        """Ask the daemon what the sandbox is now."""
        self._info = models.Sandbox.model_validate(self._transport.request("GET", self.path()))
        self.name = self._info.name
        return self._info

    def _run(self, verb: str, body: Mapping[str, Any], on_stage: OnStage | None) -> dict[str, Any]:
        return self._operations.run("POST", self.path(verb), body=body, on_stage=on_stage)

    def start(self, *, on_stage: OnStage | None = None) -> models.Sandbox:
        """Boot it; nothing happens when it runs."""
        self._info = models.Sandbox.model_validate(self._run("start", {}, on_stage))
        return self._info

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

    def remove(self, *, force: bool = False, on_stage: OnStage | None = None) -> None:
        """Delete it and its disks. A running one only with `force`."""
        self._operations.run("DELETE", self.path(), params={"force": force}, on_stage=on_stage)

    def set(
        self, *, vcpus: int | None = None, memory_mib: int | None = None, env: Mapping[str, str | None] | None = None,
        labels: Mapping[str, str | None] | None = None, ttl: float | None = None, idle_timeout: float | None = None,
        name: str | None = None,
    ) -> SetResult:  # fmt: skip
        """Change what is not None; None as a value of `env` and `labels` removes that key, 0 removes a time-out (in
        seconds). The result tells what is in force now and what at the next start."""
        body = {
            "name": name, "vcpus": vcpus, "memory_mib": memory_mib, "env": _plain(env), "labels": _plain(labels),
            "ttl": ttl, "idle_timeout": idle_timeout,
        }  # fmt: skip
        result = SetResult.model_validate(self._transport.request("PATCH", self.path(), body=body))
        self._info, self.name = result.sandbox, result.sandbox.name
        return result

    def rename(self, name: str) -> None:
        self.set(name=check_name(name))

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


class Sandboxes:
    """All sandboxes of this daemon."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._operations = Operations(transport)

    def ref(self, name: str) -> Sandbox:
        """The sandbox of this name without asking whether there is one."""
        return Sandbox(self._transport, check_name(name))

    def get(self, name: str) -> Sandbox:
        """Raises NotFound with the nearest name."""
        sandbox = self.ref(name)
        sandbox.refresh()
        return sandbox

    def list(self, labels: Mapping[str, str] | None = None) -> builtins.list[Sandbox]:
        """All sandboxes that have all of these labels."""
        path = _wire.path_of("sandboxes")
        if labels:
            path += "?" + "&".join(_wire.target("", {"label": f"{k}={v}"})[1:] for k, v in labels.items())
        found = [models.Sandbox.model_validate(item) for item in self._transport.request("GET", path)]
        return [Sandbox(self._transport, info.name, info) for info in found]

    def create(self, name: str | None = None, *, on_stage: OnStage | None = None, **spec: Any) -> Sandbox:
        """Make a sandbox and (unless `start=False`) boot it. `spec`: see `begin_create`. Giving up (Ctrl-C,
        cancellation) undoes it."""
        answer = self._operations.run(
            "POST", _wire.path_of("sandboxes"), body=_create_body(name, **spec), on_stage=on_stage
        )
        info = models.Sandbox.model_validate(answer)
        return Sandbox(self._transport, info.name, info)

    def begin_create(self, name: str | None = None, **spec: Any) -> Operation:
        """Begin to make a sandbox: follow the operation with `client.operations`. `spec`: image, vcpus, memory_mib,
        env, labels, network ("user" or "none"), ports ({host: guest}; host 0: any free one), ephemeral, ttl,
        idle_timeout (seconds), start."""
        body = _create_body(name, **spec)
        return Operation.model_validate(self._transport.request("POST", _wire.path_of("sandboxes"), body=body))

    def find(self, directory: str | os.PathLike[str]) -> Sandbox:
        """The one sandbox of this host directory or of the nearest one above it. Raises NotFound, BadRequest when
        there are several."""
        found = _workdir.nearest(
            [(box.info.workspace.host_dir, box) for box in self.list() if box.info.workspace], directory
        )
        if not found:
            raise NotFound(f"no sandbox for {os.fspath(directory)}", hint="give a name, or make one: limpet run")
        if len(found) > 1:
            names = ", ".join(box.name for box in found)
            raise BadRequest(f"several sandboxes belong to this directory: {names}", hint="give a name")
        return found[0]

    def project(self, directory: str | os.PathLike[str]) -> Path:
        """The host directory that work in `directory` means: the nearest that has a sandbox, else the git repository
        around it, else itself. Raises BadRequest for the root and home directories."""
        owned = [box.info.workspace.host_dir for box in self.list() if box.info.workspace]
        return _workdir.project_root(directory, owned)

    def ensure(self, name: str | None = None, *, on_stage: OnStage | None = None, **spec: Any) -> Sandbox:
        """The running sandbox of this name, made or started as needed; without a name a new one."""
        box = next((box for box in self.list() if box.name == name), None)
        if box is None:
            return self.create(name, on_stage=on_stage, **spec)
        if box.info.state != "running":
            box.start(on_stage=on_stage)
        return box

    def for_directory(
        self, directory: str | os.PathLike[str], *, name: str | None = None, sync: bool = False, fresh: bool = False,
        on_stage: OnStage | None = None, **spec: Any,
    ) -> Sandbox:  # fmt: skip
        """A running sandbox with this host directory as its workspace: found, else made; started and imported as
        needed. `sync` imports again, `fresh` makes one in any case. `spec`, for one that is made: see
        `begin_create`."""
        root = os.path.realpath(directory)
        box, made = None if fresh else self.find_exact(root, name), False
        if box is None:
            box, made = self._create_named(root, name, spec, on_stage), True
        try:
            if box.info.state != "running":
                box.start(on_stage=on_stage)
            workspace = box.info.workspace
            if sync or workspace is None or workspace.status != "complete":
                result = box.workspace.import_(root, on_stage=on_stage)
                box.info.workspace = result.workspace
        except BaseException:
            if made:
                box.remove(force=True)
            raise
        return box

    def find_exact(self, directory: str | os.PathLike[str], name: str | None = None) -> Sandbox | None:
        """The sandbox of exactly this host directory, or with a name that one, unless it has another directory
        (AlreadyExists). Raises BadRequest when there are several."""
        root, boxes = os.path.realpath(directory), self.list()
        if name is None:
            mine = [box for box in boxes if box.info.workspace and box.info.workspace.host_dir == root]
            if len(mine) > 1:
                names = ", ".join(box.name for box in mine)
                raise BadRequest(f"several sandboxes belong to this directory: {names}", hint="pass --name")
            return mine[0] if mine else None
        named = next((box for box in boxes if box.name == name), None)
        if named and named.info.workspace and named.info.workspace.host_dir != root:
            other = named.info.workspace.host_dir
            raise AlreadyExists(f"sandbox '{name}' belongs to {other}", hint="choose another name, or go there")
        return named

    def _create_named(
        self, root: str, name: str | None, spec: Mapping[str, Any], on_stage: OnStage | None
    ) -> Sandbox:
        """Create with the given name, else with the directory's own or the first free `<name>-2`, `-3`, …"""
        if name is not None:
            return self.create(name, on_stage=on_stage, **spec)
        label = to_label(Path(root).name)
        taken = {box.name for box in self.list()}
        for number in range(1, 1000):
            candidate = label if number == 1 else f"{label}-{number}"
            if candidate in taken:
                continue
            try:
                return self.create(candidate, on_stage=on_stage, **spec)
            except AlreadyExists:
                taken.add(candidate)  # somebody was quicker
        raise AlreadyExists(f"all names like '{label}' are taken", hint="pass --name")


def _plain(mapping: Mapping[str, str | None] | None) -> dict[str, str | None] | None:
    return None if mapping is None else dict(mapping)


def _create_body(
    name: str | None, *, image: str = "base", vcpus: int = DEFAULT_VCPUS, memory_mib: int = DEFAULT_MEMORY_MIB,
    env: Mapping[str, str] | None = None, labels: Mapping[str, str] | None = None,
    network: Literal["user", "none"] = "user", ports: Mapping[int, int] | Sequence[tuple[int, int]] = (),
    ephemeral: bool = False, ttl: float | None = None, idle_timeout: float | None = None, start: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """A CreateRequest. Only the name is checked here; the daemon checks everything."""
    pairs = ports.items() if isinstance(ports, Mapping) else ports
    return {
        "name": None if name is None else check_name(name), "image": image, "vcpus": vcpus, "memory_mib": memory_mib,
        "env": dict(env or {}), "labels": dict(labels or {}), "network": network,
        "ports": [{"host": host, "guest": guest} for host, guest in pairs], "ephemeral": ephemeral, "ttl": ttl,
        "idle_timeout": idle_timeout, "start": start,
    }  # fmt: skip
