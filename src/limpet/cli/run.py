"""`limpet run`: this directory, a virtual machine, a command; and what changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limpet.cli import _options, _output, _parse
from limpet.cli._progress import Progress
from limpet.cli.execs import follow, request, streams
from limpet.errors import BadRequest, LimpetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from limpet.client import Client, Sandbox
    from limpet.models import Change

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_SHOWN = 8  # changed files that the summary names


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="CMD", show_default=False, help="Default: the sandbox's entrypoint.")
    ] = None,
    dir: Annotated[
        Path | None, typer.Option("-w", "--workspace", metavar="DIR", help="Host directory.  [default: this project]")
    ] = None,
    no_workspace: Annotated[bool, typer.Option("--no-workspace", help="Bring no directory in.")] = False,
    name: Annotated[str | None, typer.Option("--name", help="Sandbox.  [default: the directory's]")] = None,
    rm: Annotated[bool, typer.Option("--rm", help="In a new sandbox, which is removed afterwards.")] = False,
    sync: _options.Sync = False,
    env: _options.Env = None,
    publish: _options.Publish = None,
    cpus: _options.Cpus = None,
    memory: _options.Memory = None,
    image: _options.Image = "base",
    network: _options.Network = "user",
    label: _options.Labels = None,
    idle_suspend: _options.IdleSuspend = None,
    every_exec: _options.EveryExec = False,
    entrypoint: _options.Entrypoint = None,
    payload: _options.Payloads = None,
    user: _options.User = None,
    workdir: _options.Cwd = None,
    interactive: _options.Interactive = None,
    tty: _options.Tty = None,
    detach: _options.Detach = False,
    timeout: _options.Timeout = None,
    quiet: _options.Quiet = False,
) -> int:
    """Run a command on this directory in a sandbox of its own, which is made the first time and reused from then on.

    The directory is imported with its uncommitted work; nothing of the host changes before `limpet apply`. Without a
    command the sandbox's entrypoint runs, if it has one; --user and --workdir are for this command. The exit code is
    the command's; 125 when limpet failed before or around it. Ctrl-C goes to the command; a second one lets
    go of it and says how to come back.
    """
    from limpet.client import Client

    spec = _options.machine(
        image, cpus, memory, network, label, publish, idle_suspend=idle_suspend, every_exec=every_exec,
        entrypoint=entrypoint,
    )  # fmt: skip
    payloads = _parse.payloads(payload or ())
    spec |= {"ephemeral": rm, "payloads": [one.given for one in payloads]}
    if rm and detach:
        raise BadRequest("--rm and --detach exclude each other", hint="limpet rm removes it later")
    with Client() as client:
        if not command:
            command = _entrypoint(client, None if rm else _known(client, dir, name, no_workspace), spec)
        box, inside = _sandbox(client, dir, name, no_workspace, sync=sync, quiet=quiet, spec=spec)
        try:
            _publish(box, publish)
            _attach(box, payloads, quiet=quiet)
            feed, use_tty = (False, bool(tty)) if detach else streams(interactive, tty)
            options = request(env, user, workdir or inside, timeout, use_tty)
            if detach:
                print(box.exec(command, detach=True, tty=use_tty, **options).id)
                return 0
            ended = follow(client, box.name, command, feed=feed, tty=use_tty, **options)
            rm = rm and not ended.detached
            if not (no_workspace or quiet or ended.detached):
                _summary(box, removed=rm)
        finally:
            if rm:
                box.remove(force=True)
    return ended.code


def _known(client: Client, dir: Path | None, name: str | None, no_workspace: bool) -> Sandbox | None:
    """The sandbox that `run` would use, if it is there already."""
    if no_workspace:
        return next((box for box in client.sandboxes.list() if box.name == name), None)
    return client.sandboxes.find_exact(_root(client, dir), name)


def _entrypoint(client: Client, box: Sandbox | None, spec: dict[str, Any]) -> list[str]:
    """The command for when none is given: the sandbox's own, else that of what it will be made from. Asked for before
    anything is made."""
    if box is not None:
        found, whose = box.info.spec.entrypoint, f"'{box.name}'"
    else:
        found, whose = spec.get("entrypoint"), f"image '{spec['image']}'"
        found = found or client.images.get(spec["image"]).spec.get("entrypoint")
    if not found:
        raise typer.BadParameter(f"no command is given, and {whose} has no entrypoint", param_hint="CMD")
    return list(found)


def _root(client: Client, dir: Path | None) -> Path:
    return client.sandboxes.project(Path.cwd()) if dir is None else _existing(dir)


def _sandbox(
    client: Client, dir: Path | None, name: str | None, no_workspace: bool, *, sync: bool, quiet: bool,
    spec: dict[str, Any],
) -> tuple[Sandbox, str | None]:  # fmt: skip
    """The sandbox to use, running, and the directory in it that stands for the current one."""
    with Progress(quiet) as progress:
        if no_workspace:
            ensure = client.sandboxes.create if spec["ephemeral"] else client.sandboxes.ensure
            return ensure(name, on_stage=progress, **spec), None
        root = _root(client, dir)
        fresh = spec["ephemeral"]  # --rm never takes, and so never removes, a sandbox that was there before
        before = None if fresh else client.sandboxes.find_exact(root, name)
        box = client.sandboxes.for_directory(root, name=name, sync=sync, fresh=fresh, on_stage=progress, **spec)
    if before is not None:
        _tell_ignored(box, spec)
        if not sync:
            _warn_of_drift(box)
    workspace = box.info.workspace
    below = os.path.relpath(Path.cwd().resolve(), root) if dir is None else "."
    if workspace is None or below == ".":
        return box, None
    return box, f"{workspace.guest_dir}/{below}"


def _existing(dir: Path) -> Path:
    if not dir.is_dir():
        raise BadRequest(f"{dir} is not a directory", hint="-w wants a directory of this host")
    return dir.resolve()


def _tell_ignored(box: Sandbox, spec: dict[str, Any]) -> None:
    """Options that only a new sandbox can have."""
    for key in ("vcpus", "memory_mib", "idle_suspend", "every_exec", "image", "entrypoint"):
        now, only_new = getattr(box.info.spec, key), key in ("image", "entrypoint")
        if key in spec and spec[key] != now and not (key == "image" and spec[key] == "base"):
            hint = "make another one: --name" if only_new else f"limpet set {box.name}"
            _output.warn(f"'{box.name}' exists with {key}={now}; {spec[key]} is ignored", hint)


def _warn_of_drift(box: Sandbox) -> None:
    drift = box.workspace.drift()
    if drift.moved:
        why = f": {drift.why}" if drift.why else ""
        _output.warn(f"the host directory changed since it was imported{why}", "--sync imports it again")


def _publish(box: Sandbox, wanted: list[str] | None) -> None:
    have = {(port.host, port.guest) for port in box.info.ports}
    for host, guest in _parse.ports(wanted or []):
        if (host, guest) not in have and not (host == 0 and any(port == guest for _, port in have)):
            mapping = box.ports.publish(guest, host)
            _output.note(f"127.0.0.1:{mapping.host} -> {mapping.guest}")


def _attach(box: Sandbox, wanted: Sequence[_parse.Payload], *, quiet: bool) -> None:
    """The payloads that a sandbox which was there already does not have yet."""
    have = {one.payload.guest_dir for one in box.payloads.list()} if wanted else set()
    for one in wanted:
        if one.guest.rstrip("/") not in have:
            with Progress(quiet) as progress:
                made = box.payloads.add(one.host, one.guest, interval=one.interval, on_stage=progress)
            _output.note(f"{made.payload.host_dir} <- {made.payload.guest_dir}")


def _summary(box: Sandbox, *, removed: bool) -> None:
    """What changed and the next command to type. A failure here is no failure of the command."""
    try:
        changes = box.workspace.changes().changes
    except LimpetError as error:
        _output.warn(f"cannot tell what changed: {error.message}", error.hint)
        return
    if not changes:
        _output.note("no files changed")
        return
    _output.note(describe(changes))
    if removed:
        _output.note("they go with the sandbox (--rm)")
    else:
        _output.note(f"next: limpet diff {box.name}   limpet apply {box.name}")


def describe(changes: list[Change]) -> str:
    """`2 files changed: A x, M y`"""
    shown = ", ".join(f"{change.status} {change.path}" for change in changes[:_SHOWN])
    more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return f"{len(changes)} file{'s' if len(changes) != 1 else ''} changed: {shown}{more}"
