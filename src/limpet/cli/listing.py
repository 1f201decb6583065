"""Looking: ls, inspect, stats, logs, events."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limpet.cli import _boxes, _options, _output, _parse, _terminal

if TYPE_CHECKING:
    from limpet.models import Event, Sandbox, Stats

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def ls(label: _options.Labels = None, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """List sandboxes; with -q only their names."""
    from limpet.client import Client

    with Client() as client:
        found = [box.info for box in client.sandboxes.list(_parse.labels(label or []))]
    if json:
        _output.emit(found)
    elif quiet:
        for info in found:
            print(info.name)
    else:
        headers = ("NAME", "STATE", "AGE", "CPUS", "MEMORY", "PORTS", "WORKSPACE")
        _output.table(headers, [_row(info) for info in found])
        for info in found:
            if info.error and info.state.value in ("paused", "error"):
                _output.warn(f"{info.name}: {info.error}")
    return 0


def _row(info: Sandbox) -> tuple[object, ...]:
    age = _output.duration((datetime.now(UTC) - info.created_at).total_seconds())
    ports = " ".join(f"{port.host}->{port.guest}" for port in info.ports)
    where = info.workspace.host_dir if info.workspace else None
    if info.workspace and info.workspace.status != "complete":
        where = f"{where} ({info.workspace.status})"
    return info.name, info.state.value, age, info.spec.vcpus, _output.size(info.spec.memory_mib << 20), ports, where


@app.command()
def inspect(
    names: _options.Names = None,
    json: Annotated[bool, typer.Option("--json", help="JSON, which it is anyway.", hidden=True)] = True,
    system: Annotated[bool, typer.Option("--system", help="Ask the guest about itself, too.")] = False,
) -> int:
    """Tell all about sandboxes, as JSON: one object for one name, a list for many."""
    from limpet.client import Client

    found: list[dict[str, Any]] = []

    def ask(name: str) -> dict[str, Any]:
        box = client.sandboxes.get(name)
        told: dict[str, Any] = _output.data_of(box.info)
        return told | ({"system": _output.data_of(box.system())} if system else {})

    with Client() as client:
        wanted = _boxes.chosen(client, names or [_boxes.one(client, None).name])
        code = _boxes.each(wanted, ask, lambda _, told: found.append(told))
    if len(wanted) > 1:
        _output.emit(found)
    elif found:
        _output.emit(found[0])
    return code


@app.command()
def stats(
    names: _options.Names = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Again and again; with --json a line each.")] = False,
    interval: Annotated[
        str, typer.Option("--interval", metavar="TIME", callback=_options.value_of(_parse.seconds))
    ] = "2s",
    json: _options.Json = False,
) -> int:
    """Show what sandboxes use: all of them, or those named."""
    from limpet.client import Client

    with Client() as client:
        while True:
            found = [client.sandboxes.ref(name).stats() for name in dict.fromkeys(names)] if names else client.stats()
            if json and follow:
                for item in found:
                    _output.emit(item, indent=None)
            elif json:
                _output.emit(found)
            else:
                headers = ("NAME", "STATE", "CPU", "MEMORY", "LIMIT", "DISK", "NET IN/OUT")
                _output.table(headers, [_usage(item) for item in found])
            if not follow:
                return 0
            time.sleep(_parse.seconds(interval))


def _usage(item: Stats) -> tuple[object, ...]:
    net = None
    if item.net_received is not None:
        net = f"{_output.size(item.net_received)} / {_output.size(item.net_sent or 0)}"
    return (
        item.name, item.state.value, f"{item.cpu_percent:.0f} %", _output.size(item.memory_pss),
        _output.size(item.memory_limit), _output.size(item.disk_used), net,
    )  # fmt: skip


@app.command()
def logs(
    name: _options.OptionalName = None,
    source: Annotated[
        str, typer.Option("--source", metavar="console|agent|qemu", help="console: what the guest's kernel said.")
    ] = "console",
    tail: Annotated[int | None, typer.Option("--tail", "-n", metavar="N", min=0, help="Only the last lines.")] = None,
) -> int:
    """Print a log of a sandbox, also of a stopped or crashed one."""
    from limpet.client import Client

    if source not in ("console", "agent", "qemu"):
        raise typer.BadParameter(f"{source!r} is none of console, agent, qemu", param_hint="--source")
    with Client() as client:
        text = _boxes.one(client, name).logs(source, tail)  # type: ignore[arg-type]
    _terminal.print_bytes(text)
    return 0


@app.command()
def events(
    after: Annotated[int, typer.Option("--after", metavar="SEQ", help="Only those behind this number.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="And those to come.")] = False,
    sandbox: Annotated[
        str | None,
        typer.Option("--sandbox", metavar="NAME", help="Only of this one.", autocompletion=_options.complete_names),
    ] = None,
    json: _options.Json = False,
) -> int:
    """Print what happened, oldest first; with --json one object a line. `--after` resumes without a gap."""
    from limpet.client import Client

    with Client() as client:
        for event in client.events(after, follow=follow):
            if sandbox not in (None, event.sandbox):
                continue
            if json:
                _output.emit(event, indent=None)
            else:
                print(_line(event), flush=True)
    return 0


def _line(event: Event) -> str:
    when = event.time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    details = " ".join(f"{key}={value}" for key, value in event.data.items() if value not in (None, "", [], {}))
    return _output.printable(f"{event.seq:>6}  {when}  {event.sandbox or '-':<16}  {event.kind}  {details}".rstrip())
