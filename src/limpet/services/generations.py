"""One sync: what a guest wrote becomes the next generation of its vault.

    look ──► snapshot ──► send every volume that changed ──► commit ──► the guest forgets its older snapshots

Until the commit nothing in the vault has changed. A crash after it leaves snapshots in the guest, which the next sync
removes. What is sent is the difference to the newest generation whose snapshot the guest still has: as a rule the last
one, an older one when the guest's disks went back in time, and without any everything.

Each volume is sent as it was at one instant; the snapshots of one sync are taken within milliseconds of each other.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from limpet import durable, log
from limpet.crashpoint import crashpoint
from limpet.errors import DeadlineExceeded, LimpetError, Unavailable
from limpet.guest.volumes import Volume, Volumes
from limpet.services.vaulttable import VaultTable
from limpet.vault import Draft, Generation, Vault, applying

PAYLOAD = "payload-"  # how the volumes of payloads are called
_ROOM = 512 << 20  # bytes that a vault leaves to everything else on its disk
_LOOK_AFTER = 16 << 20  # bytes of a stream after which that is looked at again
_GRACE_S = 120.0  # for a stream before it is held to
_LEAST_RATE = 4096  # bytes a second: a guest that trickles is given up

_log = log.get("sync")


@dataclass(frozen=True)
class Stale:
    """A volume that the host is behind with. `base`: what the guest can send the difference to, which it has as the
    snapshot `parent`; None: it has to send everything."""

    name: str
    mount: bytes
    base: Generation | None
    parent: str | None


class Sync:
    """The steps of one sync, in their order. The caller holds the vault's lock. `whole`: no difference is asked for,
    since one did not fit."""

    def __init__(self, guest: Volumes, table: VaultTable, vault: Vault, *, whole: bool = False) -> None:
        self._guest, self._table, self._vault, self._whole = guest, table, vault, whole
        self._token = secrets.token_hex(8)
        self._uuids: dict[str, str] = {}
        self._gone: list[str] = []
        self._taken = datetime.now(UTC)
        self.stale: list[Stale] = []
        self.clean: dict[str, int] = {}  # up to which transaction of each volume the host has it when this succeeds

    async def look(self, named: Set[str] | None, clean: Mapping[str, int]) -> None:
        """Find what the host is behind with: `named`, and what changed after the transactions in `clean`, by what the
        guest says; with None everything may have."""
        volumes = await self._guest.state()
        self._gone = self._missing(volumes)
        for volume in volumes:
            snapshots = {known.token: known.uuid for known in volume.snapshots}
            base = self._vault.newest_with(volume.name, snapshots) if not self._whole else None
            token = base.volumes[volume.name].token if base is not None else None
            since = clean.get(volume.name)
            if since is None and token is not None:
                since = next(known.ctransid for known in volume.snapshots if known.token == token)
            self.clean[volume.name] = since if since is not None else 0
            behind = since is None or volume.ctransid > since or not self._is_newest(volume.name, token)
            if (mount := self._mount(volume)) is None:
                self.clean[volume.name] = volume.ctransid
            elif named is None or volume.name in named or behind:
                self.stale.append(Stale(volume.name, mount, base, token))

    def _mount(self, volume: Volume) -> bytes | None:
        """Where its files are in the guest; None for one that never was mounted, which holds nothing."""
        if volume.mount is not None:
            if posixpath.normpath(volume.mount) != volume.mount:
                raise Unavailable("the guest agent answered nonsense: a volume at no plain path")
            return os.fsencode(volume.mount)
        known = self._vault.head.volumes.get(volume.name) if self._vault.head is not None else None
        return known.mount if known is not None else None

    def _missing(self, volumes: list[Volume]) -> list[str]:
        """Payloads that were taken away. Of what else is not there any more, the last generation's stays."""
        there = {volume.name for volume in volumes}
        known = self._vault.head.volumes if self._vault.head is not None else {}
        return [name for name in known if name not in there and name.startswith(PAYLOAD)]

    def _is_newest(self, name: str, token: str | None) -> bool:
        """Whether the newest generation's tree of a volume is that of this snapshot."""
        known = self._vault.head.volumes.get(name) if self._vault.head is not None else None
        return known is not None and known.token == token

    @property
    def needed(self) -> bool:
        """Whether there is, or may be, anything that the host does not have."""
        return bool(self.stale or self._gone or not self._vault.settled)

    async def take(self, held: Callable[[], None]) -> Generation | None:
        """Bring what is stale to the vault; None when nothing differed after all. `held` is called when the snapshots
        are there. When this fails the vault is as before."""
        draft = await self._table.run(self._begin)
        try:
            await self._snapshot()
            held()
            generation = await self._collect(draft)
        except BaseException as error:
            await self._table.run(draft.abandon)
            if isinstance(error, Exception):  # else somebody wants this to end at once
                await self._forget()
            raise
        await self._forget()
        return generation

    def _begin(self) -> Draft:
        durable.require_space(self._vault.directory, _ROOM, "a generation")
        return self._vault.begin()

    async def _snapshot(self) -> None:
        """Hold the stale volumes as they are now."""
        crashpoint("sync.snapshot.before")
        self._taken = datetime.now(UTC)
        names = [volume.name for volume in self.stale]
        for name, made in (await self._guest.snapshot(names, self._token)).items() if names else ():
            self._uuids[name] = made.uuid
            self.clean[name] = made.ctransid
        if self._uuids.keys() != set(names):
            raise Unavailable("the guest agent answered nonsense: snapshots of other volumes")
        crashpoint("sync.snapshot.after")

    async def _collect(self, draft: Draft) -> Generation | None:
        """Edit the draft by what the guest sends, and commit it."""
        changed = [volume for volume in self.stale if await self._receive(draft, volume)]
        if not changed and not self._gone and self._vault.settled:
            await self._table.run(draft.abandon)
            return None
        for name in self._gone:
            draft.drop(name)
        snapshots = {volume.name: (self._token, self._uuids[volume.name]) for volume in self.stale}
        return await self._table.run(_commit, draft, self._when(), snapshots)

    async def _receive(self, draft: Draft, volume: Stale) -> bool:
        """Edit one volume by what the guest sends; whether that was anything."""
        editor = await self._table.run(draft.volume, volume.name, volume.mount, base=volume.base)
        uuid, parent = self._uuids[volume.name], self._parent_uuid(volume)

        def edit(pieces: Iterator[bytes]) -> int:
            return applying.receive(editor, pieces, uuid=uuid, parent=parent)

        crashpoint("sync.send.before")
        async with contextlib.aclosing(self._guest.send(volume.name, self._token, volume.parent)) as stream:
            commands = await self._table.receive(edit, self._bounded(stream))
        return commands > 1 or volume.base is None or not self._is_newest(volume.name, volume.parent)

    def _parent_uuid(self, volume: Stale) -> str | None:
        return volume.base.volumes[volume.name].uuid if volume.base is not None else None

    def _when(self) -> datetime:
        """The time of the snapshots; never before that of an earlier generation, however the host's clock jumped."""
        head = self._vault.head
        return self._taken if head is None else max(self._taken, head.time + timedelta(microseconds=1))

    async def _bounded(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same; raises DeadlineExceeded for a stream that comes so slowly that it will never end, and
        InsufficientSpace while the host still has some."""
        began, received, looked = time.monotonic(), 0, 0
        async for piece in stream:
            received += len(piece)
            if received < (time.monotonic() - began - _GRACE_S) * _LEAST_RATE:
                raise DeadlineExceeded(f"the guest sent {received} bytes in {time.monotonic() - began:.0f} s")
            if received - looked > _LOOK_AFTER:
                looked = received
                durable.require_space(self._vault.directory, _ROOM, "a generation")
            yield piece

    async def _forget(self) -> None:
        """Let the guest remove the snapshots that are of no use any more. That it does not is no failure of the sync:
        the next one asks again."""
        head = self._vault.head
        try:
            crashpoint("sync.forget.before")
            for volume in self.stale:
                known = head.volumes.get(volume.name) if head is not None else None
                keep = {known.token if known is not None else None}
                if self._token not in keep or not self._vault.settled:  # it failed: the next difference may be to that
                    keep.add(volume.parent)
                await self._guest.forget(volume.name, [token for token in keep if token])
            crashpoint("sync.forget.after")
        except LimpetError as error:
            _log.warning("snapshots left behind", reason=error.message)

    async def count(self) -> tuple[int, int]:
        """How many files the stale volumes would change, and how many bytes of them, without sending those."""
        if not self.stale:
            return 0, 0
        await self._snapshot()
        try:
            counts = [await self._count(volume) for volume in self.stale]
        finally:
            await self._forget()
        return sum(files for files, _ in counts), sum(size for _, size in counts)

    async def _count(self, volume: Stale) -> tuple[int, int]:
        stream = self._guest.send(volume.name, self._token, volume.parent, data=False)
        async with contextlib.aclosing(stream):
            return await self._table.receive(applying.measure, stream)


def _commit(draft: Draft, when: datetime, snapshots: Mapping[str, tuple[str, str]]) -> Generation:
    crashpoint("sync.commit.before")
    generation = draft.commit(when, snapshots)
    crashpoint("sync.commit.after")
    return generation
