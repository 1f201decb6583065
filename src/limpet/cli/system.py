"""The installation: setup, doctor, completion, version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from limpet.cli import _options, _output
from limpet.cli._progress import Progress
from limpet.errors import BadRequest

if TYPE_CHECKING:
    from limpet.models import DoctorReport

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_COLOURS = {"PASS": "green", "WARN": "yellow", "FAIL": "red"}


@app.command()
def setup(
    mirror: Annotated[str | None, typer.Option("--mirror", metavar="URL", help="Debian mirror.")] = None,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Make what sandboxes need, from Debian packages: kernel, initramfs, agent disk, image `base`.

    Can be interrupted and repeated; a second run has nothing to do.
    """
    from limpet.client import Client

    with Client() as client, Progress(quiet) as progress:
        done = client.setup(mirror=mirror, on_stage=progress)
    if json:
        _output.emit({"done": done})
    elif not quiet:
        for item in done or ["everything is there"]:
            _output.note(item)
    return 0


@app.command()
def doctor(
    repair: Annotated[bool, typer.Option("--repair", help="Fix what is safe to fix.")] = False,
    json: _options.Json = False,
) -> int:
    """Check what limpet needs on this machine, with remedies. Exit code 1 when a check fails."""
    from limpet.client import Client

    with Client() as client:
        report = client.doctor(repair=repair)
    _output.emit(report) if json else _print_report(report)
    return 1 if any(row.status == "FAIL" for row in report.rows) else 0


def _print_report(report: DoctorReport) -> None:
    import sys

    colour = sys.stdout.isatty()
    width = max((len(row.check) for row in report.rows), default=0)
    for row in report.rows:
        status = typer.style(row.status, fg=_COLOURS[row.status]) if colour else row.status
        print(f"{status}  {row.check.ljust(width)}  {_output.printable(row.detail)}")
        if row.remedy and row.status != "PASS":
            print(f"      {' ' * width}  -> {_output.printable(row.remedy)}")
    for item in report.repaired:
        _output.note(f"repaired: {item}")


@app.command()
def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", show_default=False)],
) -> int:
    """Print a completion script, which knows the names of sandboxes: eval "$(limpet completion bash)"."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    if shell not in ("bash", "zsh", "fish"):
        raise BadRequest(f"no completion for {shell!r}", hint="there is one for bash, zsh and fish")
    print(get_completion_script(prog_name="limpet", complete_var="_LIMPET_COMPLETE", shell=shell))
    return 0


@app.command()
def version(json: _options.Json = False) -> int:
    """Print the version of this command; `limpet daemon status` tells the daemon's."""
    from limpet.version import PROTOCOL, __version__

    _output.emit({"version": __version__, "protocol": PROTOCOL}) if json else print(f"limpet {__version__}")
    return 0
