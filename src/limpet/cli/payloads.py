"""Host directories that guest directories are kept in step with: payload add|rm|ls|status|confirm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from limpet.cli import _options, _output, _parse
from limpet.cli._progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from limpet.client import Client
    from limpet.models import PayloadStatus

app = typer.Typer(add_completion=False, rich_markup_mode=None)
payload = typer.Typer(
    help="Host directories that are kept in step with directories of a guest: it writes, they follow.",
    rich_markup_mode=None, no_args_is_help=True,
)  # fmt: skip
app.add_typer(payload, name="payload")

OptionalName = Annotated[
    str | None,
    typer.Argument(metavar="NAME", autocompletion=_options.complete_names, show_default=False,
                   help="Default: of all sandboxes."),
]  # fmt: skip
Which = Annotated[
    str,
    typer.Argument(metavar="ID|DIR", autocompletion=_options.complete_payloads, show_default=False,
                   help="Its id, the beginning of one, or its guest or host directory."),
]  # fmt: skip
Mapping = Annotated[
    str,
    typer.Argument(metavar="HOSTDIR:GUESTDIR[:interval=TIME]", show_default=False,
                   callback=_options.value_of(_parse.payload)),
]  # fmt: skip


@payload.command()
def add(
    name: _options.Name, mapping: Mapping, json: _options.Json = False, quiet: _options.Quiet = False
) -> int:  # fmt: skip
    """Seed GUESTDIR from HOSTDIR, and keep HOSTDIR in step with it from then on. Prints the payload's id.

    HOSTDIR belongs to the payload as long as it is one: what is edited there is never overwritten, but stops it.
    """
    from limpet.client import Client

    wanted = _parse.payload(mapping)
    with Client() as client, Progress(quiet) as progress:
        made = client.sandboxes.ref(name).payloads.add(
            wanted.host, wanted.guest, interval=wanted.interval, on_stage=progress
        )
    if json:
        _output.emit(made)
        return 0
    print(made.payload.id)
    _tell_trouble([made])
    return 0


@payload.command()
def rm(name: _options.Name, which: Which, quiet: _options.Quiet = False) -> int:
    """Publish a last time and let go: HOSTDIR stays as it is then, GUESTDIR goes. Prints the payload's id."""
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        found = _find(client, name, which)
        client.sandboxes.ref(name).payloads.remove(found, on_stage=progress)
    print(found)
    return 0


@payload.command()
def ls(name: OptionalName = None, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """List payloads; with -q only their ids."""
    found = _ask(name)
    if json:
        _output.emit([one.payload.model_dump() | {"sandbox": one.sandbox} for one in found])
    elif quiet:
        for one in found:
            print(one.payload.id)
    else:
        rows = [
            (one.payload.id, one.sandbox, one.payload.host_dir, one.payload.guest_dir, f"{one.payload.interval:g} s",
             one.state)
            for one in found
        ]  # fmt: skip
        _output.table(("PAYLOAD", "SANDBOX", "HOST", "GUEST", "INTERVAL", "STATE"), rows)
    return 0


@payload.command()
def status(name: OptionalName = None, json: _options.Json = False) -> int:
    """Tell how far payloads are in step; what is wrong with one, and what to do, on stderr."""
    found = _ask(name)
    if json:
        _output.emit(found)
        return 0
    headers = ("PAYLOAD", "SANDBOX", "HOST", "STATE", "GENERATION", "IN STEP", "FAILURES")
    _output.table(headers, [_row(one) for one in found])
    _tell_trouble(found)
    return 0


def _row(one: PayloadStatus) -> tuple[object, ...]:
    age = None if one.age is None else f"{_output.duration(one.age)} ago"
    state = f"{one.state}, degraded" if one.degraded else one.state
    return one.payload.id, one.sandbox, one.payload.host_dir, state, one.generation, age, one.failures or None


def _tell_trouble(found: Sequence[PayloadStatus]) -> None:
    for one in found:
        if one.reason:
            _output.warn(f"{one.payload.id}: {one.reason}", one.hint)


@payload.command()
def confirm(
    name: _options.Name,
    which: Which,
    keep: Annotated[str, typer.Option("--keep", metavar="guest|host", help="Whose version goes on.")] = "guest",
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Let a payload go on that was held back, because it would delete much or because HOSTDIR was edited.

    --keep guest publishes what the guest has; the host's edits are kept beside. --keep host seeds the guest anew.
    """
    from limpet.client import Client

    if keep not in ("guest", "host"):
        raise typer.BadParameter(f"{keep!r} is neither 'guest' nor 'host'", param_hint="--keep")
    with Client() as client, Progress(quiet) as progress:
        made = client.sandboxes.ref(name).payloads.confirm(
            _find(client, name, which), keep="host" if keep == "host" else "guest", on_stage=progress
        )
    if json:
        _output.emit(made)
        return 0
    print(made.payload.id)
    _tell_trouble([made])
    return 0


def _ask(name: str | None) -> Sequence[PayloadStatus]:
    from limpet.client import Client

    with Client() as client:
        return client.payloads() if name is None else client.sandboxes.ref(name).payloads.list()


def _find(client: Client, name: str, which: str) -> str:
    """The id of the payload with this directory; anything else is the daemon's to understand."""
    from limpet.client._workdir import host_path
    from limpet.errors import NotFound

    if which.startswith("pl_"):
        return which
    found = client.sandboxes.ref(name).payloads.list()
    directories = {which.rstrip("/"), host_path(which)}
    named = (one.payload for one in found if directories & {one.payload.guest_dir, one.payload.host_dir})
    id = next((payload.id for payload in named), which)
    if "/" in id:
        raise NotFound(f"'{name}' has no payload at {which}", hint=f"limpet payload ls {name}")
    return id
