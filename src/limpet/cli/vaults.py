"""What the host keeps of what sandboxes wrote: history, show, vault check|repair|gc|df|ls."""

from __future__ import annotations

import stat
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from limpet.cli import _options, _output, _parse, _terminal
from limpet.cli._progress import Progress

if TYPE_CHECKING:
    from limpet.client import Client
    from limpet.models import GenerationInfo, PathChange, PathVersion, VaultCheck, VaultEntry, VaultRestored

app = typer.Typer(add_completion=False, rich_markup_mode=None)
vault = typer.Typer(
    help="Vaults: what sandboxes wrote, kept on the host generation by generation.", rich_markup_mode=None,
    no_args_is_help=True,
)  # fmt: skip
app.add_typer(vault, name="vault")

OptionalName = Annotated[
    str | None,
    typer.Argument(metavar="NAME", autocompletion=_options.complete_kept, show_default=False, help="Default: all."),
]
_GENERATION = ("GENERATION", "TIME", "FILES", "SIZE", "ADDED", "KEPT FOR")
_VERSION = ("GENERATION", "TIME", "CHANGE", "FILES", "SIZE", "MODE", "MODIFIED")
_MARKS = {"added": "A", "changed": "M", "removed": "D"}


@app.command()
def history(
    name: _options.KeptName,
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH", show_default=False, help="Only where this, or what is in it, changed."),
    ] = None,
    tail: Annotated[int | None, typer.Option("--tail", "-n", metavar="N", min=0, help="Only the newest.")] = None,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """List the generations of a sandbox, or of one path in it (absolute in the guest); with -q only their numbers."""
    from limpet.client import Client

    found: list[GenerationInfo] | list[PathVersion]
    with Client() as client:
        box = client.vaults.of(name)
        found = box.history() if path is None else box.versions(_path(path))
    if tail is not None:
        found = found[max(len(found) - tail, 0) :]
    if json:
        _output.emit(found)
    elif quiet:
        for one in found:
            print(one.generation)
    elif path is None:
        _output.table(_GENERATION, [_generation_row(one) for one in found])  # type: ignore[arg-type]
    else:
        _output.table(_VERSION, [_version_row(one) for one in found])  # type: ignore[arg-type]
    return 0


def _path(text: str) -> str:
    """A path alone, checked."""
    from limpet.errors import BadRequest

    if not text.startswith("/"):
        raise BadRequest(f"{text!r} is not an absolute path in the guest", hint=f"for example /home/user/{text}")
    return text


def _generation_row(one: GenerationInfo) -> tuple[object, ...]:
    size, added = _output.size(one.bytes), _output.size(one.new_bytes)
    return one.generation, _output.when(one.time), one.files, size, added, one.pinned


def _version_row(one: PathVersion) -> tuple[object, ...]:
    mode = None if one.mode is None else f"{one.mode:04o}"
    modified = _output.when(one.modified) if one.modified else None
    gone = one.change == "removed"
    counts = (None, None) if gone else (one.files, _output.size(one.bytes))
    return one.generation, _output.when(one.time), one.change, *counts, mode, modified


@app.command()
def show(
    name: _options.KeptName,
    place: Annotated[
        str,
        typer.Argument(metavar="PATH[@GEN|@TIME]", show_default=False, callback=_options.value_of(_parse.kept),
                       help="Absolute in the guest.  [default: / in the newest generation]"),
    ] = "/",
    json: _options.Json = False,
) -> int:  # fmt: skip
    """Print a file as it was, or what a directory held.

    GEN is a generation's number; TIME is 2026-01-31T12:00, 12:00:30, or 10m, 2h, 3d ago, and means the newest
    generation then. A file's bytes go to stdout as they are.
    """
    from limpet.client import Client

    wanted = _parse.kept(place)
    with Client() as client:
        box = client.vaults.of(name)
        listing = box.list(wanted.path or "/", wanted.at)
        if listing.entry.kind == "file" and not json:
            sys.stdout.flush()
            with box.stream(wanted.path or "/", listing.generation) as chunks:
                for chunk in chunks:
                    _terminal.write_all(1, chunk)
            return 0
    if json:
        _output.emit(listing)
        return 0
    shown = listing.entries if listing.entry.kind == "dir" else [listing.entry]
    _output.table(("MODE", "OWNER", "SIZE", "MODIFIED", "PATH"), [_entry_row(entry) for entry in shown])
    return 0


_KINDS = {
    "file": stat.S_IFREG, "dir": stat.S_IFDIR, "symlink": stat.S_IFLNK, "fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK,
    "char": stat.S_IFCHR, "block": stat.S_IFBLK,
}  # fmt: skip


def _entry_row(entry: VaultEntry) -> tuple[object, ...]:
    mode = stat.filemode(_KINDS[entry.kind] | entry.mode)
    target = f" -> {entry.target}" if entry.target is not None else ""
    size = _output.size(entry.size) if entry.kind == "file" else None
    return mode, f"{entry.uid}:{entry.gid}", size, _output.when(entry.modified), entry.path + target


