"""The trash over a real store and real layers: what a removal keeps, what comes back, what goes for good."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from limpet.errors import AlreadyExists, BadRequest, FailedPrecondition, LimpetError, NotFound
from limpet.models import Operation, SandboxSpec, State, UndeleteRequest
from limpet.services import garbage, reconcile, risk, trash
from limpet.services.host import Host
from limpet.services.trash import Trash
from limpet.store import SandboxRecord
from tests.unit import services_kit as kit


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with kit.host_in(tmp_path) as host:
        yield host


def put(host: Host, record: SandboxRecord) -> SandboxRecord:
    """The row once it is in the trash."""
    trash.put(host, host.records.by_id(record.id))
    return host.records.by_id(record.id)


def done(host: Host, starting: Any) -> dict[str, Any]:
    """The result of an operation; raises what it failed with."""

    async def run() -> Operation:
        return await host.operations.wait((await starting).id)

    ended = asyncio.run(run())
    if ended.error is not None:
        kinds = {"already_exists": AlreadyExists, "not_found": NotFound}
        raise kinds.get(ended.error["code"], LimpetError)(ended.error["message"], hint=ended.error["hint"])
    return ended.result or {}


def undelete(host: Host, name: str, as_name: str | None = None) -> dict[str, Any]:
    return done(host, Trash(host).undelete(name, UndeleteRequest(as_name=as_name)))


def add_vault(host: Host, record: SandboxRecord) -> Path:
    directory = host.paths.vault(record.id)
    (directory / "gens").mkdir(parents=True)
    (directory / "gens" / "000001").write_bytes(b"g" * 8192)
    return directory


def next_daemon(host: Host) -> None:
    """What the next daemon does before it serves, as far as rows go."""

    async def run() -> None:
        for record in host.records.everything():
            await reconcile._one(host, None, record)  # type: ignore[arg-type]
        reconcile._forget_used_up(host)
        await garbage.collect(host)

    asyncio.run(run())


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_undeleted_sandbox_is_what_it_was(host: Host) -> None:
    """VM-17, D7: every column of its row, its layers, its checkpoints, its vault."""
    before = kit.add_sandbox(host, spec=SandboxSpec(env={"A": "1"}, labels={"l": "x"}), incarnation=3, error="died")
    checkpoint = kit.add_checkpoint(host, before)
    before, vault = host.records.by_id(before.id), add_vault(host, before)
    put(host, before)
    assert asyncio.run(garbage.collect(host)) == 0
    assert undelete(host, "box")["name"] == "box"
    assert host.records.by_id(before.id) == before
    assert kit.problems(host, checkpoint, thorough=True) == []
    assert all(host.layers.path(layer).exists() for layer in (before.disks or {}).values())
    assert (vault / "gens" / "000001").exists()


def test_a_suspended_sandbox_keeps_its_memory_in_the_trash(host: Host) -> None:
    """VM-17: the checkpoint that it is suspended to is neither used up nor removable."""
    record = kit.add_sandbox(host)
    memory = kit.add_memory(host, kit.add_checkpoint(host, record, made_by="suspend"))
    host.records.update(record.id, state=State.SUSPENDED, memory=memory.info.id)
    put(host, record)
    next_daemon(host)
    with pytest.raises(FailedPrecondition, match="box is suspended to"):
        garbage.require_unused(host, memory.info.id)
    undelete(host, "box")
    assert host.records.by_id(record.id).state is State.SUSPENDED
    assert host.catalogue.find(memory.info.id).directory.is_dir()


def test_the_next_daemon_leaves_the_trash_alone(host: Host) -> None:
    """VM-17: a trashed row has a name that no user can give, as limpet's own have."""
    record = put(host, kit.add_sandbox(host))
    next_daemon(host)
    assert host.records.by_id(record.id) == record


def test_a_name_is_free_as_soon_as_its_sandbox_is_in_the_trash(host: Host) -> None:
    first = put(host, kit.add_sandbox(host))
    with pytest.raises(NotFound) as raised:
        host.records.by_name("box")
    assert raised.value.hint == "it is in the trash: limpet undelete box"
    second = kit.add_sandbox(host)
    assert [record.id for record in host.records.all()] == [second.id]
    assert host.records.by_name("box").id == second.id != first.id


