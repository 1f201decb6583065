"""Back and forth in time: checkpoint create|ls|inspect|verify|rm, restore (also from the vault), undo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from limpet.cli import _boxes, _options, _output, _parse, vaults
from limpet.cli._progress import Progress
from limpet.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from limpet.models import CheckpointInfo, RestoreResult

app = typer.Typer(add_completion=False, rich_markup_mode=None)
checkpoint = typer.Typer(
    help="Sandboxes as they were: made, listed, verified, removed.", rich_markup_mode=None, no_args_is_help=True
)
app.add_typer(checkpoint, name="checkpoint")

OptionalName = Annotated[
    str | None,
    typer.Argument(metavar="NAME", autocompletion=_options.complete_names, show_default=False,
                   help="Default: of all sandboxes."),
]  # fmt: skip
DiskOnly = Annotated[bool, typer.Option("--disk-only", help="Boot its disks; do not go on with its memory.")]


@checkpoint.command()
def create(
    name: _options.OptionalName = None,
    label: Annotated[str | None, typer.Option("--label", metavar="TEXT", help="Find it by this, too.")] = None,
    disk_only: Annotated[bool, typer.Option("--disk-only", help="Leave the memory out.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Keep a sandbox as it is now, disks and memory. It runs on. Prints the id."""
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        made = _boxes.one(client, name).checkpoint(label=label, disk_only=disk_only, on_stage=progress)
    if json:
        _output.emit(made)
        return 0
    print(made.id)
    if not quiet:
        _output.note(f"{made.kind}, {_output.size(_bytes(made))}; the guest stood still for {made.pause_ms:.0f} ms")
    return 0


def _bytes(info: CheckpointInfo) -> int:
    return info.memory_bytes + info.disk_bytes


