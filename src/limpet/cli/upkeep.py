"""What the daemon keeps on this host, and how: template, config, system df|prune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from limpet.cli import _boxes, _options, _output
from limpet.cli._progress import Progress

if TYPE_CHECKING:
    from limpet.models import Setting

app = typer.Typer(add_completion=False, rich_markup_mode=None)
template = typer.Typer(
    help="Booted, warmed VMs that new sandboxes start from. They are made in the background when one is missed.",
    rich_markup_mode=None, no_args_is_help=True,
)  # fmt: skip
config = typer.Typer(
    help="The daemon's settings; each is in force as soon as it is set.", rich_markup_mode=None, no_args_is_help=True
)
system = typer.Typer(help="Disk space.", rich_markup_mode=None, no_args_is_help=True)
for _group, _name in ((template, "template"), (config, "config"), (system, "system")):
    app.add_typer(_group, name=_name)

Key = Annotated[str, typer.Argument(metavar="KEY", show_default=False)]


@template.command("ls")
def template_ls(json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """List templates; with -q only their keys. One that is not current will not be used again."""
    from limpet.client import Client

    with Client() as client:
        found = client.templates.list()
    if json:
        _output.emit(found)
    elif quiet:
        for item in found:
            print(item.key)
    else:
        headers = ("KEY", "IMAGE", "CPUS", "MEMORY", "NETWORK", "ACCEL", "ON DISK", "USED", "CURRENT")
        rows = [
            (item.key, item.image, item.vcpus, _output.size(item.memory_mib << 20), item.network, item.accel,
             _output.size(item.size), f"{item.used_at:%Y-%m-%d %H:%M}", "yes" if item.current else "no")
            for item in found
        ]  # fmt: skip
        _output.table(headers, rows)
    return 0


@template.command("build")
def template_build(
    image: _options.Image = "base",
    cpus: _options.Cpus = None,
    memory: _options.Memory = None,
    network: _options.Network = "user",
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Build the template for sandboxes of this shape now. Prints its key."""
    from limpet.client import Client

    shape = _options.machine(image, cpus, memory, network, None, None)
    with Client() as client, Progress(quiet) as progress:
        made = client.templates.build(shape.pop("image"), **shape, on_stage=progress)
    _output.emit(made) if json else print(made.key)
    return 0


@template.command("rm")
def template_rm(keys: Annotated[list[str], typer.Argument(metavar="KEY", show_default=False)]) -> int:
    """Remove templates. Prints their keys."""
    from limpet.client import Client

    with Client() as client:
        return _boxes.each(list(dict.fromkeys(keys)), client.templates.remove, lambda key, _: print(key))


@config.command("ls")
def config_ls(json: _options.Json = False) -> int:
    """List all settings."""
    from limpet.client import Client

    with Client() as client:
        found = client.config.list()
    if json:
        _output.emit(found)
    else:
        rows = [(item.key, item.value, item.default, item.help) for item in found]
        _output.table(("KEY", "VALUE", "DEFAULT", "MEANING"), rows)
    return 0


@config.command("get")
def config_get(key: Key, json: _options.Json = False) -> int:
    """Print the value of one setting."""
    from limpet.client import Client

    with Client() as client:
        return _setting(client.config.get(key), json)


@config.command("set")
def config_set(
    key: Key, value: Annotated[str, typer.Argument(metavar="VALUE", show_default=False)], json: _options.Json = False
) -> int:
    """Change a setting. Prints its value."""
    from limpet.client import Client

    with Client() as client:
        return _setting(client.config.set(key, value), json)


@config.command("unset")
def config_unset(key: Key, json: _options.Json = False) -> int:
    """Bring a setting back to its default. Prints its value."""
    from limpet.client import Client

    with Client() as client:
        return _setting(client.config.unset(key), json)


def _setting(setting: Setting, json: bool) -> int:
    _output.emit(setting) if json else print(setting.value)
    return 0


@system.command("df")
def system_df(json: _options.Json = False) -> int:
    """Tell what takes how much of the disk, and what of it `limpet system prune` would free."""
    from limpet.client import Client

    with Client() as client:
        usage = client.system.df()
    if json:
        _output.emit(usage)
        return 0
    rows: list[tuple[object, ...]] = [
        (row.kind, row.count, row.active, _output.size(row.size), _output.size(row.reclaimable)) for row in usage.rows
    ]
    reclaimable = sum(row.reclaimable for row in usage.rows)
    rows.append(("total", None, None, _output.size(usage.total), _output.size(reclaimable)))
    _output.table(("WHAT", "COUNT", "ACTIVE", "SIZE", "RECLAIMABLE"), rows)
    _output.note(f"{_output.size(usage.free)} of the disk are free")
    return 0


@system.command("prune")
def system_prune(
    images: Annotated[bool, typer.Option("--images", help="Also images that nothing uses.")] = False,
    templates: Annotated[bool, typer.Option("--templates/--no-templates", help="Templates, too.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Remove what nothing uses. Prints what was removed. Sandboxes and checkpoints stay."""
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        result = client.system.prune(images=images, templates=templates, dry_run=dry_run, on_stage=progress)
    return _output.pruned(result, json=json, quiet=quiet, dry_run=dry_run)
