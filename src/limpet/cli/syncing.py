"""How far behind the host is with what sandboxes write: sync, status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from limpet.cli import _boxes, _options, _output
from limpet.cli._progress import Progress

if TYPE_CHECKING:
    from limpet.models import SyncStatus

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def sync(name: _options.OptionalName = None, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """Bring everything that a sandbox wrote to the host now. Prints the generation that has it.

    This happens by itself, once a second while something changes; when this command ends, it has happened.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        result = _boxes.one(client, name).sync(on_stage=progress)
    if json:
        _output.emit(result)
        return 0
    if result.generation is not None:
        print(result.generation)
    if not quiet and not result.new:
        _output.note("it was on the host already" if result.generation is not None else "nothing was written yet")
    return 0


@app.command()
def status(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", autocompletion=_options.complete_names, show_default=False,
                       help="Default: all that have a virtual machine."),
    ] = None,
    json: _options.Json = False,
) -> int:  # fmt: skip
    """Tell how far behind the host is with what sandboxes wrote; of one sandbox, also what is pending, and why."""
    from limpet.client import Client

    with Client() as client:
        if name is not None:
            one = client.sandboxes.ref(name).sync_status()
            _output.emit(one) if json else _print_status(one)
            return 0
        found = client.sync_status()
    if json:
        _output.emit(found)
    else:
        headers = ("NAME", "STATE", "GENERATION", "DURABLE", "LAG", "SYNC", "PAYLOADS")
        _output.table(headers, [_status_row(one) for one in found])
    return 0


def _status_row(one: SyncStatus) -> tuple[object, ...]:
    durable = _output.ago(one.last_durable) if one.last_durable else "never"
    lag = f"{one.lag:.1f} s" if one.lag else None
    health = f"degraded: {one.why}" if one.degraded else "ok" if one.generation is not None else None
    states = [payload.state for payload in one.payloads]
    payloads = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return one.sandbox, one.state, one.generation, durable, lag, health, payloads


def _print_status(one: SyncStatus) -> None:
    """As a short list."""
    lines = [("sandbox", f"{one.sandbox} ({one.state})")]
    if one.last_durable is None:
        lines.append(("durable", "nothing yet"))
    else:
        when = f"{_output.when(one.last_durable)}, {_output.ago(one.last_durable)}"
        lines.append(("durable", f"generation {one.generation} of {when}"))
    if one.state == "running":
        if one.age is not None:
            lines.append(("in step", f"{_output.duration(one.age)} ago" if one.age >= 1 else "now"))
        lines.append(("pending", _pending(one)))
    if one.lag:
        lines.append(("lag", f"{one.lag:.1f} s"))
    verified = one.last_verified
    lines.append(("verified", _output.ago(verified) if verified else "never; limpet vault check does it"))
    if one.degraded:
        lines.append(("degraded", one.why or "yes"))
    if one.failures:
        lines.append(("failures", f"{one.failures} in a row"))
    for payload in one.payloads:
        told = f"{payload.payload.host_dir} <- {payload.payload.guest_dir}: {payload.state}"
        lines.append(("payload", told + (f" ({payload.reason})" if payload.reason else "")))
    lines += [("log", line) for line in one.log]
    for key, value in lines:
        print(f"{key + ':':<10} {_output.printable(value)}")


def _pending(one: SyncStatus) -> str:
    if one.pending_files is None:
        return "not known"
    if not one.pending_files and not one.pending_bytes:
        return "nothing"
    files = f"{one.pending_files} file{'' if one.pending_files == 1 else 's'}"
    return f"{files}, {_output.size(one.pending_bytes or 0)}"
