"""A vault whose disk is full: that generation fails, all others are as they were, and the next one succeeds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet.errors import InsufficientSpace
from limpet.vault import Generation, Vault
from tests import small_disk
from tests.unit import vault_kit
from tests.unit.streams_kit import full, incremental, mkfile, write

_BLOCK = 48 << 10
_BLOCKS = 40


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk.mounted(tmp_path / "disk", 16) as disk:
        yield disk


def growth(name: bytes) -> list[bytes]:
    """A new file of 2 MiB that no compression makes smaller."""
    return [mkfile(name), *(write(name, number * _BLOCK, os.urandom(_BLOCK)) for number in range(_BLOCKS))]


def content(generation: Generation) -> dict[bytes, object]:
    return dict(vault_kit.facts(generation.tree(vault_kit.VOLUME)))


@pytest.mark.parametrize("left", [0, 4 << 10, 64 << 10, 1 << 20, 1900 << 10])
def test_a_generation_for_which_there_is_no_room_fails_and_leaves_everything_as_it_was(disk: Path, left: int) -> None:
    """D3, D5, VM-19: whether its first byte does not fit or its last; also for whoever opens the vault then."""
    vault = vault_kit.vault_of(disk, full(*growth(b"first")), incremental(*growth(b"second")))
    before = [content(generation) for generation in vault.generations()]
    names = sorted(path.relative_to(disk) for path in disk.rglob("*"))
    ballast = small_disk.fill(disk, left)
    for _ in range(3):
        with pytest.raises(InsufficientSpace):
            vault_kit.take(vault, incremental(*growth(b"third")))
    assert vault.check() == []
    for known in (vault, Vault.open(disk / "vault")):
        assert known.damage is None
        assert [content(generation) for generation in known.generations()] == before
    ballast.unlink()
    assert sorted(path.relative_to(disk) for path in disk.rglob("*")) == names, "nothing of the failed ones is left"
    third = vault_kit.take(vault, incremental(*growth(b"third")))
    assert third.number == 3 and content(third).keys() == {b"", b"first", b"second", b"third"}
    assert vault.check() == []
