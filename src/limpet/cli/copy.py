"""cp: files and directories between host and sandbox, as `docker cp` has it; `-` is a tar on stdin or stdout."""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from limpet.cli import _options, _output, _parse, _terminal
from limpet.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from limpet.client import Client, Sandbox

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def cp(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="PATH, NAME:PATH or -", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="PATH, NAME:PATH or -", show_default=False)],
    user: _options.User = None,
    quiet: _options.Quiet = False,
) -> int:
    """Copy between host and sandbox: HOST NAME:PATH or NAME:PATH HOST; directories with all that is in them.

    Into an existing directory the copy gets the name of its source; `DIR/.` copies what is in DIR.
    """
    from limpet.client import Client

    here, there = _parse.place(source), _parse.place(target)
    if (here.sandbox is None) == (there.sandbox is None):
        raise BadRequest("one side must be in a sandbox, the other on the host", hint="limpet cp FILE NAME:PATH")
    with Client() as client:
        if there.sandbox is not None:
            done: str | None = _up(_box(client, there.sandbox), here.path, there.path, user)
        else:
            assert here.sandbox is not None
            done = _down(_box(client, here.sandbox), here.path, there.path)
    if done and not quiet:
        _output.note(done)
    return 0


def _box(client: Client, name: str) -> Sandbox:
    return client.sandboxes.ref(name)


def _is_directory(box: Sandbox, path: str) -> bool:
    """Whether it leads to a directory of the guest, through a symbolic link too."""
    try:
        info = box.files.stat(path)
        return info.type == "directory" or (info.type == "symlink" and _is_directory(box, path + "/."))
    except NotFound:
        return False


def _up(box: Sandbox, source: str, target: str, user: str | None) -> str:
    """Host to guest."""
    if source == "-":
        told = box.archive.put(target, _stdin(), user=user)
        return f"{told.files} files, {_output.size(told.bytes)}"
    local = Path(source)
    if not local.exists():
        raise NotFound(f"no such file: {source}")
    contents = source.endswith("/.") or source == "."
    if not contents and (target.endswith("/") or _is_directory(box, target)):
        target = posixpath.join(target, local.resolve().name)
    if local.is_dir():
        told = box.archive.upload(local, target, user=user)
        return f"{told.files} files, {_output.size(told.bytes)}"
    return _output.size(box.files.upload(local, target, user=user).size)


def _stdin() -> Iterator[bytes]:
    while data := sys.stdin.buffer.read(1 << 20):
        yield data


def _down(box: Sandbox, source: str, target: str) -> str | None:
    """Guest to host."""
    if target == "-":
        sys.stdout.flush()
        with box.archive.get(source) as chunks:
            for chunk in chunks:
                _terminal.write_all(1, chunk)
        return None
    local, name = Path(target), posixpath.basename(posixpath.normpath(source))
    if not source.endswith("/.") and (target.endswith("/") or local.is_dir()):
        local = local / name
    if not local.parent.is_dir():
        raise NotFound(f"no such directory: {local.parent}")
    try:
        if _is_directory(box, source):
            return f"{box.archive.download(source, local)} entries"
        box.files.download(source, local)
    except OSError as error:
        raise BadRequest(f"cannot write {local}: {error.strerror}") from None
    return _output.size(local.stat().st_size)
