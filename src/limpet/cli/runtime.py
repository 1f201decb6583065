"""The container engine of a sandbox: runtime ensure|status|logs|stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from limpet.cli import _boxes, _options, _output, _parse, _terminal
from limpet.cli._progress import Progress

if TYPE_CHECKING:
    from limpet.models import RuntimeStatus, ServiceStatus

app = typer.Typer(add_completion=False, rich_markup_mode=None)
runtime = typer.Typer(
    help="The container engine of a sandbox: containerd and dockerd in the guest.",
    rich_markup_mode=None, no_args_is_help=True,
)  # fmt: skip
app.add_typer(runtime, name="runtime")

SERVICES = ("dockerd", "containerd")

Service = Annotated[
    str,
    typer.Argument(metavar="dockerd|containerd", autocompletion=lambda: list(SERVICES), show_default=False,
                   help="Default: dockerd."),
]  # fmt: skip


@runtime.command()
def ensure(name: _options.OptionalName = None, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """Start the container engine of a sandbox, unless it is ready. Prints `started` or `reused`.

    The first use of its socket does the same. From then on it comes back with the sandbox.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        result = _boxes.one(client, name).runtime.ensure(on_stage=progress)
    if json:
        _output.emit(result)
        return 0
    print(result.how)
    if not quiet and result.started:
        _output.note(f"{', '.join(result.started)} in {result.seconds:.1f} s")
    return 0


@runtime.command()
def status(name: _options.OptionalName = None, json: _options.Json = False) -> int:
    """Tell how the container engine of a sandbox is: each service is asked now, and none is started."""
    from limpet.client import Client

    with Client() as client:
        found = _boxes.one(client, name).runtime.status()
    _output.emit(found) if json else _print_status(found)
    return 0


def _print_status(found: RuntimeStatus) -> None:
    lines = [("runtime", found.state + (f": {found.error}" if found.error else ""))]
    lines += [(service.name, _service(service)) for service in found.services]
    if found.version:
        lines.append(("docker", found.version))
    lines.append(("autostart", "yes" if found.autostart else "no"))
    lines.append(("socket", found.socket))
    for key, value in lines:
        print(f"{key + ':':<11} {_output.printable(value)}")


def _service(service: ServiceStatus) -> str:
    told = service.state + (f": {service.reason}" if service.reason else "")
    return told if service.pid is None else f"{told} (pid {service.pid})"


@runtime.command()
def logs(
    name: _options.OptionalName = None,
    service: Service = SERVICES[0],
    tail: Annotated[int | None, typer.Option("--tail", "-n", metavar="N", min=0, help="Only the last lines.")] = None,
) -> int:
    """Print what a service of the container engine wrote, across its restarts: the newest 4 MiB of it at most."""
    from limpet.client import Client

    if service not in SERVICES:
        raise typer.BadParameter(f"{service!r} is neither dockerd nor containerd", param_hint="SERVICE")
    with Client() as client:
        text = _boxes.one(client, name).runtime.logs("dockerd" if service == "dockerd" else "containerd", tail)
    _terminal.print_bytes(text)
    return 0


@runtime.command()
def stop(
    name: _options.OptionalName = None,
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="TIME", help="For the containers to end in; then they are killed.",
                          callback=_options.value_of(_parse.seconds)),
    ] = "20s",
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:  # fmt: skip
    """Stop the container engine of a sandbox, its containers first. Prints the services that were stopped.

    It does not come back with the sandbox until somebody uses it again.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        stopped = _boxes.one(client, name).runtime.stop(timeout=_parse.seconds(timeout), on_stage=progress)
    if json:
        _output.emit(stopped)
        return 0
    for service in stopped.stopped:
        print(service)
    if not (stopped.stopped or quiet):
        _output.note("nothing ran")
    for service in stopped.killed:
        _output.warn(f"{service} did not end within {timeout} and was killed")
    return 0
