"""create, start, stop, restart, kill, pause, resume, suspend, rm. All but create take many names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limpet.cli import _boxes, _options, _output, _parse
from limpet.cli._progress import Progress

if TYPE_CHECKING:
    from limpet.models import Sandbox, StopResult

app = typer.Typer(add_completion=False, rich_markup_mode=None)

All = Annotated[bool, typer.Option("--all", "-a", help="Every sandbox.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Go on when the guest's data cannot be flushed.")]
StopTimeout = Annotated[
    str, typer.Option("--timeout", metavar="TIME", help="Bounds the stop.", callback=_options.value_of(_parse.seconds))
]


@app.command()
def create(
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False)] = None,
    dir: Annotated[Path | None, typer.Option("-w", "--workspace", metavar="DIR", help="Import this directory.")] = None,
    option_name: Annotated[str | None, typer.Option("--name", help="The same as NAME.")] = None,
    env: _options.Env = None,
    publish: _options.Publish = None,
    cpus: _options.Cpus = None,
    memory: _options.Memory = None,
    image: _options.Image = "base",
    network: _options.Network = "user",
    label: _options.Labels = None,
    ttl: _options.Ttl = None,
    idle: _options.Idle = None,
    idle_suspend: _options.IdleSuspend = None,
    every_exec: _options.EveryExec = False,
    user: _options.DefaultUser = None,
    workdir: _options.DefaultCwd = None,
    entrypoint: _options.Entrypoint = None,
    payload: _options.Payloads = None,
    rm: Annotated[bool, typer.Option("--rm", help="Remove it when it stops.")] = False,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Boot it.")] = True,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Print the operation's id; do not wait.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Make a sandbox and boot it. Prints its name. Ctrl-C undoes it.

    What is not given is as the image has it: an image that was committed from a sandbox brings that one's
    environment, user, size and so on along.
    """
    from limpet.client import Client

    spec = _options.machine(
        image, cpus, memory, network, label, publish, ttl=ttl, idle=idle, idle_suspend=idle_suspend,
        every_exec=every_exec, entrypoint=entrypoint,
    )  # fmt: skip
    spec |= {"ephemeral": rm, "start": start, "user": user, "workdir": workdir}
    spec["env"] = _parse.environment(env) if env else None
    spec["payloads"] = [one.given for one in _parse.payloads(payload or ())]
    name = name or option_name
    with Client() as client, Progress(quiet) as progress:
        if detach:
            operation = client.sandboxes.begin_create(name, **spec)
            _output.emit(operation) if json else print(operation.id)
            return 0
        if dir is not None:
            spec.pop("start")
            box = client.sandboxes.for_directory(dir, name=name, fresh=True, on_stage=progress, **spec)
        else:
            box = client.sandboxes.create(name, on_stage=progress, **spec)
    _output.emit(box.info) if json else print(box.name)
    return 0


def _many(names: list[str] | None, everything: bool, verb: str, json: bool, quiet: bool, **options: Any) -> int:
    """One verb on many sandboxes, with what it answered."""
    from limpet.client import Client

    answers: list[Any] = []

    def report(name: str, answer: Sandbox | StopResult | None) -> None:
        answers.append(answer if answer is not None else {"name": name})
        if not json:
            print(_told(name, answer))

    with Client() as client:
        wanted = _boxes.chosen(client, names, everything)
        with Progress(quiet or len(wanted) > 1) as progress:

            def act(name: str) -> Any:
                return getattr(client.sandboxes.ref(name), verb)(on_stage=progress, **options)

            code = _boxes.each(wanted, act, report)
    if json:
        _output.emit([_output.data_of(answer) for answer in answers])
    return code


