# Made by tools/unasync.py from ../_async/sandboxes.py: edit that one.
"""All sandboxes: made and found."""

from __future__ import annotations

import builtins
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from limpet import models
from limpet.client import _wire, _workdir
from limpet.client._sync.operations import Operations, OnStage
from limpet.client._sync.sandbox import Sandbox
from limpet.client._sync.transport import Transport
from limpet.errors import AlreadyExists, BadRequest, NotFound
from limpet.models import Operation
from limpet.names import check_name, to_label


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
        """Begin to make a sandbox: follow the operation with `client.operations`. `spec`: image (`NAME[:TAG]`), vcpus,
        memory_mib, env, labels, user, workdir, entrypoint (where left out, as the image has it), network ("user" or
        "none"), ports ({host: guest}; host 0: any free one), ephemeral, ttl, idle_timeout, idle_suspend (seconds),
        every_exec (a disk checkpoint before each command), payloads ([(host_dir, guest_dir)] or with a third, the
        least seconds between two publications), start."""
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
        box.wake(on_stage=on_stage)
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
            box.wake(on_stage=on_stage)
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


def _create_body(
    name: str | None, *, image: str = "base", vcpus: int | None = None, memory_mib: int | None = None,
    env: Mapping[str, str] | None = None, labels: Mapping[str, str] | None = None,
    network: Literal["user", "none"] = "user", ports: Mapping[int, int] | Sequence[tuple[int, int]] = (),
    ephemeral: bool = False, ttl: float | None = None, idle_timeout: float | None = None,
    idle_suspend: float | None = None, every_exec: bool = False, user: str | None = None, workdir: str | None = None,
    entrypoint: Sequence[str] | None = None,
    payloads: Sequence[tuple[str | os.PathLike[str], str] | tuple[str | os.PathLike[str], str, float]] = (),
    start: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """A CreateRequest. Only the name is checked here; the daemon checks everything. What is None is not sent: it is
    the image's to say."""
    pairs = ports.items() if isinstance(ports, Mapping) else ports
    return {
        "name": None if name is None else check_name(name), "image": image, "vcpus": vcpus, "memory_mib": memory_mib,
        "env": None if env is None else dict(env), "labels": None if labels is None else dict(labels),
        "network": network, "ports": [{"host": host, "guest": guest} for host, guest in pairs], "ephemeral": ephemeral,
        "ttl": ttl, "idle_timeout": idle_timeout, "idle_suspend": idle_suspend, "every_exec": every_exec, "user": user,
        "workdir": workdir, "entrypoint": None if entrypoint is None else [*entrypoint],
        "payloads": [_payload(*payload) for payload in payloads], "start": start,
    }  # fmt: skip


def _payload(host_dir: str | os.PathLike[str], guest_dir: str, interval: float | None = None) -> dict[str, Any]:
    given = {"host_dir": _workdir.host_path(host_dir), "guest_dir": guest_dir}
    return given if interval is None else given | {"interval": interval}
