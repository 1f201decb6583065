"""One sync: what the guest is asked, in which order, and what it keeps until the host has it. The vault and the streams
are real, the guest is played."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from limpet import crashpoint, durable
from limpet.errors import Internal
from limpet.guest.volumes import NamedSnapshot, Snapshot, Volume
from limpet.services.generations import Sync
from limpet.services.host import Host
from limpet.vault import Generation
from limpet.vault.layout import Layout
from tests.unit import streams_kit as kit
from tests.unit.services_kit import host_in

Attributes = dict[str, bytes | int]


class PlayedGuest:
    """A guest with one file, /home/a, of which `text` is the content. `orders`: the snapshots that it was told to keep,
    each time, and the number of the newest generation on the host's disk then. `bases`: what it sent differences to."""

    def __init__(self, vault: Path) -> None:
        self.text, self.time = b"", 1
        self.snapshots: dict[str, tuple[Snapshot, bytes]] = {}
        self.orders: list[tuple[set[str], int]] = []
        self.bases: list[str | None] = []
        self._vault = Layout(vault)

    def write(self, text: bytes) -> None:
        self.text, self.time = text, self.time + 1

    async def state(self) -> list[Volume]:
        known = [snapshot for snapshot, _ in self.snapshots.values()]
        return [Volume(name="home", mount="/home", uuid=str(uuid.uuid4()), ctransid=self.time, snapshots=known)]

    async def snapshot(self, names: Sequence[str], token: str) -> dict[str, NamedSnapshot]:
        made = NamedSnapshot(name="home", token=token, uuid=str(uuid.uuid4()), ctransid=self.time)
        self.snapshots[token] = made, self.text
        return {"home": made}

    async def send(self, name: str, token: str, parent: str | None) -> AsyncIterator[bytes]:
        self.bases.append(parent)
        made, text = self.snapshots[token]
        own: Attributes = {"path": b"v", "uuid": uuid.UUID(made.uuid).bytes, "ctransid": made.ctransid}
        if parent is None:
            begin = [kit.command("subvol", **own), kit.mkfile(b"a")]
        else:
            base, _ = self.snapshots[parent]
            clone: Attributes = {"clone_uuid": uuid.UUID(base.uuid).bytes, "clone_ctransid": base.ctransid}
            begin = [kit.command("snapshot", **own, **clone)]
        changes = [kit.command("truncate", path=b"a", size=0), kit.write(b"a", 0, text)]
        yield b"".join([kit.HEADER, *begin, *changes, kit.END])

    async def forget(self, name: str, keep: Iterable[str]) -> list[str]:
        self.orders.append((kept := set(keep), self._vault.read_head()[0]))
        gone = [token for token in self.snapshots if token not in kept]
        for token in gone:
            del self.snapshots[token]
        return gone


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with host_in(tmp_path) as host:
        yield host


@pytest.fixture
def guest(host: Host) -> PlayedGuest:
    return PlayedGuest(host.paths.vault("sb_1"))


def synced(host: Host, guest: PlayedGuest) -> Generation:
    """The generation that a sync makes; raises what it fails with."""

    async def run() -> Generation | None:
        opened = await host.vaults.open("sb_1")
        played: Any = guest
        sync = Sync(played, host.vaults, opened.vault)
        await sync.look(None, {})
        return await sync.take(lambda: None)

    generation = asyncio.run(run())
    assert generation is not None
    return generation


@contextlib.contextmanager
def failing(point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The block fails at this crash point."""
    (orders := tmp_path / "orders").write_text(f"{point}=raise")
    with monkeypatch.context() as patch, pytest.raises(Internal, match="crash point"):
        patch.setattr(crashpoint, "_orders", str(orders))
        yield


def content(generation: Generation) -> bytes:
    tree = generation.tree("home")
    node = tree.lookup(b"a")
    assert node is not None
    return b"".join(tree.read(node))


def test_only_the_first_sync_sends_everything(host: Host, guest: PlayedGuest) -> None:
    """D4: afterwards the guest sends the difference to the snapshot that the newest generation was made from."""
    tokens: list[str | None] = [None]
    for text in (b"one", b"two two", b"three"):
        guest.write(text)
        generation = synced(host, guest)
        assert content(generation) == text
        tokens.append(generation.volumes["home"].token)
    assert guest.bases == tokens[:-1]


def test_a_guest_forgets_a_snapshot_only_when_the_host_has_a_newer_one(host: Host, guest: PlayedGuest) -> None:
    """D8: at every moment the snapshot of the generation that the disk has is kept in the guest."""
    expected = []
    for text in (b"one", b"two", b"three"):
        guest.write(text)
        generation = synced(host, guest)
        expected.append(({generation.volumes["home"].token}, generation.number))
    assert guest.orders == expected


@pytest.mark.parametrize("point", ["sync.snapshot.after", "sync.send.before", "sync.commit.before", "vault.name.after"])
def test_after_a_sync_that_failed_the_next_one_is_a_difference(
    host: Host, guest: PlayedGuest, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D4, D8: nothing of the failed one stays in the guest, and what the newest generation was made from does."""
    guest.write(b"one")
    first = synced(host, guest)
    guest.write(b"two")
    with failing(point, tmp_path, monkeypatch):
        synced(host, guest)
    assert list(guest.snapshots) == [first.volumes["home"].token]
    second = synced(host, guest)
    assert (second.number, content(second), content(first)) == (2, b"two", b"one")
    assert guest.bases[-1] == first.volumes["home"].token


def test_a_guest_that_went_back_in_time_keeps_what_the_difference_is_to(
    host: Host, guest: PlayedGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D4: an older generation's snapshot is needed until there is a newer one, though a sync fails."""
    guest.write(b"early")
    early = synced(host, guest)
    disk = dict(guest.snapshots)
    guest.write(b"late")
    late = synced(host, guest)
    guest.snapshots = disk
    guest.write(b"another")
    with failing("sync.commit.before", tmp_path, monkeypatch):
        synced(host, guest)
    another = synced(host, guest)
    assert guest.bases[-2:] == [early.volumes["home"].token] * 2
    assert [content(generation) for generation in (early, late, another)] == [b"early", b"late", b"another"]


def test_a_generation_that_a_crash_may_lose_is_never_acknowledged(
    host: Host, guest: PlayedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3: after the last fsync failed nothing but another commit can be, though nothing changed; the guest keeps what
    either generation was made from."""
    guest.write(b"one")
    first = synced(host, guest)
    guest.write(b"two")
    real = durable.sync_directory

    def fail(path: Path) -> None:
        if path == host.paths.vault("sb_1"):
            raise OSError(errno.EIO, "input/output error")
        real(path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="input/output"):
        patch.setattr(durable, "sync_directory", fail)
        synced(host, guest)
    assert first.volumes["home"].token in guest.snapshots and len(guest.snapshots) == 2

    async def look() -> tuple[bool, Generation | None]:
        opened = await host.vaults.open("sb_1")
        played: Any = guest
        sync = Sync(played, host.vaults, opened.vault)
        await sync.look(frozenset(), {})
        needed = sync.needed
        return needed, await sync.take(lambda: None)

    needed, third = asyncio.run(look())
    assert needed and third is not None and (third.number, content(third)) == (3, b"two")
    assert asyncio.run(host.vaults.open("sb_1")).vault.settled