def _told(name: str, answer: Sandbox | StopResult | None) -> str:
    """The name; how far a stop had to go and what may be lost is told besides."""
    rung = getattr(answer, "rung", "none")
    if rung != "none":
        generation = getattr(answer, "generation", None)
        _output.note(
            f"{name}: {getattr(answer, 'durability', '')} ({rung})"
            + (f", generation {generation} on the host" if generation is not None else "")
        )
    for risk in getattr(answer, "at_risk", ()):
        _output.warn(f"{name}: may be lost: {risk}")
    if unsynced := getattr(answer, "sync", None):
        _output.warn(f"{name}: not all of it is on the host: {unsynced}", f"limpet start {name}; limpet sync {name}")
    return name


@app.command()
def start(
    names: _options.Names = None, all: All = False, json: _options.Json = False, quiet: _options.Quiet = False
) -> int:
    """Boot stopped sandboxes. Prints their names."""
    return _many(names, all, "start", json, quiet)


@app.command()
def stop(
    names: _options.Names = None,
    all: All = False,
    force: Force = False,
    timeout: StopTimeout = "30s",
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Make the guest's data durable and power off. Prints the names.

    A sandbox whose data cannot be flushed is left running, unless --force.
    """
    return _many(names, all, "stop", json, quiet, force=force, timeout=_parse.seconds(timeout))


@app.command()
def restart(
    names: _options.Names = None,
    all: All = False,
    force: Force = False,
    timeout: StopTimeout = "30s",
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Stop sandboxes and boot them again. Prints their names."""
    return _many(names, all, "restart", json, quiet, force=force, timeout=_parse.seconds(timeout))


@app.command()
def kill(
    names: _options.Names = None,
    all: All = False,
    signal: Annotated[str, typer.Option("--signal", "-s", metavar="SIG", help="Signal for the VM process.")] = "KILL",
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """End virtual machines at once, without flushing. `limpet stop` is the graceful way."""
    return _many(names, all, "kill", json, quiet, signal=signal)


@app.command()
def pause(
    names: _options.Names = None, all: All = False, json: _options.Json = False, quiet: _options.Quiet = False
) -> int:
    """Stop the virtual CPUs of sandboxes; their memory stays. `limpet resume` lets them go on. Prints their names."""
    return _many(names, all, "pause", json, quiet)


@app.command()
def suspend(
    names: _options.Names = None, all: All = False, json: _options.Json = False, quiet: _options.Quiet = False
) -> int:
    """Write the memory of sandboxes to disk and end their processes. Prints their names.

    `limpet resume`, or the next command in them, lets them go on where they were.
    """
    return _many(names, all, "suspend", json, quiet)


@app.command()
def resume(
    names: _options.Names = None, all: All = False, json: _options.Json = False, quiet: _options.Quiet = False
) -> int:
    """Let paused or suspended sandboxes go on, with the clock set. Prints their names."""
    return _many(names, all, "resume", json, quiet)


@app.command()
def rm(
    names: _options.Names = None,
    all: All = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Never ask.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Running ones too, without asking.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="For good, with its vault; not into the trash.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Put sandboxes into the trash, from where `limpet undelete` takes them back. Prints their names.

    On a terminal it asks, unless --yes or --force, when a sandbox runs or has work that is nowhere else. Elsewhere a
    running one is only removed with --force.
    """
    from limpet.client import Client

    with Client() as client:
        wanted = _boxes.chosen(client, names, all)
        if not (yes or force) and wanted and sys.stdin.isatty() and sys.stderr.isatty():
            reasons = _boxes.reasons_to_ask(client, wanted, purge=purge)
            for line in reasons:
                _output.note(line)
            if reasons and not typer.confirm("Remove for good?" if purge else "Remove?", err=True):
                return 1
            force = bool(reasons)
    code = _many(wanted, False, "remove", json, quiet, force=force, purge=purge) if wanted else 0
    if wanted and not (json or quiet or purge or code):
        with Client() as client:
            kept = {entry.name for entry in client.trash.list()}
        back = [name for name in wanted if name in kept]
        if back:
            which = "it" if len(back) == 1 else "one"
            _output.note(f"in the trash; to have {which} back: limpet undelete {back[0]}")
    return code
