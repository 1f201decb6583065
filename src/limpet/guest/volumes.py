"""The volumes of a guest: what changed, snapshots of it, and the stream that says how one comes about."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

from limpet.guest.agent import Agent
from limpet.guest.answers import given_up, valid
from limpet.guest.streams import Data, nonsense

Name = Annotated[str, StringConstraints(pattern="^(home|workspace|payload-[0-9a-f]{8})$")]
Token = Annotated[str, StringConstraints(pattern="^[a-z0-9-]{1,64}$")]
Uuid = Annotated[str, StringConstraints(pattern="^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
Transid = Annotated[int, Field(ge=0, lt=1 << 64)]

_MOST = 256  # volumes of a sandbox
_MOST_SNAPSHOTS = 256  # of a volume, in one answer
_WORK = 120.0  # seconds for what waits for the guest's disk
_STREAM = 300.0  # seconds that the kernel may look for differences without finding one


class Snapshot(BaseModel):
    """A read-only snapshot. `ctransid`: the last transaction that is in it; `uuid`: its subvolume's."""

    token: Token
    uuid: Uuid
    ctransid: Transid


class NamedSnapshot(Snapshot):
    """A snapshot, and of which volume."""

    name: Name


class Volume(BaseModel):
    """A volume as it is now. `mount`: None when it is mounted nowhere. A newer `ctransid` than a snapshot's means that
    something has changed since; buffered writes to an existing file show within 2 s."""

    name: Name
    mount: Annotated[str, StringConstraints(pattern="^/", max_length=4096)] | None
    uuid: Uuid
    ctransid: Transid
    snapshots: list[Snapshot] = Field(max_length=_MOST_SNAPSHOTS)


class _Taken(BaseModel):
    snapshots: list[NamedSnapshot] = Field(max_length=_MOST)


class _Dirty(BaseModel):
    dirty: list[Name] = Field(min_length=1, max_length=_MOST)


class _Forgotten(BaseModel):
    removed: list[Token] = Field(max_length=_MOST_SNAPSHOTS)


class _Created(BaseModel):
    created: bool


class _Removed(BaseModel):
    removed: bool


class Volumes:
    """The operations of one guest. All raise what those of `Agent` do."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def state(self) -> list[Volume]:
        """All volumes with their newest snapshots."""
        found: list[Volume] = []
        stream = await self._agent.opened("vol.state")
        async with given_up(stream):
            while (item := await stream.receive()) is not None:
                if isinstance(item, Data) or len(found) >= _MOST:
                    raise nonsense("no list of volumes")
                found.append(valid(Volume, item.body, stream))
        return found

    async def watch(self, since: Mapping[str, int], timeout: float | None = None) -> list[str]:
        """Wait until one of the volumes changes after its transaction; which ones did. Empty after `timeout` seconds
        without a change. A guest has one watch at a time: a new one ends the one before with Busy."""
        stream = await self._agent.opened("vol.watch", since=dict(since))
        stream.patience = None
        with contextlib.suppress(TimeoutError):
            async with given_up(stream), asyncio.timeout(timeout):
                return valid(_Dirty, await stream.message(), stream).dirty
        return []

    async def snapshot(self, names: Sequence[str], token: str) -> dict[str, NamedSnapshot]:
        """Snapshots of these volumes, milliseconds apart; all of them or, with an error, none. Raises NotFound,
        AlreadyExists."""
        taken = await self._agent.ask(_Taken, "vol.snapshot", _WORK, volumes=list(names), token=token)
        return {snapshot.name: snapshot for snapshot in taken.snapshots}

    async def send(
        self, name: str, token: str, parent: str | None = None, *, data: bool = True
    ) -> AsyncGenerator[bytes, None]:
        """The send stream (format 1 of linux/fs/btrfs/send.h) that makes this snapshot out of the one called `parent`,
        or out of nothing; as fast as it is taken. `data=False`: with what changed, without the bytes. Leaving early
        ends it in the guest too. Raises NotFound."""
        stream = await self._agent.opened("vol.send", name=name, token=token, parent=parent, data=data)
        stream.patience = _STREAM
        async with given_up(stream):
            async for piece in self._agent.pieces(stream):
                yield piece

    async def forget(self, name: str, keep: Iterable[str] = ()) -> list[str]:
        """Delete all snapshots of a volume but these; the tokens of those that went."""
        return (await self._agent.ask(_Forgotten, "vol.forget", _WORK, name=name, keep=list(keep))).removed

    async def create(self, name: str, mount: str, *, uid: int = 0, gid: int = 0) -> bool:
        """See that the volume of a payload is there, mounted at `mount` (made if need be); whether it is new. The
        owner is a new volume's. Raises FailedPrecondition when `mount` is not empty or the volume is elsewhere."""
        answer = await self._agent.ask(_Created, "vol.create", _WORK, name=name, mount=mount, uid=uid, gid=gid)
        return answer.created

    async def remove(self, name: str) -> bool:
        """Unmount the volume of a payload and delete it with its snapshots; whether it was there. Raises
        FailedPrecondition, naming the processes that use it."""
        return (await self._agent.ask(_Removed, "vol.remove", _WORK, name=name)).removed
