"""Changing a sandbox that exists: set, rename, ports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limpet.cli import _boxes, _options, _output, _parse
from limpet.errors import LimpetError

if TYPE_CHECKING:
    from limpet.client import Sandbox
    from limpet.models import ContainerPort, PortMapping

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_PORT = ("host", "guest", "container", "image", "port", "protocol")  # what `ports --json` tells of one

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
    """List published ports, after publishing or withdrawing some. They are reachable on 127.0.0.1 only.

    Those that containers publish in the guest are listed, too; without a HOST they can be published with -p.
    """
    from limpet.client import Client

    with Client() as client:
        box = _boxes.one(client, name)
        for port in remove or ():
            box.ports.remove(port)
        for host, guest in _parse.ports(publish or []):
            box.ports.publish(guest, host)
        found = _joined(box.ports.list(), _of_containers(box))
    if json:
        _output.emit(found)
    else:
        width = 3 if any(one["container"] for one in found) else 2  # most sandboxes have no containers
        _output.table(("HOST", "GUEST", "CONTAINER")[:width], [_row(one)[:width] for one in found])
    return 0


def _of_containers(box: Sandbox) -> Sequence[ContainerPort]:
    try:
        return box.runtime.ports()
    except LimpetError as error:  # what is published on this host is worth knowing all the same
        _output.warn(f"the ports of containers are not known: {error.message}", error.hint)
        return []


def _joined(published: Sequence[PortMapping], containers: Sequence[ContainerPort]) -> list[dict[str, Any]]:
    """Each published port with the container behind it, then what containers publish and this host does not."""
    tcp = {one.guest: _output.data_of(one) for one in containers if one.protocol == "tcp"}
    here = {one.guest for one in published}
    rows = [tcp.get(one.guest, {}) | _output.data_of(one) for one in published]
    rows += [_output.data_of(one) for one in containers if one.protocol != "tcp" or one.guest not in here]
    return [{key: row.get(key) for key in _PORT} for row in rows]


def _row(one: dict[str, Any]) -> tuple[object, ...]:
    host = None if one["host"] is None else f"127.0.0.1:{one['host']}"
    guest = one["guest"] if one["protocol"] in (None, "tcp") else f"{one['guest']}/{one['protocol']}"
    return host, guest, one["container"] and f"{one['container']} ({one['image']}) {one['port']}/{one['protocol']}"