# ── which one is meant ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_trashed_sandbox_is_found_by_its_name_its_id_or_the_beginning_of_one(host: Host) -> None:
    old, new = put(host, kit.add_sandbox(host)), put(host, kit.add_sandbox(host))
    find = host.records.find_trashed
    assert find("box").id == new.id, "the newest of a name"
    assert find(old.id).id == old.id
    assert find(new.id[3:]).id == new.id
    with pytest.raises(BadRequest, match="the beginning of 2 ids"):
        find(new.id[:8])
    with pytest.raises(NotFound):
        find("sb_")


def test_the_living_come_before_the_removed(host: Host) -> None:
    """By name; the removed one is still found by its id."""
    removed, living = put(host, kit.add_sandbox(host)), kit.add_sandbox(host)
    assert host.records.find_any("box").id == living.id
    assert host.records.find_any(removed.id).id == removed.id
    put(host, living)
    assert host.records.find_any("box").id == living.id
    with pytest.raises(NotFound):
        host.records.find_any("bax-other")


def test_limpets_own_sandboxes_are_found_by_nobody(host: Host) -> None:
    hidden = kit.add_sandbox(host, name="+pool-1")
    for find in (host.records.find_any, host.records.find_trashed):
        with pytest.raises(NotFound):
            find(hidden.id)


# ── undelete ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_undelete_whose_name_is_taken_needs_another(host: Host) -> None:
    """VM-17: both stay as they are."""
    removed, living = put(host, kit.add_sandbox(host)), kit.add_sandbox(host)
    with pytest.raises(AlreadyExists) as raised:
        undelete(host, "box")
    assert raised.value.hint == "limpet undelete box --as NEW"
    assert host.records.by_id(removed.id) == removed
    undelete(host, "box", "box-2")
    assert host.records.by_name("box-2").id == removed.id
    assert host.records.by_name("box").id == living.id


def test_what_was_undeleted_is_not_in_the_trash_any_more(host: Host) -> None:
    record = put(host, kit.add_sandbox(host))
    undelete(host, "box")
    with pytest.raises(NotFound):
        undelete(host, record.id)


# ── for good ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_emptying_frees_what_the_trash_said(host: Host) -> None:
    """VM-17: disks, checkpoints, vault and row."""
    record = kit.add_sandbox(host)
    checkpoint = kit.add_checkpoint(host, record)
    vault = add_vault(host, record)
    put(host, record)
    [entry] = asyncio.run(Trash(host).list())
    assert (entry.name, entry.sandbox.name, entry.sandbox.state) == ("box", "box", State.TRASHED)
    assert entry.expires_at - entry.removed_at == timedelta(days=7)
    result = done(host, Trash(host).empty(None))
    assert result["removed"] == ["box"]
    assert result["freed"] == entry.size > 8192
    assert host.records.everything() == []
    assert not vault.exists() and not checkpoint.directory.exists()
    assert list(host.paths.layers.glob("ly_*")) == []


def test_emptying_leaves_what_others_need(host: Host) -> None:
    """FRZ-6: a fork lies on the same layers; only what is the removed one's own counts."""
    record = kit.add_sandbox(host)
    checkpoint = kit.add_checkpoint(host, record)
    shared = checkpoint.manifest.layer_ids()
    kit.add_sandbox(host, name="fork", disks=dict(shared))
    put(host, record)
    done(host, Trash(host).empty("box"))
    assert all(host.layers.path(layer).exists() for layer in shared.values())
    assert [found.name for found in host.records.everything()] == ["fork"]


@pytest.mark.parametrize("gone", ["nothing", "checkpoints", "vault"])
def test_a_purge_that_was_cut_off_is_finished_by_the_next_daemon(host: Host, gone: str) -> None:
    """VM-17, D5: once it has begun, nobody finds half of a sandbox in the trash."""
    record = kit.add_sandbox(host)
    checkpoint = kit.add_checkpoint(host, record)
    vault = add_vault(host, record)
    put(host, record)
    trash.doom(host, record)
    if gone != "nothing":
        host.catalogue.forget(checkpoint.info.id)
    if gone == "vault":
        host.vaults.drop(record.id)
    assert host.records.trashed() == [] == asyncio.run(Trash(host).list())
    next_daemon(host)
    assert host.records.everything() == [] == host.catalogue.all()
    assert not vault.exists() and list(host.paths.layers.glob("ly_*")) == []


