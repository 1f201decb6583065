"""image ls|inspect|build|rm|history|prune|verify|export|import: the images that sandboxes are made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from limpet.cli import _boxes, _options, _output
from limpet.cli._progress import Progress

if TYPE_CHECKING:
    from limpet.models import ImageInfo

app = typer.Typer(add_completion=False, rich_markup_mode=None)
image = typer.Typer(help="The images that sandboxes are made from.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(image, name="image")


def complete_images(incomplete: str) -> list[str]:
    """`NAME[:TAG]` of all images for the shell; silent when there is no daemon."""
    from limpet.client import Client
    from limpet.errors import LimpetError

    try:
        with Client(autostart=False, timeout=2) as client:
            found = [_output.image_name(info) for info in client.images.list()]
    except LimpetError:
        return []
    return [name for name in found if name.startswith(incomplete)]


def complete_recipes(incomplete: str) -> list[str]:
    """The images that limpet makes itself."""
    return [name for name in ("base", "docker") if name.startswith(incomplete)]


Image = Annotated[str, typer.Argument(metavar="IMAGE[:TAG]", autocompletion=complete_images, show_default=False)]
Images = Annotated[list[str], typer.Argument(metavar="IMAGE[:TAG]", autocompletion=complete_images, show_default=False)]


@app.callback()
def _app() -> None:
    """Images."""


@image.command()
def ls(json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """List images; with -q only their names."""
    from limpet.client import Client

    with Client() as client:
        found = client.images.list()
    if json:
        _output.emit(found)
    elif quiet:
        for item in found:
            print(_output.image_name(item))
    else:
        rows = [
            (_output.image_name(item), item.digest[:19], _output.size(item.disk_used), f"{item.created_at:%Y-%m-%d}",
             item.source, item.user)
            for item in found
        ]  # fmt: skip
        _output.table(("NAME", "DIGEST", "ON DISK", "CREATED", "SOURCE", "USER"), rows)
    return 0


@image.command()
def inspect(images: Images) -> int:
    """Tell all about images, as JSON.

    One object for one, a list for many.
    """
    from limpet.client import Client

    found: list[ImageInfo] = []
    with Client() as client:
        code = _boxes.each(images, client.images.get, lambda _, info: found.append(info))
    if found:
        _output.emit(found if len(images) > 1 else found[0])
    return code


@image.command()
def build(
    name: Annotated[str, typer.Argument(metavar="docker|base", autocompletion=complete_recipes, show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Also when it is current: for newer packages.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Make one of limpet's own images, unless it is current. Prints its name.

    `docker` is `base` with a container engine; the first `limpet create --image docker` makes it, too.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        info = client.images.build(name, force=force, on_stage=progress)
    _output.emit(info) if json else print(_output.image_name(info))
    return 0


@image.command()
def rm(images: Images) -> int:
    """Remove images. Prints their names. One that something builds on is not removed."""
    from limpet.client import Client

    with Client() as client:
        return _boxes.each(list(dict.fromkeys(images)), client.images.remove, lambda name, _: print(name))


@image.command()
def history(name: Image, json: _options.Json = False) -> int:
    """List the versions of an image, the newest first."""
    from limpet.client import Client

    with Client() as client:
        found = client.images.history(name)
    if json:
        _output.emit(found)
        return 0
    rows = [
        (item.digest[:19], " ".join(item.tags), f"{item.created_at:%Y-%m-%d %H:%M}", item.source,
         _output.size(item.disk_used), item.used_by, item.comment)
        for item in found
    ]  # fmt: skip
    _output.table(("DIGEST", "TAGS", "CREATED", "SOURCE", "ON DISK", "USED BY", "COMMENT"), rows)
    return 0


@image.command()
def prune(json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """Remove every version that no tag names and nothing builds on. Prints them."""
    from limpet.client import Client

    with Client() as client:
        return _output.pruned(client.images.prune(), json=json, quiet=quiet)


@image.command()
def verify(image: Image, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """Read an image again and compare it with its digests. Exit code 1 when something is wrong."""
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        result = client.images.verify(image, on_stage=progress)
    return _output.verdict(result, json=json)


@image.command()
def export(
    image: Image,
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    replace: Annotated[bool, typer.Option("--replace", help="Also when FILE is there already.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Write an image to one file. Prints the file's name.

    `limpet image import` takes it, on this host or on another one.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        info = client.images.export(image, file, replace=replace, on_stage=progress)
    if json:
        _output.emit(info)
        return 0
    print(file)
    if not quiet and file.exists():
        _output.note(f"{_output.size(file.stat().st_size)}; there: limpet image import {file.name}")
    return 0


@image.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME[:TAG]", help="Its name here.  [default: as in FILE]")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Also when the tag is taken.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Make an image of a file. Prints its name.

    The file is one that was exported, or a tar archive (plain, gz, xz, zst) of the root file system of any
    distribution.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        info = client.images.import_(file, name=name, replace=replace, on_stage=progress)
    _output.emit(info) if json else print(_output.image_name(info))
    return 0
