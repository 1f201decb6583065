"""The SDK's syncs, vaults, payloads and trash against the real API over a stand-in guest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from limpet import AsyncClient, Client
from limpet.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from limpet.models import State
from tests.contract.local_vaults import KEPT, ODD, instant

from .client_kit import StandIn, stand_in


@pytest.fixture(scope="module")
def daemon() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def client(daemon: StandIn) -> Iterator[Client]:
    with Client(daemon.home, autostart=False) as client:
        yield client


def test_sync_and_status(client: Client) -> None:
    """D4"""
    box = client.sandboxes.ref("web")
    assert box.sync().generation == 4
    assert (box.sync_status().pending_files, box.sync_status(pending=False).pending_files) == (3, None)
    assert [one.sandbox for one in client.sync_status()] == ["web"]


def test_generations_are_listed_read_and_compared(client: Client) -> None:
    """D3"""
    vault = client.sandboxes.ref("web").vault
    assert [one.generation for one in vault.history()] == [*KEPT]
    assert [one.change for one in vault.versions(ODD)] == ["added", "removed"]
    assert vault.list("/home/user", at=3).entries[1].path == ODD
    assert vault.read("/home/user/t.db", at=1) == b"one\n"
    assert vault.read("/home/user/t.db", at=instant(2) + timedelta(seconds=30)) == b"one\n"
    assert vault.read("/workspace/a@b") == b"\x00\xff"
    with vault.stream("/workspace/endless", at="4") as chunks:
        assert sum(map(len, chunks)) == 300_000
    assert [(one.change, one.path) for one in vault.diff(1, 3)] == [("added", ODD), ("changed", "/home/user/t.db")]
    with pytest.raises(NotFound) as caught:
        vault.read("/home/user/t.db", at=2)
    assert caught.value.hint == "the nearest kept ones: 3 and 4"


def test_damaged_file_is_an_error_and_never_short(client: Client, daemon: StandIn) -> None:
    """D6"""
    daemon.add("broken")
    with pytest.raises(Unavailable):
        client.vaults.of("broken").read("/workspace/endless")
    assert [one.ok for one in client.vaults.check()] == [True, False]
    assert client.vaults.repair("broken")[0].repaired


def test_restore_to_the_host_from_a_sandbox_that_is_gone(client: Client, daemon: StandIn, tmp_path: Path) -> None:
    """D7"""
    result = client.vaults.of("gone").restore("/home", at=3, to=tmp_path / "new")
    assert (result.generation, result.to) == (3, str(tmp_path / "new"))
    assert daemon.vaults.asked[-1].path == "/home"
    with pytest.raises(FailedPrecondition):
        client.vaults.of("gone").restore()
    assert client.sandboxes.ref("web").vault.restore("/home/user/t.db").saved == 5
    assert client.vaults.gc().removed == ["web@2"]
    assert [one.state for one in client.vaults.usage()] == ["trashed", "running"]


def test_payloads(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAY-1"""
    monkeypatch.chdir(tmp_path)
    payloads = client.sandboxes.ref("web").payloads
    made = payloads.add("data", "/home/user/data", interval=2.5)
    assert (made.payload.host_dir, made.payload.interval) == (str(tmp_path / "data"), 2.5)
    assert payloads.list() == list(client.payloads()) == [made]
    edited = payloads.add(tmp_path / "edited", "/e")
    assert (edited.state, payloads.confirm(edited.payload.id[:10]).state) == ("drifted", "ok")
    for one in (made, edited):
        payloads.remove(one.payload.id)
    assert payloads.list() == []


def test_create_sends_payloads_with_absolute_host_directories(
    client: Client, daemon: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PAY-1"""
    monkeypatch.chdir(tmp_path)
    client.sandboxes.create("with", payloads=[("a", "/a"), (tmp_path / "b", "/b", 5.0)])
    sent = [(one.host_dir, one.guest_dir, one.interval) for one in daemon.boxes.created[-1].payloads]
    assert sent == [(str(tmp_path / "a"), "/a", 1.0), (str(tmp_path / "b"), "/b", 5.0)]


def test_removed_sandbox_is_taken_back(client: Client, daemon: StandIn) -> None:
    """D7"""
    box = client.sandboxes.create("tmp", start=False)
    assert box.risk().known is False
    box.remove()
    assert [entry.name for entry in client.trash.list()] == ["tmp"]
    daemon.add("tmp")
    with pytest.raises(AlreadyExists):
        client.trash.undelete("tmp")
    back = client.trash.undelete("tmp", as_name="tmp2")
    assert (back.name, back.info.state, back.info.id) == ("tmp2", State.STOPPED, box.info.id)
    back.remove(purge=True)
    assert client.trash.list() == []
    with pytest.raises(NotFound):
        client.trash.empty("tmp2")
    assert client.trash.empty().removed == []


def test_asynchronous_client_has_the_same_surface(daemon: StandIn) -> None:
    async def all_of_it() -> None:
        async with AsyncClient(daemon.home, autostart=False) as client:
            box = client.sandboxes.ref("web")
            assert (await box.sync()).generation == 4
            assert [one.path async for one in box.vault.diff(1, 3)] == [ODD, "/home/user/t.db"]
            async with box.vault.stream("/home/user/t.db", at=1) as chunks:
                assert [chunk async for chunk in chunks] == [b"one\n"]
            assert await client.vaults.check("web")
            assert await client.trash.list() == []
            assert await client.payloads() == []

    asyncio.run(all_of_it())
