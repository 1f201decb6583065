"""The work and its way back: diff, apply, export, import."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from limpet.cli import _boxes, _options, _output, _parse, _terminal, vaults
from limpet.cli._progress import Progress
from limpet.errors import BadRequest

if TYPE_CHECKING:
    from limpet.models import Change

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Instant = _options.value_of(_parse.instant)
Base = Annotated[str | None, typer.Option("--base", metavar="COMMIT", help="Compare with this.  [default: the import]")]


@app.command()
def diff(
    name: _options.OptionalName = None,
    older: Annotated[str | None, typer.Argument(metavar="GEN1", show_default=False, callback=Instant)] = None,
    newer: Annotated[
        str | None,
        typer.Argument(metavar="GEN2", show_default=False, callback=Instant, help="Default: the newest."),
    ] = None,
    base: Base = None,
    stat: Annotated[bool, typer.Option("--stat", help="Only lines added and removed by file.")] = False,
    name_only: Annotated[bool, typer.Option("--name-only", help="Only the names of changed files.")] = False,
    json: _options.Json = False,
) -> int:
    """Print what changed in the sandbox since the import, as a patch that `git apply` takes.

    Commits, staged, unstaged and untracked changes are all in it. Nothing in the sandbox is touched.

    With GEN1, one line for each path that differs between two generations of the vault (`limpet history NAME`): A, M
    or D, the path, and sizes before and after. A generation is a number or a time: 2026-01-31T12:00, 10m, 2h ago.
    """
    from limpet.client import Client

    if older is not None:
        assert name is not None
        if base is not None or stat or name_only:
            raise BadRequest("--base, --stat and --name-only are for the patch", hint="leave GEN1 out, or them")
        newest = None if newer is None else _parse.instant(newer)
        with Client() as client:
            return vaults.print_diff(client, name, _parse.instant(older), newest, json=json)
    with Client() as client:
        workspace = _boxes.one(client, name).workspace
        if not (stat or name_only or json):
            sys.stdout.flush()
            with workspace.patch_stream(base) as (_, chunks):
                for chunk in chunks:
                    _terminal.write_all(1, chunk)
            return 0
        changes = workspace.changes(base)
    if json:
        _output.emit(changes)
    elif name_only:
        for change in changes.changes:
            print(change.path)
    else:
        _print_stat(changes.changes)
    return 0


def _print_stat(changes: list[Change]) -> None:
    """As `git diff --stat` ends, with the numbers themselves in place of the bars."""
    for change in changes:
        counts = "binary" if change.added is None else f"+{change.added} -{change.removed or 0}"
        print(f"{change.status} {_output.printable(change.path)} | {counts}")
    added, removed = (sum(getattr(change, key) or 0 for change in changes) for key in ("added", "removed"))
    print(f"{len(changes)} file{'' if len(changes) == 1 else 's'} changed, +{added} -{removed}")


@app.command()
def apply(
    name: _options.OptionalName = None,
    dir: Annotated[
        Path | None, typer.Option("-C", "--directory", metavar="DIR", help="Into this one.  [default: the imported]")
    ] = None,
    base: Base = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it would apply.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Bring the changes into the host directory: all of them, or none and a message why."""
    from limpet.client import Client

    with Client() as client:
        result = _boxes.one(client, name).workspace.apply(dir, base=base, check=check)
    if json:
        _output.emit(result)
    elif not quiet:
        for change in result.changes:
            print(f"{change.status} {_output.printable(change.path)}")
        count = len(result.changes)
        what = "would apply" if check else "applied"
        _output.note(f"{count} file{'' if count == 1 else 's'} {what} to {result.host_dir}" if count else "no changes")
    return 0


@app.command()
def export(
    name: _options.OptionalName = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="- is stdout.")] = "-",
    base: Base = None,
    quiet: _options.Quiet = False,
) -> int:
    """Write the changes to a patch file, which appears whole or not at all. Says on stderr what is in it."""
    from limpet.client import Client

    with Client() as client:
        workspace = _boxes.one(client, name).workspace
        with workspace.patch_stream(base) as (used, chunks):
            if output == "-":
                sys.stdout.flush()
                total = 0
                for chunk in chunks:
                    _terminal.write_all(1, chunk)
                    total += len(chunk)
            else:
                total = _write(Path(output), chunks)
    if not quiet:
        _output.note(f"{_output.size(total)} of changes since {used[:12] or 'the import'}")
    return 0


def _write(target: Path, chunks: object) -> int:
    """All or nothing."""
    from collections.abc import Iterable

    assert isinstance(chunks, Iterable)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            total = file.tell()
        partial.replace(target)
    except OSError as error:
        raise BadRequest(f"cannot write {target}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    return total


@app.command("import")
def import_(
    name: _options.Name,
    dir: Annotated[Path, typer.Argument(metavar="DIR", help="Host directory.")] = Path(),
    tracked: Annotated[bool, typer.Option("--tracked-only", help="Leave untracked files out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be copied.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Give up the sandbox's own changes.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Bring a host directory into a sandbox: a git repository with its uncommitted work, or a plain directory."""
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        result = client.sandboxes.ref(name).workspace.import_(
            dir, untracked=not tracked, dry_run=dry_run, replace=replace, on_stage=progress
        )
    if json:
        _output.emit(result)
        return 0
    for path in result.paths or ():
        print(path)
    if not quiet:
        what = "would be imported" if dry_run else "imported"
        _output.note(f"{result.files} files, {_output.size(result.bytes)} {what}")
    return 0
