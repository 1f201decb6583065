"""The vaults of this host: each is opened once, written by one at a time, copied for a clone, and dropped with its
sandbox."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.threads import Feed, Workers
from limpet.vault import Vault

_THREADS = 4
_STREAMS = 256  # threads, made as they are needed: each may wait for a guest

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class OpenVault:
    """A vault. `lock`: for whoever changes it; `removing`: taken inside of that for removing anything; `checking`:
    around both, one check at a time. `readers`: those who read and for whom nothing is removed."""

    vault: Vault
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    removing: asyncio.Lock = field(default_factory=asyncio.Lock)
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)
    readers: int = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[Vault]:
        """Keep every generation for the length of the block."""
        self.readers += 1
        try:
            yield self.vault
        finally:
            self.readers -= 1


class VaultTable:
    """Vaults by sandbox id. `run` is for everything that reads or writes them: never on the event loop."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, asyncio.Task[OpenVault]] = {}
        self._workers, self._receivers = Workers(_THREADS, "vault"), Workers(_STREAMS, "sync")

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking work on a vault in a thread, to its end."""
        return await self._workers.run(work, *args, **kwargs)

    async def receive(self, work: Callable[[Iterator[bytes]], T], pieces: AsyncIterator[bytes]) -> T:
        """Run blocking work on what a guest sends, in a thread that waits for nobody else; to its end, which comes at
        once when this is cancelled."""
        feed = Feed(pieces)
        task = asyncio.ensure_future(self._receivers.run(work, iter(feed)))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            feed.give_up()
            await asyncio.wait([task])
            raise

    def ids(self) -> list[str]:
        """Of all sandboxes that have a vault."""
        if not self.directory.is_dir():
            return []
        return sorted(path.name for path in self.directory.iterdir() if not path.name.startswith("."))

    async def open(self, sandbox_id: str) -> OpenVault:
        """The vault of a sandbox, made when it has none."""
        known = self._open.get(sandbox_id)
        if known is None or (known.done() and (known.cancelled() or known.exception())):
            opening = self._opened(self.directory / sandbox_id)
            known = self._open[sandbox_id] = asyncio.create_task(opening, name=f"open the vault of {sandbox_id}")
        return await asyncio.shield(known)

    async def _opened(self, directory: Path) -> OpenVault:
        return OpenVault(await self.run(Vault.open, directory))

    async def find(self, sandbox_id: str) -> OpenVault | None:
        """The vault of a sandbox, None when it has none."""
        return await self.open(sandbox_id) if (self.directory / sandbox_id).is_dir() else None

    async def copy(self, source_id: str, target_id: str) -> None:
        """Let a clone begin with what its source's vault holds. It costs names, not bytes: the files never change."""
        source = await self.find(source_id)
        if source is None or source.vault.head is None or source.vault.damage is not None:
            return
        async with source.removing:
            crashpoint("vault.copy.before")
            await self.run(_copy, source.vault.directory, self.directory / target_id)
            crashpoint("vault.copy.after")

    def drop(self, sandbox_id: str) -> None:
        """Forget a vault with all that it holds. Its name goes at once, the files in the background."""
        self._open.pop(sandbox_id, None)
        path = self.directory / sandbox_id
        if not path.is_dir():
            return
        doomed = durable.staging(self.directory, f"rm-{sandbox_id}")
        crashpoint("vault.drop.before")
        durable.rename(path, doomed)
        durable.sync_directory(self.directory)
        crashpoint("vault.drop.after")
        self._workers.later(lambda: durable.erase(doomed))

    def sweep(self) -> None:
        """Delete what a crash left of a copy, or of a vault that was dropped."""
        durable.sweep(self.directory)


def _copy(source: Path, target: Path) -> None:
    """All files of a vault under names of their own; published by one rename."""
    staging = durable.staging(target.parent, target.name)
    try:
        _link(source, staging)
        durable.publish(staging, target)
    except BaseException:
        durable.erase(staging)
        raise


def _link(source: Path, target: Path) -> None:
    """HEAD first: a generation that is committed meanwhile is one too many in the copy, which removes it."""
    for entry in sorted(source.iterdir(), key=lambda entry: not entry.is_symlink()):
        if entry.name.startswith("."):  # being made
            continue
        if entry.is_symlink():
            durable.replace_symlink(target / entry.name, str(entry.readlink()))
        elif entry.is_dir():
            durable.mkdir(target / entry.name)
            _link(entry, target / entry.name)
        elif entry.is_file():
            durable.link(entry, target / entry.name)
