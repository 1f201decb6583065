"""daemon start|stop|status|install|logs. Every command starts the daemon when none runs; sandboxes outlive it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from limpet.cli import _options, _output, _terminal
from limpet.errors import FailedPrecondition, NotFound, Unavailable

daemon = typer.Typer(
    help="Start, stop and look after the daemon. Sandboxes keep running without it.", rich_markup_mode=None,
    no_args_is_help=True,
)  # fmt: skip
app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.add_typer(daemon, name="daemon")

_UNIT = """\
[Unit]
Description=limpet: persistent microVM sandboxes

[Service]
ExecStart={python} -P -m limpet.daemon
{environment}Restart=on-failure
# Sandboxes outlive the daemon: a stop ends it alone.
KillMode=process

[Install]
WantedBy=default.target
"""


@app.callback()
def _app() -> None:
    """The daemon."""


@daemon.command()
def start(quiet: _options.Quiet = False) -> int:
    """Start the daemon; nothing happens when it runs."""
    from limpet.client import Client

    with Client() as client:
        pid = client.start_daemon()
    if not quiet:
        _output.note(f"started, pid {pid}" if pid else "it runs already")
    return 0


@daemon.command()
def stop(quiet: _options.Quiet = False) -> int:
    """Stop the daemon. Sandboxes keep running; the next command starts it again and finds them."""
    from limpet.client import Client

    with Client(autostart=False) as client:
        stopped = client.shutdown()
    if not quiet:
        _output.note("stopped" if stopped else "it does not run")
    return 0


@daemon.command()
def status(json: _options.Json = False) -> int:
    """Tell about the running daemon. Exit code 1 when none runs; none is started."""
    from limpet.client import Client

    try:
        with Client(autostart=False) as client:
            found = client.status()
    except Unavailable:
        if json:
            _output.emit({"running": 0, "pid": None})
        raise FailedPrecondition("the daemon does not run", hint="limpet daemon start") from None
    if json:
        _output.emit(found)
        return 0
    for key, value in _output.data_of(found).items():
        print(f"{key + ':':<12} {value}")
    return 0


@daemon.command()
def logs(
    tail: Annotated[int, typer.Option("--tail", "-n", metavar="N", min=1, help="The last lines.")] = 100,
) -> int:
    """Print the daemon's log, one JSON object a line, and why it could not start, if so."""
    from limpet import paths

    here = paths.discover()
    if not here.daemon_log.exists() and not here.daemon_errors.exists():
        raise NotFound(f"there is no log in {here.run}", hint="the daemon never ran here: limpet daemon start")
    sys.stdout.flush()
    for log in (here.daemon_errors, here.daemon_log):
        if log.exists():
            lines = log.read_bytes().splitlines(keepends=True)
            _terminal.write_all(1, b"".join(lines[-tail:]))
    return 0


@daemon.command()
def install() -> int:
    """Write a systemd user unit that starts the daemon at login, and say how to enable it."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    unit = config / "systemd" / "user" / "limpet.service"
    home = os.environ.get("LIMPET_HOME")
    environment = f'Environment="LIMPET_HOME={Path(home).absolute()}"\n' if home else ""
    try:
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text(_UNIT.format(python=sys.executable, environment=environment))
    except OSError as error:
        raise FailedPrecondition(f"cannot write {unit}: {error.strerror}") from None
    print(unit)
    _output.note("to enable it: systemctl --user daemon-reload && systemctl --user enable --now limpet.service")
    _output.note("to have it without being logged in: loginctl enable-linger")
    return 0
