"""Commands in a sandbox: exec, shell, attach, ps. The way to a running command is short: one web socket, no models."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limpet.cli import _boxes, _options, _output, _parse, _terminal
from limpet.errors import FailedPrecondition

if TYPE_CHECKING:
    from limpet.cli._session import Ended
    from limpet.client import Client

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_SHOWN = 72  # characters of a command in a list; --json has all of it
_SHELL = "command -v bash >/dev/null && exec bash -l; exec sh -l"


def streams(interactive: bool | None, tty: bool | None) -> tuple[bool, bool]:
    """Whether to forward stdin and whether to give a terminal: by default a terminal when we are at one, and piped
    input but not what is typed when stdout goes elsewhere."""
    both = all(_terminal.is_open(fd) and os.isatty(fd) for fd in (0, 1))
    use_tty = both if tty is None else tty and _terminal.is_open(0) and os.isatty(0)
    if interactive is not None:
        return interactive, use_tty
    return use_tty or (_terminal.is_open(0) and not os.isatty(0)), use_tty


def request(env: list[str] | None, user: str | None, cwd: str | None, timeout: str | None, tty: bool) -> dict[str, Any]:
    """The options of an exec."""
    variables = _parse.environment(env or [])
    if tty:
        rows, cols = _terminal.size()
        variables.setdefault("TERM", os.environ.get("TERM", "xterm-256color"))
        size = {"rows": rows, "cols": cols}
    else:
        size = {}
    limit = _parse.seconds(timeout) if timeout else None
    return {"env": variables, "user": user, "cwd": cwd, "timeout": limit, **size}


def follow(
    client: Client, name: str, argv: list[str], *, feed: bool, tty: bool, let_go: bool = True, **options: Any
) -> Ended:
    """Run a command with this terminal (or these pipes) at its other end."""
    from limpet.cli._session import Session

    command = client.exec(name, argv, stdin=feed, tty=tty, on_notice=_output.warn, **options)
    return Session(
        command, lambda signal: client.signal(name, command.id, signal), tty=tty, feed=feed, let_go=let_go
    ).run()


@app.command("exec", cls=_options.CommandLast)
def exec_(
    name: _options.OptionalName,
    command: Annotated[list[str], typer.Argument(metavar="CMD", show_default=False)],
    env: _options.Env = None,
    user: _options.User = None,
    workdir: _options.Cwd = None,
    interactive: _options.Interactive = None,
    tty: _options.Tty = None,
    detach: _options.Detach = False,
    timeout: _options.Timeout = None,
    start: Annotated[bool, typer.Option("--start", help="Boot the sandbox first if it is stopped.")] = False,
    sync: _options.Sync = False,
    quiet: _options.Quiet = False,
) -> int:
    """Run a command in a running sandbox: in its workspace, else in the user's home.

    `limpet exec -- CMD` runs it in the sandbox of this directory. The exit code is the command's. Ctrl-C goes to the
    command; a second one lets go of it and says how to come back.
    """
    from limpet.client import Client

    with Client() as client:
        if not name:
            name = _boxes.one(client, None).name
        if sync:
            _sync(client, name, quiet)
        feed, use_tty = (False, bool(tty)) if detach else streams(interactive, tty)
        options = request(env, user, workdir, timeout, use_tty) | {"start": start}
        if detach:
            print(client.sandboxes.ref(name).exec(command, detach=True, tty=use_tty, **options).id)
            return 0
        return follow(client, name, command, feed=feed, tty=use_tty, **options).code


def _sync(client: Client, name: str, quiet: bool) -> None:
    from limpet.cli._progress import Progress

    box = client.sandboxes.get(name)
    if box.info.workspace is None:
        raise FailedPrecondition(f"'{name}' has no workspace", hint=f"limpet import {name} DIR")
    with Progress(quiet) as progress:
        box.workspace.import_(box.info.workspace.host_dir, on_stage=progress)


@app.command()
def shell(
    name: _options.OptionalName = None,
    user: _options.User = None,
    workdir: _options.Cwd = None,
    env: _options.Env = None,
) -> int:
    """Open a shell in a sandbox, which is booted if it is stopped. Ctrl-] three times lets go of it."""
    from limpet.client import Client

    with Client() as client:
        if not name:
            name = _boxes.one(client, None).name
        feed, tty = streams(None, None)
        options = request(env, user, workdir, None, tty) | {"start": True}
        return follow(client, name, ["sh", "-c", _SHELL], feed=feed, tty=tty, let_go=False, **options).code


@app.command()
def attach(
    name: _options.Name,
    id: Annotated[str, typer.Argument(metavar="ID", help="As `limpet ps` lists it.")],
    interactive: _options.Interactive = None,
    new: Annotated[bool, typer.Option("--new", help="Only output to come, not what is kept.")] = False,
) -> int:
    """Follow a command that runs already, with the output of it that is kept. The exit code is the command's."""
    from limpet.cli._session import Session
    from limpet.client import Client

    with Client() as client:
        box = client.sandboxes.ref(name)
        info = client.exec_handle(name, id).info()
        feed, tty = streams(interactive, None)
        tty = tty and info.tty
        feed = feed and info.running
        command = box.attach(
            id, stdout=info.stdout_bytes if new else 0, stderr=None if info.tty else info.stderr_bytes if new else 0,
            stdin=feed, steal=feed,
        )  # fmt: skip
        session = Session(command, lambda signal: client.signal(name, id, signal), tty=tty, feed=feed)
        if tty and info.running:
            command.resize(*_terminal.size())
        return session.run().code


@app.command()
def ps(name: _options.OptionalName = None, json: _options.Json = False) -> int:
    """List the commands that run in a sandbox and the last ones that ended."""
    import shlex
    import time

    from limpet.client import Client

    with Client() as client:
        found = _boxes.one(client, name).execs()
    if json:
        _output.emit(found)
        return 0
    rows = []
    for item in found:
        if item.running:
            state = "running"
        elif item.timed_out:
            state = "timed out"
        else:
            state = f"signal {item.signal}" if item.signal else f"exit {item.exit_code}"
        age = _output.duration(time.time() - item.started_at)
        command = " ".join(shlex.join(item.argv).split())
        short = command if len(command) <= _SHOWN else command[: _SHOWN - 1] + "…"
        rows.append((item.id, state, age, item.user, short))
    _output.table(("ID", "STATE", "AGE", "USER", "COMMAND"), rows)
    return 0
