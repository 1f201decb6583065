"""What the ladder keeps stays readable bit for bit, whatever is forgotten around it."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limpet import crashpoint as crashing
from limpet.errors import InsufficientSpace, Internal
from limpet.vault import Damaged, Vault, retaining
from tests.unit.vault_model import EPOCH, filled, view

NAMES = [b"a", b"b", b"dir/c", b"dir/d", b"dir/sub/e"]
HOUR, DAY = 3600, 86400


def numbers(vault: Vault) -> list[int]:
    return [generation.number for generation in vault.generations()]


def files(vault: Vault) -> int:
    return sum(len(os.listdir(vault.directory / part)) for part in ("gens", "packs"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            st.dictionaries(st.sampled_from(NAMES), st.binary(min_size=1, max_size=3), min_size=1),
            st.sets(st.integers(1, 12)),
        ),
        max_size=14,
    ),
    st.sampled_from([1, 4096, 1 << 20]),
)
def test_forgetting_leaves_the_others_as_they_were(history: list[dict[bytes, bytes] | set[int]], small: int) -> None:
    """D3: and every later one can still be made from them."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(retaining, "_SMALL", small)
        vault = Vault.open(Path(directory, "v"))
        wanted = {}
        for step in history:
            if isinstance(step, dict):
                contents = {path: content * 40_000 for path, content in step.items()}
                generation = filled(vault, contents)
                wanted[generation.number] = view(generation.tree("home"))
            else:
                vault.forget(step)
                head = vault.head.number if vault.head else 0
                wanted = {n: then for n, then in wanted.items() if n not in step or n == head}
            assert vault.check() == []
            for found in (vault, Vault.open(vault.directory)):
                assert {g.number: view(g.tree("home")) for g in found.generations()} == wanted


def test_the_ladder_keeps_the_last_hour_one_an_hour_and_one_a_day(tmp_path: Path) -> None:
    """D3"""
    vault = Vault.open(tmp_path / "v")
    ages = [40 * DAY, 29 * DAY + 7, 29 * DAY, 5 * HOUR + 100, 5 * HOUR + 50, 1800, 1799, 2]
    for age in ages:
        filled(vault, {b"a": b"%d" % age}, at=100 * DAY + 1800 - age)
    now = EPOCH + timedelta(seconds=100 * DAY + 1800)
    vault.pin(4, "the user said so")
    vault.pin(2, "for a while", now - timedelta(seconds=1))
    assert vault.usage(now).reclaimable > 0
    assert vault.collect(now) > 0
    assert numbers(vault) == [3, 4, 5, 6, 7, 8]
    assert vault.generation(4).info.pinned == "the user said so" and vault.collect(now) == 0
    vault.unpin(4)
    assert vault.collect(now) > 0 and numbers(vault) == [3, 5, 6, 7, 8]
    assert vault.collect(now + timedelta(days=400)) > 0 and numbers(vault) == [8], "never the newest"
    assert vault.check() == []


def test_neither_the_newest_nor_a_pinned_generation_is_forgotten_by_whoever_asks(tmp_path: Path) -> None:
    """D3, D7: also when it was pinned after somebody had decided what goes. A pin that is over keeps nothing."""
    vault = Vault.open(tmp_path / "v")
    for number in range(1, 6):
        filled(vault, {b"a": b"%d" % number * 1000})
    vault.pin(2, "before a restore")
    vault.pin(3, "for a while", EPOCH)
    vault.forget([1, 2, 3, 4, 5])
    assert numbers(vault) == numbers(Vault.open(vault.directory)) == [2, 5] and vault.check() == []


def test_a_year_of_syncs_leaves_few_files(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "v")
    filled(vault, {b"d/%d" % number: os.urandom(2000) for number in range(1000)})
    for number in range(1, 200):
        filled(vault, {b"d/%d" % number: os.urandom(2000)}, at=number * 2 * HOUR)
        if number % 20 == 0:
            vault.collect(EPOCH + timedelta(seconds=number * 2 * HOUR))
    vault.collect(EPOCH + timedelta(days=500))
    assert numbers(vault) == [200] and files(vault) <= 20 and vault.check() == []
    assert vault.usage().size < 1.6 * 2000 * 1000
    head = vault.head
    assert head is not None and head.info.files == 1000


def test_what_is_mostly_alive_is_not_written_again(tmp_path: Path) -> None:
    """A first generation of gigabytes is not copied for one that is forgotten."""
    vault = Vault.open(tmp_path / "v")
    filled(vault, {b"large": os.urandom(3 << 20), b"a": b"1"})
    filled(vault, {b"a": b"2"})
    inode = (vault.directory / "gens" / "000001").stat().st_ino
    vault.forget([1])
    assert [path.stat().st_ino for path in (vault.directory / "packs").iterdir()] == [inode]
    assert numbers(vault) == [2] and vault.check() == []


@pytest.mark.parametrize(
    "point", ["compact.before", "compact.after", "forget.before", "forget.after", "sweep.before", "sweep.after"]
)
def test_a_failure_while_forgetting_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """D3, D5: all are forgotten or none."""
    vault = Vault.open(tmp_path / "v")
    for number in range(6):
        filled(vault, {b"a": b"%d" % number, b"b%d" % number: b"kept"})
    vault.forget([1])
    wanted = {generation.number: view(generation.tree("home")) for generation in vault.generations()}
    monkeypatch.setattr(crashing, "_orders", str(orders := tmp_path / "orders"))
    orders.write_text(f"vault.{point}=raise")
    with pytest.raises(Internal):
        vault.forget([2, 4])
    orders.unlink(missing_ok=True)
    again = Vault.open(vault.directory)
    assert numbers(again) in ([2, 3, 4, 5, 6], [3, 5, 6])
    assert {n: view(again.generation(n).tree("home")) for n in numbers(again)} == {n: wanted[n] for n in numbers(again)}
    assert again.check() == [] and len(os.listdir(vault.directory / "packs")) <= 2
    again.forget([2, 4])
    assert numbers(again) == [3, 5, 6] and again.check() == []
    assert filled(again, {b"a": b"more"}).number == 7


def test_on_a_full_disk_what_is_wholly_dead_goes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = Vault.open(tmp_path / "v")
    filled(vault, {b"kept": b"x" * 1000, b"a": os.urandom(1 << 20)})
    for _ in range(3):
        filled(vault, {b"a": os.urandom(1 << 20)})

    def full(*args: object) -> str:
        raise InsufficientSpace("no space left")

    monkeypatch.setattr(retaining, "_copied", full)
    assert vault.forget([1, 2, 3]) > 2 << 20
    assert numbers(vault) == [4] and vault.check() == []
    monkeypatch.undo()
    filled(vault, {b"a": b"small"})
    vault.forget([4])
    assert vault.usage().size < 20_000 and vault.check() == []


def test_nothing_is_forgotten_while_a_kept_generation_cannot_be_read(tmp_path: Path) -> None:
    """D6: nobody knows what it needs."""
    vault = Vault.open(tmp_path / "v")
    for number in range(4):
        filled(vault, {b"a": b"%d" % number})
    path = vault.directory / "gens" / "000002"
    path.write_bytes(path.read_bytes()[:-1])
    vault = Vault.open(vault.directory)
    assert numbers(vault) == [1, 3, 4] and vault.damage is None
    with pytest.raises(Damaged, match="000002"):
        vault.generation(2)
    with pytest.raises(Damaged, match="000002"):
        vault.forget([1])
