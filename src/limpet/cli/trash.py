"""Removed sandboxes, and the way back: trash ls|empty, undelete."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from limpet.cli import _options, _output
from limpet.cli._progress import Progress

app = typer.Typer(add_completion=False, rich_markup_mode=None)
trash = typer.Typer(help="Removed sandboxes, which can be had back.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(trash, name="trash")

_HELP = "The name that it had (the newest of several), or its id."


@trash.command("ls")
def trash_ls(json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """List removed sandboxes, the newest first; with -q only their ids."""
    from limpet.client import Client

    with Client() as client:
        found = client.trash.list()
    if json:
        _output.emit(found)
    elif quiet:
        for entry in found:
            print(entry.id)
    else:
        rows = [
            (entry.name, _output.ago(entry.removed_at), _output.when(entry.expires_at), _output.size(entry.size),
             entry.generations, entry.id)
            for entry in found
        ]  # fmt: skip
        _output.table(("NAME", "REMOVED", "GOES AT", "SIZE", "GENERATIONS", "ID"), rows)
    return 0


@trash.command("empty")
def trash_empty(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", autocompletion=_options.complete_trashed, show_default=False,
                       help=_HELP + "  [default: all]"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Never ask.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:  # fmt: skip
    """Remove sandboxes for good: their disks, checkpoints and vaults. Asks on a terminal, unless --yes."""
    from limpet.client import Client

    with Client() as client:
        if not yes and sys.stdin.isatty() and sys.stderr.isatty():
            what = name or ", ".join(entry.name for entry in client.trash.list())
            if what and not typer.confirm(f"Remove {_output.printable(what)} for good?", err=True):
                return 1
        with Progress(quiet) as progress:
            result = client.trash.empty(name, on_stage=progress)
    return _output.pruned(result, json=json, quiet=quiet)


@app.command()
def undelete(
    name: Annotated[
        str, typer.Argument(metavar="NAME", autocompletion=_options.complete_trashed, show_default=False, help=_HELP)
    ],
    as_name: Annotated[str | None, typer.Option("--as", metavar="NEW", help="Under another name.")] = None,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Take a sandbox back out of the trash, as it was when it was removed. Prints its name."""
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        box = client.trash.undelete(name, as_name=as_name, on_stage=progress)
    if json:
        _output.emit(box.info)
        return 0
    print(box.name)
    if not quiet:
        verb = "resume" if box.info.state.value == "suspended" else "start"
        _output.note(f"{box.info.state.value}; next: limpet {verb} {box.name}")
    return 0
