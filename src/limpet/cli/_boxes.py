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
    from limpet.models import RiskReport

T = TypeVar("T")
_AT_ONCE = 16
_SHOWN = 5  # paths of a risk that are named


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


def reasons_to_ask(client: Client, names: Sequence[str], *, purge: bool) -> builtins.list[str]:
    """What speaks against removing these, a line each: that one runs, and what only it has."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # a guest may take its time to look
        told = pool.map(lambda name: _reason_to_ask(client, name, purge=purge), names)
        return [reason for reason in told if reason is not None]


def _reason_to_ask(client: Client, name: str, *, purge: bool) -> str | None:
    try:
        state, risk = client.sandboxes.get(name).info.state.value, client.sandboxes.ref(name).risk()
    except LimpetError:
        return None  # what is wrong with it the removal will tell
    lost = _only_there(risk)
    if state in ("running", "paused", "starting"):
        return f"{name} is {state}" + (f", and has {lost}" if lost else "")
    if lost:
        return f"{name} has {lost}"
    return f"{name} and all that is kept of it will be gone" if purge else None


def _only_there(risk: RiskReport) -> str:
    """`2 commits that are not on the host, 1 stash, changed: a.py, b.py`, or nothing."""
    counted = [(risk.commits, "commit", "commits"), (risk.stashes, "stash", "stashes")]
    parts = [f"{count} {one if count == 1 else many}" for count, one, many in counted if count]
    if parts:
        parts[-1] += " that the host does not have"
    for word, paths in (("changed", risk.changed), ("untracked", risk.untracked)):
        if paths:
            more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
            parts.append(f"{word}: {', '.join(paths[:_SHOWN])}{more}")
    return "; ".join(parts)


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