def test_the_trash_is_emptied_after_its_days_and_not_by_a_jump_of_the_clock(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VM-17: seven days, unless configured otherwise; being too old for a moment is not enough."""
    record = put(host, kit.add_sandbox(host))
    bin_, now = Trash(host), [1000.0]
    monkeypatch.setattr("limpet.services.trash.time.monotonic", lambda: now[0])

    def removed(days: float) -> None:
        when = datetime.now(UTC) - timedelta(days=days)
        host.records.update(record.id, trash={**(record.trash or {}), "removed_at": when.isoformat()})

    def there_after(seconds: float) -> bool:
        now[0] += seconds
        asyncio.run(bin_.look())
        return host.records.find(record.id) is not None

    removed(6.9)
    assert there_after(0) and there_after(10_000)
    removed(7.1)  # as it looks while the clock is wrong
    assert there_after(0) and there_after(500)
    removed(6.9)
    assert there_after(500)
    removed(7.1)
    assert there_after(0) and there_after(500) and not there_after(500)


def test_the_days_of_the_trash_are_configured(host: Host) -> None:
    for value in ("-1", "soon", "nan", "1e9"):
        with pytest.raises(BadRequest):
            asyncio.run(host.config.set("trash.days", value))
    asyncio.run(host.config.set("trash.days", "0.5"))
    record = put(host, kit.add_sandbox(host))
    assert trash.expires_at(record, host.config.trash_days) - datetime.now(UTC) < timedelta(days=0.5)


# ── what only it has ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_the_guest_says_of_its_repositories_is_taken_apart() -> None:
    oid, other = b"a" * 40, b"b" * 40
    answer = b"\0".join(
        [b"repo /workspace/x", b"commit " + oid, b"stash " + other, b" M a b", b"?? new\nline", b"AM c",
         b"blob " + oid + b" a b", b"repo /home/user/y", b"?? z", b""]
    )  # fmt: skip
    first, second = risk.parse(answer)
    assert (first.top, first.commits, first.stashes) == (b"/workspace/x", [oid], [other])
    assert (first.changed, first.untracked, first.blobs) == ([b"a b", b"c"], [b"new\nline"], {b"a b": oid})
    assert (second.top, second.untracked) == (b"/home/user/y", [b"z"])


def test_a_guest_that_lies_about_its_repositories_does_no_harm() -> None:
    """Hostile input: cut off, without order, with ids that are none."""
    assert risk.parse(b"") == [] == risk.parse(b"commit x\0blob\0")
    [found] = risk.parse(b"repo\0commit --all\0stash \0blob zz p\0M\0 \0?? x\0cut of")
    assert (found.commits, found.stashes, found.changed, found.blobs) == ([], [], [], {})
    assert found.untracked == [b"x"]


def test_files_that_the_host_has_as_well_are_not_at_risk(tmp_path: Path) -> None:
    """VM-17: by content; a path of the guest's never leads out of the directory, and never through a link."""
    (tmp_path / "in").mkdir()
    outside = tmp_path / "secret"
    outside.write_bytes(b"s")
    top = tmp_path / "in"
    (top / "d").mkdir()
    (top / "d" / "same").write_bytes(b"hello\n")
    (top / "link").symlink_to(outside)
    hello = b"ce013625030ba8dba906f756967f9e9ca394464a"  # `git hash-object` of "hello\n"
    assert risk._blob_of(top, b"d/same") == hello
    assert risk._blob_of(top, b"d/gone") is None
    for path in (b"link", b"../secret", b"/etc/passwd", b"d", b"d/../d/same", b"", b"d//same"):
        assert risk._blob_of(top, path) not in (None, hello) and len(risk._blob_of(top, path) or b"") < 40
    repository = risk._Repository(
        b"/w", changed=[b"d/same", b"d/gone", b"other"], blobs={b"d/same": hello, b"other": hello}
    )
    asyncio.run(risk._leave_out([repository, other := replace(repository, top=b"/elsewhere")], "/w", top))
    assert repository.changed == [b"other"]
    assert len(other.changed) == 3


def test_nothing_is_known_of_a_sandbox_that_does_not_run(host: Host) -> None:
    kit.add_sandbox(host)
    report = asyncio.run(Trash(host).risk("box"))
    assert (report.known, report.reason) == (False, "it is stopped: nobody can look")
