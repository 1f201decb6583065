"""The entry point: which module has which command, and what an outcome means for the exit code.

Exit codes: 0 done · the command's own for run, exec, shell, attach, docker (128 + n: ended by signal n; 124: its
--timeout) · 125 limpet failed before or around such a command · 1 limpet failed · 2 wrong usage · 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from limpet.cli import _output
from limpet.errors import LimpetError, nearest

# command: (module, what it does). Help is here so that `limpet --help` loads none of the modules.
_SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Work": {
        "run": ("run", "Run a command on this directory in a sandbox, made if there is none."),
        "exec": ("execs", "Run a command in a running sandbox."),
        "shell": ("execs", "Open a shell in a sandbox."),
        "attach": ("execs", "Follow a command that runs already."),
        "ps": ("execs", "List the commands of a sandbox."),
        "diff": ("workspace", "Print what changed in the sandbox as a patch, or between two generations."),
        "apply": ("workspace", "Bring the changes back into the host directory."),
        "export": ("workspace", "Write the changes to a patch file."),
        "import": ("workspace", "Bring a host directory into a sandbox."),
        "cp": ("copy", "Copy files between host and sandbox."),
    },
    "Sandboxes": {
        "create": ("lifecycle", "Make a sandbox and boot it."),
        "start": ("lifecycle", "Boot stopped sandboxes."),
        "stop": ("lifecycle", "Make the data durable and power off."),
        "restart": ("lifecycle", "Stop and start."),
        "kill": ("lifecycle", "End the virtual machine at once; unsynced data is lost."),
        "pause": ("lifecycle", "Stop the virtual CPUs; the memory stays."),
        "suspend": ("lifecycle", "Write the memory to disk and end the process."),
        "resume": ("lifecycle", "Let a paused or suspended one go on."),
        "rm": ("lifecycle", "Put sandboxes into the trash."),
        "undelete": ("trash", "Take a removed sandbox back."),
        "trash": ("trash", "Removed sandboxes: list them, or empty the trash."),
        "ls": ("listing", "List sandboxes."),
        "inspect": ("listing", "Tell all about sandboxes."),
        "stats": ("listing", "Show what sandboxes use."),
        "set": ("settings", "Change vcpus, memory, environment, labels, time-outs …"),
        "rename": ("settings", "Give a sandbox another name."),
        "ports": ("settings", "List, publish and withdraw ports."),
        "logs": ("listing", "Print a log of a sandbox."),
        "events": ("listing", "Print what happened, and follow what happens."),
    },
    "Containers": {
        "docker": ("docker", "Run this host's docker client on the engine of a sandbox."),
        "docker-env": ("docker", "Print what points a shell's docker clients at a sandbox."),
        "runtime": ("runtime", "The container engine of a sandbox: start, look, stop."),
    },
    "Durability": {
        "status": ("syncing", "Tell how far behind the host is with what sandboxes wrote."),
        "sync": ("syncing", "Bring everything that a sandbox wrote to the host now."),
        "history": ("vaults", "List the generations of a sandbox, or of one path."),
        "show": ("vaults", "Print a file as it was, or what a directory held."),
        "vault": ("vaults", "What the host keeps of sandboxes: check, repair, thin out, measure."),
        "payload": ("payloads", "Host directories that are kept in step with those of a guest."),
    },
    "Time and copies": {
        "checkpoint": ("checkpoints", "Make, list, verify and remove checkpoints."),
        "restore": ("checkpoints", "Go back to a checkpoint, or bring files back from the vault."),
        "undo": ("checkpoints", "Go back to the newest checkpoint."),
        "fork": ("forks", "Make running copies of a running sandbox."),
        "commit": ("forks", "Make an image of a sandbox."),
    },
    "Installation": {
        "setup": ("system", "Make the guest pieces and the base image."),
        "doctor": ("system", "Check what limpet needs on this machine."),
        "image": ("images", "The images that sandboxes are made from."),
        "template": ("upkeep", "The warmed VMs that new sandboxes start from."),
        "config": ("upkeep", "The daemon's settings."),
        "system": ("upkeep", "Disk space: what takes it, and freeing it."),
        "daemon": ("daemon", "Start, stop and look after the daemon."),
        "completion": ("system", "Print a completion script for a shell."),
        "version": ("system", "Print the version."),
    },
}
COMMANDS = {name: entry for section in _SECTIONS.values() for name, entry in section.items()}
# Their exit code is a command's: our own failures are 125.
PASSING_EXIT_CODES = ("run", "exec", "shell", "attach", "docker")

# Typer does not export click's base error; it is the grandparent (behind UsageError) of one that it does.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]


class LazyGroup(TyperGroup):
    """All commands by name; a command's module is imported when the command is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, help = COMMANDS[cmd_name]
        app = importlib.import_module(f"limpet.cli.{module}").app
        found = typer.main.get_command(app)
        command = getattr(found, "commands", {}).get(cmd_name, found)
        command.name, command.short_help = cmd_name, help
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS and not ctx.resilient_parsing and not args[0].startswith("-"):
            hint = nearest(args[0], COMMANDS) or "limpet --help lists all commands"
            raise _output.UnknownCommand(f"no such command: {args[0]}", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, section in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, help) for name, (_, help) in section.items()])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl(
                [
                    ("0", "done"),
                    ("1", "limpet failed"),
                    ("2", "wrong usage"),
                    ("124", "the --timeout of run or exec ended the command"),
                    ("125", "limpet failed before or around the command of run, exec, shell, attach, docker"),
                    ("130", "ended by Ctrl-C"),
                    ("other", "that of the command itself; 128 + n: ended by signal n"),
                ]
            )


