"""The host's own docker client on the engine of a sandbox: docker, docker-env."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from limpet.cli import _boxes, _options, _output
from limpet.cli._progress import Progress
from limpet.errors import FailedPrecondition

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# What could send the client, or the builder behind it, to another engine, or make it speak TLS to a Unix socket.
_ELSEWHERE = ("DOCKER_CONTEXT", "DOCKER_TLS", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "BUILDX_BUILDER")
_SHELLS = ("sh", "fish", "csh")


class ClientLast(_options.CommandLast):
    """`[OPTIONS] [NAME] [OPTIONS] [--] ARGS…`, where ARGS may be missing."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", "[NAME]", "[--]", "[ARGS...]"]


@app.command(cls=ClientLast)
def docker(
    name: _options.OptionalName,
    args: Annotated[list[str] | None, typer.Argument(metavar="ARGS", show_default=False)] = None,
    quiet: _options.Quiet = False,
) -> int:
    """Run this host's docker client on the engine of a sandbox, which is started first if need be.

    `limpet docker NAME -- run -it alpine`. The exit code is the client's. Nothing of the engine is on this host; paths
    of `-v` are the guest's.
    """
    from limpet.client import Client

    program = _client(name)
    with Client() as client, Progress(quiet) as progress:
        box = _boxes.one(client, name)
        box.runtime.ensure(on_stage=progress)
        box.refresh()
        host = box.docker_host
    _become(program, args or [], host)


def _client(name: str | None) -> str:
    """Where this host's docker client is. Raises FailedPrecondition when there is none."""
    program = shutil.which("docker")
    if program is not None and not _is_podman(program):
        return program
    inside = " ".join(["limpet exec", *([name] if name else []), "-- docker"])
    raise FailedPrecondition(
        f"{program} is podman, which would use an engine of this host" if program
        else "there is no docker client on this host",
        hint="sudo apt-get install docker.io (its client alone is enough: no engine need run here), "
        f"or take the one in the sandbox: {inside}",
    )  # fmt: skip


def _is_podman(program: str) -> bool:
    """Whether it is the script of the package podman-docker: it knows no DOCKER_HOST."""
    with open(program, "rb") as file:
        beginning = file.read(4096)
    return beginning.startswith(b"#!") and b"podman" in beginning


def _become(program: str, args: list[str], host: str) -> NoReturn:
    """The client takes this process's place: its terminal, its signals and its exit code are its own."""
    environment = {key: value for key, value in os.environ.items() if key not in _ELSEWHERE}
    sys.stdout.flush()
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and an exec passes that on
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execve(program, ["docker", *args], environment | {"DOCKER_HOST": host})
    except OSError as error:
        raise FailedPrecondition(f"cannot run {program}: {error.strerror}") from None


@app.command("docker-env")
def docker_env(
    name: _options.OptionalName = None,
    shell: Annotated[str, typer.Option("--shell", metavar="sh|fish|csh", help="Whose words to print.")] = "sh",
    unset: Annotated[bool, typer.Option("--unset", help="Print what takes it back.")] = False,
) -> int:
    """Print what points the docker clients of a shell at a sandbox: eval "$(limpet docker-env NAME)".

    The address is the sandbox's for good; it answers while the sandbox runs, and its first use starts the engine.
    """
    from limpet.client import Client

    if shell not in _SHELLS:
        raise typer.BadParameter(f"{shell!r} is none of sh, fish, csh", param_hint="--shell")
    if unset:
        print(_forget(shell, ["DOCKER_HOST"]))
        return 0
    with Client() as client:
        box = _boxes.one(client, name)
        state = box.refresh().state.value
    print(_export(shell, "DOCKER_HOST", box.docker_host))
    print(_forget(shell, _ELSEWHERE))
    if state not in ("running", "paused"):
        _output.warn(f"{box.name} is {state}", f"limpet {'resume' if state == 'suspended' else 'start'} {box.name}")
    return 0


def _export(shell: str, name: str, value: str) -> str:
    if shell == "sh":
        return f"export {name}={shlex.quote(value)}"
    if shell == "fish":  # knows \\ and \' within quotes
        inner = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"set -gx {name} '{inner}';"
    return f"setenv {name} {shlex.quote(value).replace('!', chr(92) + '!')};"


def _forget(shell: str, names: Sequence[str]) -> str:
    if shell == "sh":
        return f"unset {' '.join(names)}"
    word = "set -e" if shell == "fish" else "unsetenv"
    return " ".join(f"{word} {name};" for name in names)