def print_diff(client: Client, name: str, a: str, b: str | None, *, json: bool) -> int:
    """What differs between two generations: one line each."""
    changes = client.vaults.of(name).diff(a, b)
    if json:
        _output.emit(list(changes))
        return 0
    for change in changes:
        print(_output.printable(_change_line(change)))
    return 0


def _change_line(change: PathChange) -> str:
    sizes = [_output.size(count) for count in (change.before, change.after) if count is not None]
    return f"{_MARKS[change.change]} {change.path}" + (f"  {' → '.join(sizes)}" if sizes else "")


def bring_back(client: Client, name: str, wanted: _parse.Kept, to: str | None, *, json: bool, quiet: bool) -> int:
    """Restore from the vault: to the host, or into the running guest."""
    with Progress(quiet) as progress:
        result = client.vaults.of(name).restore(wanted.path, at=wanted.at, to=to, on_stage=progress)
    if json:
        _output.emit(result)
        return 0
    print(_output.printable(result.to or result.path))
    if not quiet:
        _tell_restored(name, result)
    return 0


def _tell_restored(name: str, result: VaultRestored) -> None:
    files = f"{result.files} file{'' if result.files == 1 else 's'}"
    about = f"generation {result.generation} of {_output.when(result.time)}"
    _output.note(f"{files}, {_output.size(result.bytes)}, {about}, every byte verified")
    if result.left_out:
        what = ", ".join(f"{count} {kind}" for kind, count in sorted(result.left_out.items()))
        _output.warn(f"left out: {what}")
    if result.saved is not None:
        _output.note(f"what it was before: limpet restore {name} {result.path}@{result.saved}")


@vault.command("check")
def vault_check(name: OptionalName = None, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """Read everything in vaults again and compare it with its digests. Exit code 1 when something is wrong."""
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        checks = client.vaults.check(name, on_stage=progress)
    return _tell_checks(checks, json)


@vault.command("repair")
def vault_repair(name: OptionalName = None, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """Set aside what is damaged in vaults, back to the newest whole generation; nothing is deleted.

    Exit code 1 when something is still wrong.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        checks = client.vaults.repair(name, on_stage=progress)
    return _tell_checks(checks, json)


def _tell_checks(checks: list[VaultCheck], json: bool) -> int:
    """Good news and data to stdout, problems to stderr; the exit code."""
    if json:
        _output.emit(checks)
    for one in () if json else checks:
        for line in one.repaired:
            print(_output.printable(f"{one.sandbox}: {line}"))
        for problem in one.problems:
            _output.note(f"error: {one.sandbox}: {problem}")
        if one.ok:
            kept = f"{one.generations} generation{'' if one.generations == 1 else 's'}"
            print(f"{one.sandbox}: ok, {kept}, {one.objects} objects, {_output.size(one.bytes)}")
    return 0 if all(one.ok for one in checks) else 1


@vault.command("gc")
def vault_gc(name: OptionalName = None, json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """Thin out old generations now, as the daemon does by itself. Prints what was given up.

    Kept are all of the last hour, one an hour for a day, one a day for a month, and the newest.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        result = client.vaults.gc(name, on_stage=progress)
    return _output.pruned(result, json=json, quiet=quiet)


@vault.command("df")
def vault_df(json: _options.Json = False) -> int:
    """Tell what vaults take of the disk, and what of it `limpet vault gc` would free."""
    from limpet.client import Client

    with Client() as client:
        found = client.vaults.usage()
    if json:
        _output.emit(found)
        return 0
    rows: list[tuple[object, ...]] = [
        (one.sandbox, one.state, one.generations, _output.size(one.size), _output.size(one.reclaimable))
        for one in found
    ]
    sizes = (_output.size(sum(getattr(one, key) for one in found)) for key in ("size", "reclaimable"))
    rows.append(("total", None, sum(one.generations for one in found), *sizes))
    _output.table(("SANDBOX", "STATE", "GENERATIONS", "SIZE", "RECLAIMABLE"), rows)
    return 0


@vault.command("ls")
def vault_ls(json: _options.Json = False, quiet: _options.Quiet = False) -> int:
    """List vaults and the times they reach back to, those of removed sandboxes too; with -q only the sandboxes' ids."""
    from limpet.client import Client

    with Client() as client:
        found = client.vaults.usage()
    if json:
        _output.emit(found)
    elif quiet:
        for one in found:
            print(one.sandbox_id)
    else:
        headers = ("SANDBOX", "STATE", "GENERATIONS", "OLDEST", "NEWEST", "ID")
        rows = [
            (one.sandbox, one.state, one.generations, one.oldest and _output.when(one.oldest),
             one.newest and _output.when(one.newest), one.sandbox_id)
            for one in found
        ]  # fmt: skip
        _output.table(headers, rows)
    return 0
