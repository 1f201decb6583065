"""Parameters that several commands share, and what goes with them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from limpet.cli import _parse


def complete_names(incomplete: str) -> list[str]:
    """Names of sandboxes for the shell; silent when there is no daemon."""
    from limpet.client import Client
    from limpet.errors import LimpetError

    try:
        with Client(autostart=False, timeout=2) as client:
            return [box.name for box in client.sandboxes.list() if box.name.startswith(incomplete)]
    except LimpetError:
        return []


def complete_checkpoints(incomplete: str) -> list[str]:
    """`NAME@ID` of all checkpoints for the shell; silent when there is no daemon."""
    from limpet.client import Client
    from limpet.errors import LimpetError

    try:
        with Client(autostart=False, timeout=2) as client:
            found = [f"{info.sandbox}@{info.id}" for info in client.checkpoints.list()]
    except LimpetError:
        return []
    return [reference for reference in found if reference.startswith(incomplete)]


def complete_trashed(incomplete: str) -> list[str]:
    """Names of sandboxes in the trash for the shell; silent when there is no daemon."""
    from limpet.client import Client
    from limpet.errors import LimpetError

    try:
        with Client(autostart=False, timeout=2) as client:
            return [entry.name for entry in client.trash.list() if entry.name.startswith(incomplete)]
    except LimpetError:
        return []


def complete_kept(incomplete: str) -> list[str]:
    """Names of all sandboxes that have a vault, removed ones too."""
    return list(dict.fromkeys([*complete_names(incomplete), *complete_trashed(incomplete)]))


def complete_restorable(incomplete: str) -> list[str]:
    """What `restore` takes first: `NAME@ID` of checkpoints, once there is an `@`; names before."""
    return complete_checkpoints(incomplete) if "@" in incomplete else complete_kept(incomplete)


def complete_payloads(incomplete: str) -> list[str]:
    """Ids of all payloads for the shell; silent when there is no daemon."""
    from limpet.client import Client
    from limpet.errors import LimpetError

    try:
        with Client(autostart=False, timeout=2) as client:
            return [one.payload.id for one in client.payloads() if one.payload.id.startswith(incomplete)]
    except LimpetError:
        return []


def value_of(parser: Any) -> Any:
    """A callback that checks an option while the command line is still being parsed: a mistake is wrong usage."""
    from limpet.errors import BadRequest

    def check(value: Any) -> Any:
        try:
            if isinstance(value, (list, tuple)) or value is not None:
                parser(value)
        except BadRequest as error:
            raise typer.BadParameter(error.message + (f" ({error.hint})" if error.hint else "")) from None
        return value

    return check


Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_names, show_default=False)]
OptionalName = Annotated[
    str | None,
    typer.Argument(metavar="NAME", autocompletion=complete_names, show_default=False,
                   help="Default: the sandbox of this directory."),
]  # fmt: skip
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", autocompletion=complete_names, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summaries.")]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", metavar="K=V", help="Environment; K alone takes its value from here.",
                 callback=value_of(_parse.environment)),
]  # fmt: skip
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="K=V", help="Label.", callback=value_of(_parse.labels))
]
Publish = Annotated[
    list[str] | None,
    typer.Option("--publish", "-p", metavar="H:G", help="Publish guest port G on 127.0.0.1:H.",
                 callback=value_of(_parse.ports)),
]  # fmt: skip
Cpus = Annotated[int | None, typer.Option("--cpus", metavar="N", min=1, max=64, help="Virtual CPUs.")]
Memory = Annotated[
    str | None,
    typer.Option("--memory", "-m", metavar="SIZE", help="Memory, for example 512M or 2G.",
                 callback=value_of(_parse.memory_mib)),
]  # fmt: skip
Image = Annotated[str, typer.Option("--image", metavar="NAME[:TAG]", help="Image.")]
Network = Annotated[
    str, typer.Option("--network", metavar="user|none", help="user: out through NAT; none: no network.")
]
Ttl = Annotated[
    str | None,
    typer.Option("--ttl", metavar="TIME", help="Stop it this long after a start.", callback=value_of(_parse.seconds)),
]
Idle = Annotated[
    str | None,
    typer.Option("--idle", metavar="TIME", help="Stop it after this long without a command.",
                 callback=value_of(_parse.seconds)),
]  # fmt: skip
IdleSuspend = Annotated[
    str | None,
    typer.Option("--idle-suspend", metavar="TIME", help="Suspend it after this long without a command.",
                 callback=value_of(_parse.seconds)),
]  # fmt: skip
EveryExec = Annotated[
    bool, typer.Option("--every-exec", help="Keep a disk checkpoint before each command of run and exec.")
]
Entrypoint = Annotated[
    str | None,
    typer.Option("--entrypoint", metavar="CMD", help="Its command for when `run` is given none.",
                 callback=value_of(_parse.words)),
]  # fmt: skip
DefaultUser = Annotated[
    str | None, typer.Option("--user", "-u", metavar="USER", help="Who its commands run as.  [default: the image's]")
]
DefaultCwd = Annotated[
    str | None,
    typer.Option("--workdir", metavar="DIR", help="Where its commands begin.  [default: the workspace, or ~]"),
]
Checkpoint = Annotated[
    str,
    typer.Argument(metavar="NAME@ID", autocompletion=complete_checkpoints, show_default=False,
                   callback=value_of(_parse.checkpoint), help="ID: an id, the beginning of one, or a label."),
]  # fmt: skip
Checkpoints = Annotated[
    list[str],
    typer.Argument(metavar="NAME@ID", autocompletion=complete_checkpoints, show_default=False,
                   callback=value_of(_parse.checkpoints), help="ID: an id, the beginning of one, or a label."),
]  # fmt: skip
Payloads = Annotated[
    list[str] | None,
    typer.Option("--payload", metavar="HOSTDIR:GUESTDIR[:interval=TIME]",
                 help="Keep this host directory in step with that of the guest.",
                 callback=value_of(_parse.payloads)),
]  # fmt: skip
KeptName = Annotated[
    str,
    typer.Argument(metavar="NAME", autocompletion=complete_kept, show_default=False,
                   help="A sandbox, running or not, also one in the trash; or its id."),
]  # fmt: skip
User = Annotated[str | None, typer.Option("--user", "-u", metavar="USER", help="Run as this user of the guest.")]
Cwd = Annotated[str | None, typer.Option("--workdir", metavar="DIR", help="Directory in the guest.")]
Timeout = Annotated[
    str | None,
    typer.Option("--timeout", metavar="TIME", help="End the command after this long (exit code 124).",
                 callback=value_of(_parse.seconds)),
]  # fmt: skip
Interactive = Annotated[
    bool | None, typer.Option("--interactive/--no-stdin", "-i/-n", help="Forward stdin.  [default: unless a terminal]")
]
Tty = Annotated[
    bool | None, typer.Option("--tty/--no-tty", "-t/-T", help="Give it a terminal.  [default: if this is one]")
]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Start it and print its id.")]
Sync = Annotated[bool, typer.Option("--sync", help="Import the host directory again first.")]


def machine(
    image: str, cpus: int | None, memory: str | None, network: str, labels: list[str] | None,
    ports: list[str] | None, *, ttl: str | None = None, idle: str | None = None, idle_suspend: str | None = None,
    every_exec: bool = False, entrypoint: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The spec of a new sandbox; what was not given is left to the daemon, which asks the image first."""
    if network not in ("user", "none"):
        raise typer.BadParameter(f"{network!r} is neither 'user' nor 'none'", param_hint="--network")
    spec: dict[str, Any] = {"image": image, "network": network}
    given = {
        "vcpus": cpus, "memory_mib": _parse.memory_mib(memory) if memory else None,
        "labels": _parse.labels(labels) if labels else None, "ports": _parse.ports(ports) if ports else None,
        "ttl": _parse.seconds(ttl) if ttl else None, "idle_timeout": _parse.seconds(idle) if idle else None,
        "idle_suspend": _parse.seconds(idle_suspend) if idle_suspend else None, "every_exec": every_exec or None,
        "entrypoint": _parse.words(entrypoint) if entrypoint is not None else None,
    }  # fmt: skip
    return spec | {key: value for key, value in given.items() if value is not None}


