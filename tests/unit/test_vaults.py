"""Vaults of a host: opened once, copied for a clone, dropped with the sandbox; and the verbs on them, without a VM."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from limpet import durable
from limpet.errors import BadRequest, Busy, FailedPrecondition, NotFound
from limpet.models import Operation, State, VaultRestoreRequest
from limpet.services.host import Host
from limpet.services.syncing import Syncing
from limpet.services.vaults import Vaults
from limpet.services.vaultview import guest_path
from limpet.store import SandboxRecord
from limpet.vault import Vault
from tests.unit import vault_kit
from tests.unit.services_kit import add_sandbox, host_in
from tests.unit.streams_kit import full, incremental, mkdir, mkfile, write


@dataclass
class World:
    host: Host
    record: SandboxRecord
    vaults: Vaults

    @property
    def directory(self) -> Path:
        return self.host.paths.vault(self.record.id)

    def do(self, work: Callable[[], Coroutine[Any, Any, Operation]]) -> dict[str, Any]:
        """The result of an operation; raises what it failed with."""

        async def run() -> Operation:
            return await self.host.operations.wait((await work()).id)

        done = asyncio.run(run())
        assert done.state == "done", done.error
        return done.result or {}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A stopped sandbox with two generations of /home: `a` was changed, `d/b` was not; and an empty /workspace."""
    with host_in(tmp_path / "home") as host:
        record = add_sandbox(host)
        vault = Vault.open(host.paths.vault(record.id))
        vault_kit.take(vault, full(mkfile(b"a"), write(b"a", 0, b"one"), mkdir(b"d"), mkfile(b"d/b")))
        vault_kit.take(vault, incremental(write(b"a", 0, b"two")))
        draft = vault.begin()
        draft.volume("workspace", b"/workspace", base=None)
        draft.commit(vault_kit.NOON.replace(hour=13), {"workspace": ("w", "0" * 36)})
        yield World(host, record, Vaults(host, Syncing(host)))


def test_history_versions_and_listings_need_no_vm(world: World) -> None:
    """D3: by name, by id, and for what is in the trash; `/` lists what leads to the volumes."""

    async def look(name: str) -> None:
        assert [info.generation for info in await world.vaults.history(name)] == [1, 2, 3]
        assert [version.generation for version in await world.vaults.versions(name, "/home/a")] == [1, 2]
        top = await world.vaults.listing(name, "/", None)
        assert [entry.path for entry in top.entries] == ["/home", "/workspace"] and top.generation == 3
        home = await world.vaults.listing(name, "/home/", "1")
        assert [entry.path for entry in home.entries] == ["/home/a", "/home/d"]
        file = await world.vaults.read(name, "/home/a", "1")
        assert b"".join([piece async for piece in file.chunks]) == b"one"
        changes = [change async for change in await world.vaults.diff(name, "1", "2")]
        assert [(change.change, change.path) for change in changes] == [("changed", "/home/a")]

    asyncio.run(look("box"))
    asyncio.run(look(world.record.id))
    removed = {"name": "box", "removed_at": vault_kit.NOON.isoformat(), "state": "stopped"}
    world.host.records.update(world.record.id, name="+trash-x", state=State.TRASHED, trash=removed)
    asyncio.run(look("box"))


def test_a_vault_whose_sandbox_is_gone_from_the_records_can_still_be_read(world: World, tmp_path: Path) -> None:
    """D3: by its id; doctor names it, and nothing deletes it."""
    world.host.records.delete(world.record.id)
    request = VaultRestoreRequest(to=str(tmp_path / "back"))
    told = world.do(lambda: world.vaults.restore(world.record.id, request))
    assert (told["generation"], told["files"]) == (3, 2)
    assert (tmp_path / "back" / "home" / "a").read_bytes() == b"two"
    assert (tmp_path / "back" / "workspace").is_dir()
    [row] = asyncio.run(world.vaults.rows())
    assert row.status == "WARN" and "belongs to no sandbox" in row.detail
    with pytest.raises(NotFound):
        asyncio.run(world.vaults.history("box"))


@pytest.mark.parametrize("path", ["home", "", "/home/../etc", "/a\0b"])
def test_a_path_that_is_none_in_the_guest_is_refused(path: str) -> None:
    with pytest.raises(BadRequest, match="no absolute path"):
        guest_path(path)


def test_what_no_generation_has_is_told_with_what_there_is(world: World, tmp_path: Path) -> None:
    """D3: generations, paths and directories that will not do."""
    with pytest.raises(NotFound, match="no generation 7"):
        asyncio.run(world.vaults.listing("box", "/home", "7"))
    with pytest.raises(NotFound, match="/etc is not kept"):
        asyncio.run(world.vaults.listing("box", "/etc", None))
    with pytest.raises(FailedPrecondition, match="not running"):
        world.do(lambda: world.vaults.restore("box", VaultRestoreRequest()))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(AssertionError, match="not empty"):
        world.do(lambda: world.vaults.restore("box", VaultRestoreRequest(to=str(tmp_path / "full"))))
    other = add_sandbox(world.host, "other")
    with pytest.raises(NotFound, match="other has no vault"):
        asyncio.run(world.vaults.history(other.name))


