"""Generations: how they are made durable, found again, and what becomes of those that fail."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest

from limpet import crashpoint as crashing
from limpet import durable
from limpet.errors import BadRequest, Busy, FailedPrecondition, InsufficientSpace, Internal, NotFound
from limpet.vault import Node, Vault
from tests.unit.vault_model import EPOCH, filled, view


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault.open(tmp_path / "v")


def test_a_commit_of_a_thousand_files_is_three_fsyncs_and_quick(vault: Vault) -> None:
    """D3, speed: vault commit of 1,000 small files: 3 fsyncs, ≤ 1 s"""
    filled(vault, {b"before": b"x"})
    began = time.monotonic()
    with durable.recording() as ops:
        filled(vault, {b"dir/%d" % number: b"content %d" % number for number in range(1000)})
    assert time.monotonic() - began < 1
    kinds = Counter(op.kind for op in ops)
    assert (kinds["fsync"], kinds["fsync_dir"]) == (1, 2)
    order = [op.kind for op in ops if op.kind in ("fsync", "rename", "fsync_dir")]
    assert order == ["fsync", "rename", "fsync_dir", "rename", "fsync_dir"]


def test_volumes_that_are_not_touched_are_carried_over(vault: Vault) -> None:
    draft = vault.begin()
    draft.volume("home", b"/home", base=None).put(b"a", Node("file"), [b"1"])
    draft.volume("workspace", b"/workspace", base=None).put(b"b", Node("file"), [b"22"])
    first = draft.commit(EPOCH, {"home": ("t1", "u1"), "workspace": ("t1", "u2")})
    draft = vault.begin()
    draft.volume("home", b"/home", base=first).unlink(b"a")
    second = draft.commit(EPOCH, {"home": ("t2", "u3")})
    assert second.volumes["workspace"] == first.volumes["workspace"]
    assert second.info.files == 1 and second.info.bytes == 2 and second.info.volumes == ["/home", "/workspace"]
    draft = vault.begin()
    draft.drop("workspace")
    assert set(draft.commit(EPOCH, {}).volumes) == {"home"}
    with pytest.raises(NotFound, match="no volume"):
        second.tree("payload-00000000")


def test_generations_are_found_by_number_time_snapshot_and_path(vault: Vault) -> None:
    """Issue 4: generations that do not exist"""
    with pytest.raises(NotFound):
        vault.at(EPOCH)
    for number in range(3):
        filled(vault, {b"f": b"%d" % number}, at=10 * number)
    assert vault.at(EPOCH + timedelta(seconds=19)).number == 2
    with pytest.raises(NotFound):
        vault.at(EPOCH - timedelta(seconds=1))
    with pytest.raises(NotFound) as error:
        vault.generation(7)
    assert error.value.hint == "the nearest: 3"
    found = vault.newest_with("home", {"token-1": "uuid-1", "token-2": "uuid-2", "token-3": "another"})
    assert found is not None and found.number == 2
    assert vault.newest_with("home", {}) is None and vault.newest_with("other", {"token-1": "uuid-1"}) is None
    assert found.locate(b"/home//user/./x") == ("home", b"user/x") and found.locate(b"/home") == ("home", b"")
    with pytest.raises(NotFound) as error:
        found.locate(b"/homes")
    assert error.value.hint == "it has /home"
    for path in (b"home", b"/home/../etc"):
        with pytest.raises(BadRequest):
            found.locate(path)


def test_one_draft_at_a_time_and_none_after_its_end(vault: Vault) -> None:
    draft = vault.begin()
    with pytest.raises(Busy):
        vault.begin()
    with pytest.raises(Busy):
        vault.repair()
    assert vault.check() == []  # reading goes on
    draft.abandon()
    draft.abandon()
    for use in (lambda: draft.commit(EPOCH, {}), lambda: draft.volume("home", b"/home", base=None)):
        with pytest.raises(FailedPrecondition):
            use()
    assert filled(vault, {b"a": b"b"}).number == 1


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_fsync_that_fails_fails_the_generation(vault: Vault, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """D3, D5: it is not tried again; what was there stays, the next one succeeds."""
    filled(vault, {b"a": b"first"})
    real, calls = os.fsync, 0

    def fsync(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EIO, "input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="input/output"):
        filled(vault, {b"a": b"second"})
    assert calls == failing
    assert vault.settled == (failing < 3)  # after the last one HEAD may be either
    third = filled(vault, {b"a": b"third"})
    assert vault.settled
    again = Vault.open(vault.directory)
    assert again.check() == [] and again.head is not None and again.head.number == third.number
    assert view(again.generations()[0].tree("home"))[b"a"][6] == b"first"
    assert view(again.head.tree("home"))[b"a"][6] == b"third"
    assert not [name for name in os.listdir(vault.directory / "gens") if name.startswith(".")]


def test_what_head_says_is_durable_before_it_is_believed(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """D3: who renamed it may have been killed before it was made durable."""
    filled(vault, {b"a": b"first"})
    with durable.recording() as ops:
        assert Vault.open(vault.directory).settled
    assert [op.path for op in ops if op.kind == "fsync_dir"] == [vault.directory]

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(durable, "sync_directory", fail)
    assert not Vault.open(vault.directory).settled


def test_a_full_disk_fails_the_generation_and_says_so(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 4, item 6: ENOSPC fails the generation and keeps the old ones."""
    filled(vault, {b"a": b"first"})

    def full(self: durable.NewFile, data: bytes) -> None:
        raise InsufficientSpace("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(durable.NewFile, "write", full)
        draft = vault.begin()
        editor = draft.volume("home", b"/home", base=vault.head)
        with pytest.raises(InsufficientSpace):
            editor.mkfile(b"large")
            for index in range(100):
                editor.write(b"large", index << 17, os.urandom(1 << 17))
        draft.abandon()
    assert filled(vault, {b"a": b"second"}).number == 2 and vault.check() == []


@pytest.mark.parametrize(
    "point",
    ["begin.before", "begin.after", "write.before", "write.after", "name.after", "commit.before", "commit.after"],
)
def test_a_failure_at_any_point_leaves_all_or_nothing(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: str
) -> None:
    """D5"""
    filled(vault, {b"a": b"first"})
    monkeypatch.setattr(crashing, "_orders", str(orders := tmp_path / "orders"))
    orders.write_text(f"vault.{point}=raise")
    draft = None
    with pytest.raises(Internal):
        draft = vault.begin()
        draft.volume("home", b"/home", base=vault.head).put(b"a", Node("file"), [b"second"])
        draft.commit(EPOCH + timedelta(seconds=1), {"home": ("t", "u")})
    if draft is not None:
        draft.abandon()
    done = 2 if point == "commit.after" else 1
    for found in (vault, Vault.open(vault.directory)):
        assert found.head is not None and found.head.number == done and found.check() == []
    assert filled(vault, {b"a": b"third"}).number == done + 1
    assert sorted(os.listdir(vault.directory / "gens")) == [f"{n:06d}" for n in range(1, done + 2)]


def test_what_is_no_vault_is_not_made_one(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "precious").write_text("mine")
    with pytest.raises(FailedPrecondition, match="no vault"):
        Vault.open(tmp_path / "v")


def test_threads_read_while_generations_come_and_go(vault: Vault) -> None:
    """Restores and histories run beside syncs and gc."""
    filled(vault, {b"d/%d" % number: os.urandom(3000) for number in range(300)})
    vault.pin(1, "for the readers")
    wanted, failures = view(vault.generation(1).tree("home")), []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            if view(vault.generation(1).tree("home")) != wanted:
                failures.append("differs")

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for number in range(40):
            filled(vault, {b"d/%d" % number: os.urandom(3000)})
            if number % 4 == 3:
                vault.forget(generation.number for generation in vault.generations())
    finally:
        over.set()
        for reader in readers:
            reader.join()
    assert not failures and [generation.number for generation in vault.generations()] == [1, 41]