class CommandLast(TyperCommand):
    """`[OPTIONS] [NAME] [OPTIONS] [--] CMD…`: everything from CMD on is the guest's, options too. Directly behind the
    options `--` means that no NAME is given, and then it is ''."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        ctx.allow_interspersed_args = False
        if "--help" in args[:1] or not args:
            return super().parse_args(ctx, args)
        rest = self._behind_options(args)
        head = args[: len(args) - len(rest)]
        if head and head[-1] == "--":
            return super().parse_args(ctx, [*head, "", *rest])
        name, tail = rest[:1], rest[1:]
        if tail[:1] == ["--"]:
            tail = tail[1:]
        elif tail and tail[0].startswith("-"):
            behind = self._behind_options(tail)
            more = tail[: len(tail) - len(behind)]
            head, tail = [*head, *(word for word in more if word != "--")], behind
        return super().parse_args(ctx, [*head, "--", *name, *tail])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", "[NAME]", "[--]", "CMD..."]

    def _behind_options(self, args: list[str]) -> list[str]:
        """What follows the options that stand first, and a `--` behind them."""
        valued = {opt for param in self.params if not getattr(param, "is_flag", True) for opt in param.opts}
        index = 0
        while index < len(args) and args[index].startswith("-") and args[index] != "-":
            word = args[index]
            index += 1
            if word == "--":
                break
            index += word in valued or (not word.startswith("--") and _wants_next(word, valued))
        return args[index:]


def _wants_next(cluster: str, valued: set[str]) -> bool:
    """Whether `-dtu` ends with an option that takes the next word; `-uroot` brings its value along."""
    position = next((i for i, letter in enumerate(cluster[1:], 1) if f"-{letter}" in valued), None)
    return position == len(cluster) - 1
