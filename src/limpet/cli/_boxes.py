"""Which sandboxes a command line means, and one thing done to many of them."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from limpet.cli import _output
from limpet.errors import BadRequest, LimpetError

if TYPE_CHECKING:
    from limpet.client import Client, Sandbox

T = TypeVar("T")
_AT_ONCE = 16


def one(client: Client, name: str | None) -> Sandbox:
    """The named sandbox, else the one of this directory."""
    return client.sandboxes.ref(name) if name else client.sandboxes.find(Path.cwd())


def chosen(client: Client, names: Sequence[str] | None, everything: bool = False) -> builtins.list[str]:
    """The names, each once, in the order given; all there are with `--all`."""
    if everything:
        if names:
            raise BadRequest("give names or --all, not both")
        return [box.name for box in client.sandboxes.list()]
    if not names:
        raise BadRequest("no sandbox named", hint="give a name; limpet ls lists them")
    return list(dict.fromkeys(names))


def each(names: Sequence[str], action: Callable[[str], T], report: Callable[[str, T], None]) -> int:
    """Do it to all at once and report in the order given. A failure stops none of the others; the exit code is 1 when
    there was one."""
    failed = False
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = [(name, pool.submit(action, name)) for name in names]
        for name, future in futures:
            try:
                report(name, future.result())
            except LimpetError as error:
                failed = True
                _output.error(error, f"{name}: " if len(names) > 1 else "")
    return 1 if failed else 0