@checkpoint.command()
def ls(name: OptionalName = None, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """List checkpoints; with -q only their ids.

    Each is below the one it came after. Where several came after one, the newest goes on with the line and the
    others, which were given up by going back, are set in.
    """
    from limpet.client import Client

    with Client() as client:
        found = client.checkpoints.list(name)
    if json:
        _output.emit(found)
    elif quiet:
        for info in found:
            print(info.id)
    else:
        now = datetime.now(UTC)
        rows = [
            (mark + info.id, info.sandbox, _output.duration((now - info.created_at).total_seconds()), info.kind,
             _output.size(_bytes(info)), info.made_by, info.label)
            for mark, info in tree(found)
        ]  # fmt: skip
        _output.table(("CHECKPOINT", "SANDBOX", "AGE", "KIND", "SIZE", "BY", "LABEL"), rows)
    return 0


def tree(found: Sequence[CheckpointInfo]) -> Iterator[tuple[str, CheckpointInfo]]:
    """Every checkpoint behind its parent, with what to print before it. The newest child goes on with its parent's
    line; older ones begin lines of their own, set in."""
    known = {info.id for info in found}
    children: dict[str | None, list[CheckpointInfo]] = {}
    for info in found:
        children.setdefault(info.parent if info.parent in known else None, []).append(info)

    def line(info: CheckpointInfo, first: str, rest: str) -> Iterator[tuple[str, CheckpointInfo]]:
        mark = first
        while True:
            yield mark, info
            mark, below = rest, children.get(info.id, [])
            for side in below[:-1]:
                yield from line(side, f"{rest}├─ ", f"{rest}│  ")
            if not below:
                return
            info = below[-1]

    for root in children.get(None, ()):
        yield from line(root, "", "")


@checkpoint.command()
def inspect(checkpoints: _options.Checkpoints) -> int:
    """Tell all about checkpoints, as JSON.

    One object for one, a list for many.
    """
    from limpet.client import Client

    found: list[CheckpointInfo] = []
    with Client() as client:
        code = _boxes.each(checkpoints, client.checkpoints.get, lambda _, info: found.append(info))
    if found:
        _output.emit(found if len(checkpoints) > 1 else found[0])
    return code


@checkpoint.command()
def verify(
    checkpoint: _options.Checkpoint,
    boot: Annotated[bool, typer.Option("--boot", help="Also start a throw-away VM from it.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Read a checkpoint again and compare it with its digests. Exit code 1 when something is wrong."""
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        result = client.checkpoints.verify(checkpoint, boot=boot, on_stage=progress)
    return _output.verdict(result, json=json)


@checkpoint.command()
def rm(checkpoints: _options.Checkpoints, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """Remove checkpoints, and what only they needed. Prints their ids."""
    from limpet.client import Client
    from limpet.models import PruneResult

    answers: list[PruneResult] = []

    def report(_: str, answer: PruneResult) -> None:
        answers.append(answer)
        for removed in answer.removed if not json else ():
            print(removed)

    with Client() as client:
        code = _boxes.each(list(dict.fromkeys(checkpoints)), client.checkpoints.remove, report)
    if json:
        _output.emit(answers)
    elif answers and not quiet:
        _output.note(f"{_output.size(sum(answer.freed for answer in answers))} freed")
    return code


@app.command()
def restore(
    source: Annotated[
        str,
        typer.Argument(metavar="NAME@ID|NAME", autocompletion=_options.complete_restorable, show_default=False,
                       callback=_options.value_of(_parse.checkpoint),
                       help="A checkpoint (an id, the beginning of one, a label), or whose generation."),
    ],
    place: Annotated[
        str | None,
        typer.Argument(metavar="[PATH][@GEN|@TIME]", show_default=False, callback=_options.value_of(_parse.kept),
                       help="What of the vault, and of when.  [default: everything, the newest]"),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="DIR", help="From the vault into this new or empty host directory.")
    ] = None,
    as_name: Annotated[str | None, typer.Option("--as", metavar="NEW", help="Make a new sandbox of it.")] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Also while the sandbox runs.")] = False,
    disk_only: DiskOnly = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:  # fmt: skip
    """Bring back a checkpoint of a sandbox, or files from its vault.

    \b
    restore NAME@ID                 the whole sandbox, as it was at a checkpoint
    restore NAME@ID --as NEW        the same as a new sandbox
    restore NAME --to DIR           all that NAME wrote, to the host
    restore NAME PATH --to DIR      one file or directory
    restore NAME PATH@12            as it was in generation 12, into the running sandbox
    restore NAME @10m --to DIR      everything, as it was ten minutes ago

    Of the vault: NAME may be running, stopped, broken or in the trash. PATH is absolute in the guest. GEN is a number
    (limpet history NAME), TIME is 2026-01-31T12:00, 12:00:30, or 90s, 10m, 2h, 3d ago. The last @ counts when a
    generation or a time follows it, else it belongs to PATH. Without --to, what is there now is kept as a generation
    first. In place of a checkpoint, what is replaced is kept as a checkpoint first.
    """
    from limpet.client import Client

    if place is None and to is None:
        try:
            with Client() as client, Progress(quiet) as progress:
                result = client.checkpoints.restore(
                    source, as_name=as_name, force=force, disk_only=disk_only, on_stage=progress
                )
        except NotFound as error:
            error.hint = "; ".join(filter(None, (error.hint, _from_vault_instead(source))))
            raise
        return _told(result, json, quiet)
    if as_name is not None or force or disk_only:
        raise BadRequest(
            "--as, --force and --disk-only are for checkpoints", hint="restore NAME@ID, without PATH or --to"
        )
    name, wanted = _from_vault(source, place)
    with Client() as client:
        return vaults.bring_back(client, name, wanted, to, json=json, quiet=quiet)


def _from_vault_instead(source: str) -> str | None:
    """What else could have been meant by something that names no checkpoint."""
    name, at, moment = source.partition("@")
    if (at and not _parse.is_instant(moment)) or source.startswith("ck_"):
        return None
    return f"files from the vault: limpet restore {name}{f' @{moment}' if at else ''} --to DIR"


def _from_vault(source: str, place: str | None) -> tuple[str, _parse.Kept]:
    """Whose vault, and what of it; `NAME@GEN` does as well as `NAME @GEN`."""
    name, at, moment = source.partition("@")
    wanted = _parse.kept(place or "")
    if not at:
        return name, wanted
    if wanted.at is not None:
        raise BadRequest(f"@{moment} and @{wanted.at} are two generations", hint=f"limpet restore {name} {place} …")
    return name, wanted._replace(at=_parse.instant(moment))


@app.command()
def undo(name: _options.OptionalName = None, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """Bring a sandbox back to its newest checkpoint, running or not. Prints its name.

    What is replaced is kept as a checkpoint first.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        result = _boxes.one(client, name).undo(on_stage=progress)
    return _told(result, json, quiet)


def _told(result: RestoreResult, json: bool, quiet: bool) -> int:
    if json:
        _output.emit(result)
        return 0
    name = result.sandbox.name
    print(name)
    if not quiet:
        about = f" ({result.checkpoint.label})" if result.checkpoint.label else ""
        _output.note(f"as it was at {result.checkpoint.id}{about}")
        if result.saved is not None:
            _output.note(f"what it was before: limpet restore --force {name}@{result.saved.id}")
    return 0