def test_damage_is_told_by_check_and_doctor_and_repaired(world: World) -> None:
    """D6: named, never served; a repair falls back to the newest whole generation and deletes nothing."""
    newest = max((world.directory / "gens").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    [check] = world.do(lambda: world.vaults.check("box"))["checks"]
    assert not check["ok"] and newest.name in check["problems"][0]
    [row] = asyncio.run(world.vaults.rows())
    assert row.status == "FAIL" and row.remedy == "limpet vault repair box"
    [check] = world.do(lambda: world.vaults.repair("box"))["checks"]
    assert check["ok"] and check["repaired"] and check["generations"] == 2
    assert "vault.damaged" in [event.kind for event in world.host.events._store.events_after(0, limit=99)]


def test_nothing_is_collected_while_somebody_reads(world: World) -> None:
    """D3: whoever reads an old generation has it to the end."""

    async def collect_while_reading() -> None:
        opened = await world.host.vaults.open(world.record.id)
        with opened.reading():
            done = await world.host.operations.wait((await world.vaults.collect("box")).id)
        assert done.error is not None and done.error["code"] == Busy.code
        done = await world.host.operations.wait((await world.vaults.collect("box")).id)
        assert done.state == "done"

    asyncio.run(collect_while_reading())


def test_a_clone_has_its_source_s_generations_and_goes_its_own_way(world: World) -> None:
    """FRZ-8: the same bytes under a second name; what is dropped or written in one is not in the other."""
    table = world.host.vaults
    (world.directory / "gens" / ".tmp-000009").write_bytes(b"a draft under way")
    asyncio.run(table.copy(world.record.id, "sb_clone"))
    copy = asyncio.run(table.open("sb_clone")).vault
    assert [generation.number for generation in copy.generations()] == [1, 2, 3] and not copy.check()
    first = world.directory / "gens" / "000001"
    assert first.samefile(copy.directory / "gens" / "000001")
    draft = copy.begin()
    draft.drop("workspace")
    assert draft.commit(vault_kit.NOON.replace(hour=14), {}).number == 4
    table.drop(world.record.id)
    assert not world.directory.exists() and not copy.check()
    assert Vault.open(copy.directory).head is not None


def test_a_copy_or_a_deletion_that_was_cut_off_is_swept(world: World) -> None:
    """D5: what has no name yet, or none any more, is nobody's."""
    for name in (".tmp-sb_new-x", ".tmp-rm-sb_old-y"):
        (world.directory.parent / name / "gens").mkdir(parents=True)
    world.host.vaults.sweep()
    assert world.host.vaults.ids() == [world.record.id]
    assert [path.name for path in world.directory.parent.iterdir()] == [world.record.id]


def test_forgetting_a_sandbox_drops_its_vault(world: World) -> None:
    """VM-17: what is purged is gone with everything that it wrote."""
    world.host.forget(world.record)
    assert world.host.vaults.ids() == [] and not world.directory.exists()


def test_a_dropped_vault_does_not_come_back_after_a_power_loss(world: World) -> None:
    """D5, D7: its name is gone durably before anything of it is deleted, or the call returns."""
    with durable.recording() as ops:
        world.host.vaults.drop(world.record.id)
        done = [(op.kind, op.path) for op in ops[:3]]
    renamed = [("rename", world.directory), ("fsync_dir", world.directory.parent)]
    assert [kind for kind, _ in done] == ["mkdir", "rename", "fsync_dir"] and done[1:] == renamed


def test_a_check_keeps_no_sync_waiting_and_nothing_is_removed_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D4: a vault of many gigabytes is read for minutes."""
    begun, go_on, real = threading.Event(), threading.Event(), Vault.inspect

    def slow(vault: Vault, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return real(vault, **options)

    async def check_and_commit() -> int:
        wait = world.host.operations.wait
        checks = [await world.vaults.check("box") for _ in range(2)]
        try:
            await asyncio.to_thread(begun.wait, 10)
            opened = await world.host.vaults.open(world.record.id)
            async with asyncio.timeout(5), opened.lock:
                draft = opened.vault.begin()
                draft.volume("workspace", b"/workspace", base=None)
                made = draft.commit(vault_kit.NOON.replace(hour=14), {"workspace": ("x", "0" * 36)})
            collected = await wait((await world.vaults.collect("box")).id)
            assert collected.error is not None and "is being read" in collected.error["message"]
        finally:
            go_on.set()
        for check in checks:
            assert ((await wait(check.id)).result or {})["checks"][0]["ok"]
        return made.number

    monkeypatch.setattr(Vault, "inspect", slow)
    assert asyncio.run(check_and_commit()) == 4