def _show_version(value: bool) -> None:
    if value:
        from limpet.version import __version__

        print(f"limpet {__version__}")
        raise typer.Exit


app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Persistent microVM sandboxes for coding agents.

    In a project, `limpet run -- CMD` gives CMD a virtual machine with the project in it; `limpet diff` and
    `limpet apply` bring its work back.
    """


def _dispatch(args: Sequence[str]) -> Any:
    """Through typer; but `exec NAME [--] CMD…`, which programs call in loops, goes past it: typer makes a pydantic
    adapter of every parameter, which takes longer than all the rest."""
    match list(args):
        case ["exec", name, "--", command, *words] | ["exec", name, command, *words] if not (
            name.startswith("-") or command.startswith("-")
        ):
            from limpet.cli.execs import exec_

            return exec_(name, [command, *words])
    return typer.main.get_command(app).main(list(args) or ["--help"], prog_name="limpet", standalone_mode=False)


def run(args: Sequence[str]) -> int:
    """Run one command line; the exit code. Whatever goes wrong is printed on stderr."""
    failed = 125 if args and args[0] in PASSING_EXIT_CODES else 1
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except _output.UnknownCommand as error:
        _output.error(error)
        return 2
    except LimpetError as error:
        _output.error(error)
        return failed
    except typer.Abort:
        return 130
    except BrokenPipeError:  # whoever reads us has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except ClickException as error:
        return _usage(error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("LIMPET_DEBUG"):
            raise
        _output.note(f"error: internal: {type(error).__name__}: {error}")
        _output.note("hint: LIMPET_DEBUG=1 shows where; this is a bug in limpet")
        return failed


def _usage(error: Any) -> int:
    """Print what is wrong with a command line."""
    if type(error).__name__ == "NoArgsIsHelpError":
        _output.note(error.format_message())
        return 2
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "limpet"
    _output.note(f"error: {error.format_message().rstrip('.')}")
    _output.note(f"hint: {where} --help")
    return 2


def main() -> None:
    """The console script `limpet`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")  # file names need not be UTF-8
    if "_LIMPET_COMPLETE" in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


if __name__ == "__main__":
    main()
