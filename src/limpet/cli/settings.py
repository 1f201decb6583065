"""Changing a sandbox that exists: set, rename, ports."""

from __future__ import annotations

from typing import Annotated

import typer

from limpet.cli import _boxes, _options, _output, _parse

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Changed = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", metavar="K=V|K-", help="Set or remove a variable.",
                 callback=_options.value_of(_parse.settings)),
]  # fmt: skip
Relabelled = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="K=V|K-", help="Set or remove a label.",
                 callback=_options.value_of(_parse.settings)),
]  # fmt: skip


EveryExec = Annotated[
    bool | None,
    typer.Option("--every-exec/--no-every-exec", help="Keep a disk checkpoint before each command of run and exec."),
]


@app.command("set")
def set_(
    names: _options.Names = None,
    cpus: _options.Cpus = None,
    memory: _options.Memory = None,
    env: Changed = None,
    label: Relabelled = None,
    ttl: _options.Ttl = None,
    idle: _options.Idle = None,
    idle_suspend: _options.IdleSuspend = None,
    every_exec: EveryExec = None,
    user: _options.DefaultUser = None,
    workdir: _options.DefaultCwd = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be in force, and when.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> int:
    """Change sandboxes. Says what is in force now and what at the next start.

    A time of 0 removes a time-out; --user '' and --workdir '' go back to what the image says.
    """
    from limpet.client import Client
    from limpet.models import SetResult

    answers: list[SetResult] = []

    def change(name: str) -> SetResult:
        return client.sandboxes.ref(name).set(
            vcpus=cpus, memory_mib=_parse.memory_mib(memory) if memory else None,
            env=_parse.settings(env) if env else None, labels=_parse.settings(label) if label else None,
            ttl=_parse.seconds(ttl) if ttl else None, idle_timeout=_parse.seconds(idle) if idle else None,
            idle_suspend=_parse.seconds(idle_suspend) if idle_suspend else None, every_exec=every_exec, user=user,
            workdir=workdir, dry_run=dry_run,
        )  # fmt: skip

    def report(name: str, result: SetResult) -> None:
        answers.append(result)
        if json:
            return
        print(name)
        if not quiet:
            now = "would be in force" if dry_run else "in force"
            for keys, when in ((result.applied, now), (result.at_next_start, "at the next start")):
                if keys:
                    _output.note(f"{name}: {', '.join(keys)}: {when}")

    with Client() as client:
        code = _boxes.each(_boxes.chosen(client, names), change, report)
    if json:
        _output.emit(answers if len(answers) != 1 else answers[0])
    return code


@app.command()
def rename(name: _options.Name, new: Annotated[str, typer.Argument(metavar="NEW", show_default=False)]) -> int:
    """Give a sandbox another name, running or not."""
    from limpet.client import Client

    with Client() as client:
        box = client.sandboxes.ref(name)
        box.rename(new)
        print(box.name)
    return 0


@app.command()
def ports(
    name: _options.OptionalName = None,
    publish: _options.Publish = None,
    remove: Annotated[list[int] | None, typer.Option("--remove", metavar="H", help="Withdraw this host port.")] = None,
    json: _options.Json = False,
) -> int:
    """List published ports, after publishing or withdrawing some. They are reachable on 127.0.0.1 only."""
    from limpet.client import Client

    with Client() as client:
        box = _boxes.one(client, name)
        for port in remove or ():
            box.ports.remove(port)
        for host, guest in _parse.ports(publish or []):
            box.ports.publish(guest, host)
        found = box.ports.list()
    if json:
        _output.emit(found)
    else:
        _output.table(("HOST", "GUEST"), [(f"127.0.0.1:{port.host}", port.guest) for port in found])
    return 0
