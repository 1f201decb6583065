"""New things out of a sandbox: fork (running copies), commit (an image)."""

from __future__ import annotations

from typing import Annotated

import typer

from limpet.cli import _boxes, _options, _output
from limpet.cli._progress import Progress

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def fork(
    name: _options.OptionalName = None,
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, max=100, help="How many copies.")] = 1,
    new: Annotated[
        str | None,
        typer.Option("--name", metavar="P", help="Name of the copy; of several: P-1, P-2, …  [default: NAME-1, …]"),
    ] = None,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Make running copies of a running sandbox: its disks, its memory, its processes. Prints their names.

    The source is not disturbed. A copy that cannot be made is told on stderr and makes the exit code 1; the others
    are there.
    """
    from limpet.client import Client
    from limpet.errors import from_dict

    names = {"name": new} if count == 1 else {"prefix": new}
    with Client() as client, Progress(quiet) as progress:
        result = _boxes.one(client, name).try_fork(count, **names, on_stage=progress)
    if json:
        _output.emit(result)
    else:
        for copy in result.forks:
            print(copy.name)
    for failure in result.failed:
        _output.error(from_dict(failure.error), f"{failure.name}: ")
    return 1 if result.failed else 0


@app.command()
def commit(
    name: _options.Name,
    image: Annotated[str, typer.Argument(metavar="IMAGE[:TAG]", show_default=False)],
    comment: Annotated[str | None, typer.Option("--comment", metavar="TEXT", help="For the image's history.")] = None,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Make an image of a sandbox as it is now, running or not. It runs on. Prints the image.

    Disks and spec are kept; temporary files and what makes a machine unique are not.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        result = client.sandboxes.ref(name).commit(image, comment=comment, on_stage=progress)
    if json:
        _output.emit(result)
        return 0
    made = _output.image_name(result.image)
    print(made)
    if not quiet:
        _output.note(f"{_output.size(result.image.disk_used)}; its disks stood still for {result.frozen_ms:.0f} ms")
        _output.note(f"next: limpet create --image {made}   limpet image export {made} FILE (for another host)")
    return 0
