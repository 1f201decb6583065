"""Damage is found, named, never served, and what is whole is reached again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from limpet.errors import FailedPrecondition, LimpetError
from limpet.vault import Damaged, Node, Tree, Vault
from limpet.vault.objectfile import ObjectWriter
from tests.unit.vault_model import EPOCH, filled, view


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generations 3 to 5 and a pack, with every kind of object: names, hard links, blocks of a long file."""
    vault = Vault.open(tmp_path_factory.mktemp("vault") / "v")
    filled(vault, {b"old": b"needed later", b"dir/%d" % 1: b"x", b"gone": b"y" * 500})
    filled(vault, {b"dir/2": b"z", b"gone": b""})
    draft = vault.begin()
    editor = draft.volume("home", b"/home", base=vault.head)
    editor.mkfile(b"long")
    for index in range(8):
        editor.write(b"long", index << 17, b"block %d" % index)
    editor.link(b"linked", b"long")
    editor.set_xattr(b"long", b"user.x", b"y")
    editor.put(b"dir/link", Node("symlink", target=b"../old"))
    draft.commit(EPOCH, {"home": ("t", "u")})
    filled(vault, {b"dir/3": b"only here"})
    filled(vault, {b"dir/3": b"and here"})
    vault.forget([1, 2])
    vault.pin(3, "why not")
    assert vault.check() == [] and len(list((vault.directory / "packs").iterdir())) == 1
    return vault.directory


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "v", symlinks=True)
    return tmp_path / "v"


def parts(directory: Path) -> Iterator[Path]:
    yield from sorted((directory / "gens").glob("*"))
    yield from sorted((directory / "packs").glob("*"))
    yield directory / "ledger"


def everything(vault: Vault) -> dict[int, dict[bytes, tuple[object, ...]]]:
    """What can be read; nothing else than what was written may ever be."""
    found = {}
    for generation in vault.generations():
        try:
            found[generation.number] = view(generation.tree("home"))
        except Damaged:
            continue
    return found


def problems(directory: Path, wanted: dict[int, dict[bytes, tuple[object, ...]]]) -> list[str]:
    """What the vault says, after it was made sure that nothing wrong is served."""
    vault = Vault.open(directory)
    for number, then in everything(vault).items():
        assert wanted[number] == then
    return vault.check()


@pytest.mark.parametrize("place", range(5))
def test_every_flipped_bit_is_found_and_named(whole: Path, tmp_path: Path, place: int) -> None:
    """D6: in every kind of file, at many places."""
    wanted = everything(Vault.open(whole))
    original = list(parts(whole))[place]
    content = original.read_bytes()
    step = max(1, len(content) // 60)
    for position in [*range(0, len(content), step), *range(len(content) - 20, len(content))]:
        directory = tmp_path / "v"
        shutil.copytree(whole, directory, symlinks=True)
        path = directory / original.relative_to(whole)
        path.write_bytes(flipped(content, position, position % 8))
        found = problems(directory, wanted)
        assert any(path.name in problem for problem in found), (position, found)
        repaired_is_whole(directory, wanted)
        shutil.rmtree(directory)


def flipped(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def repaired_is_whole(directory: Path, wanted: dict[int, dict[bytes, tuple[object, ...]]]) -> Vault:
    """After a repair everything that is left is as it was; nothing was deleted."""
    before = {path.name: path.read_bytes() for path in parts(directory) if path.exists()}
    vault = Vault.open(directory)
    assert vault.repair() and vault.damage is None and vault.check() == []
    left = everything(vault)
    assert left == {number: wanted[number] for number in left}
    kept = {path.read_bytes() for folder in ("gens", "packs", "damaged") for path in (directory / folder).glob("*")}
    missing = [name for name, content in before.items() if content not in kept and name != "ledger"]
    if missing:  # nothing but sound packs that became another one
        assert all(len(name) == 64 for name in missing)
    assert filled(vault, {b"after": b"repair"}).number > max(wanted)
    assert Vault.open(directory).check() == []
    return vault


@pytest.mark.parametrize("keep", [0, 1, 7, 100, -1, -33])
@pytest.mark.parametrize("place", range(5))
def test_a_file_cut_off_is_found_and_named(whole: Path, copy: Path, place: int, keep: int) -> None:
    """D6"""
    wanted = everything(Vault.open(whole))
    path = list(parts(copy))[place]
    path.write_bytes(path.read_bytes()[:keep])
    assert any(path.name in problem for problem in problems(copy, wanted))
    repaired_is_whole(copy, wanted)


@pytest.mark.parametrize("place", range(5))
def test_a_file_that_grew_is_found_and_named(whole: Path, copy: Path, place: int) -> None:
    path = list(parts(copy))[place]
    path.write_bytes(path.read_bytes() + b"\0")
    assert any(path.name in problem for problem in problems(copy, everything(Vault.open(whole))))


@pytest.mark.parametrize("place", range(5))
def test_a_missing_file_is_found_and_named(whole: Path, copy: Path, place: int) -> None:
    """D6"""
    wanted = everything(Vault.open(whole))
    path = list(parts(copy))[place]
    path.unlink()
    assert any(path.name in problem and "missing" in problem for problem in problems(copy, wanted))
    repaired_is_whole(copy, wanted)


@pytest.mark.parametrize("place", range(5))
def test_a_file_in_the_place_of_another_is_found_and_named(whole: Path, copy: Path, place: int) -> None:
    files = list(parts(copy))
    shutil.copy(files[place - 1], files[place])
    assert any(files[place].name in problem for problem in problems(copy, everything(Vault.open(whole))))


def texts(directory: Path) -> Iterator[str]:
    right = os.readlink(directory / "HEAD")
    for position in range(len(right)):
        for bit in range(7):
            changed = right[:position] + chr(ord(right[position]) ^ 1 << bit) + right[position + 1 :]
            if "\0" not in changed:
                yield changed
    yield from (right[:-1], right[1:], right + "0", "000004-" + right[7:], "nonsense")


def test_a_changed_head_is_found_and_refuses_commits(whole: Path, copy: Path) -> None:
    """D6: it takes nothing until it is repaired; everything can still be read."""
    wanted = everything(Vault.open(whole))
    for text in texts(copy):
        (copy / "HEAD").unlink()
        (copy / "HEAD").symlink_to(text)
        vault = Vault.open(copy)
        assert vault.damage and vault.head is None and len(vault.generations()) == len(wanted)
    assert vault.check() and everything(vault) == wanted
    with pytest.raises(FailedPrecondition, match="damaged"):
        vault.begin()
    with pytest.raises(FailedPrecondition, match="damaged"):
        vault.collect(EPOCH)
    vault = repaired_is_whole(copy, wanted)
    assert set(wanted) < {generation.number for generation in vault.generations()}


def test_a_missing_head_is_found_and_nothing_is_swept(whole: Path, copy: Path) -> None:
    wanted = everything(Vault.open(whole))
    (copy / "HEAD").unlink()
    assert any("HEAD is missing" in problem for problem in problems(copy, wanted))
    assert everything(Vault.open(copy)) == wanted
    repaired_is_whole(copy, wanted)


def test_a_vault_whose_directories_are_gone_says_so(whole: Path, copy: Path) -> None:
    wanted = everything(Vault.open(whole))
    shutil.rmtree(copy / "gens")
    assert any("000005" in problem for problem in problems(copy, wanted))
    vault = repaired_is_whole(copy, wanted)
    assert [generation.number for generation in vault.generations()] == [6]


def test_damage_in_the_newest_falls_back_to_the_one_before(copy: Path) -> None:
    """D3, D6: and what is damaged is kept."""
    path = copy / "gens" / "000005"
    path.write_bytes(flipped(path.read_bytes(), 20, 3))
    damaged = path.read_bytes()
    vault = Vault.open(copy)
    said = vault.repair()
    assert vault.head is not None and vault.head.number == 4 and (copy / "damaged" / "000005").read_bytes() == damaged
    assert any("the newest generation is 4" in line for line in said) and any("generation 5" in line for line in said)
    assert vault.generation(3).pinned == "why not" and vault.repair() == []


def test_damage_that_nobody_needs_costs_no_generation(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "v")
    draft = vault.begin()
    editor = draft.volume("home", b"/home", base=None)
    editor.mkfile(b"a")
    editor.write(b"a", 0, b"first" * 26215)  # one block and a bit: stored, then written over
    editor.write(b"a", 0, b"again" * 26215)
    draft.commit(EPOCH, {})
    wanted = everything(vault)
    path = vault.directory / "gens" / "000001"
    path.write_bytes(flipped(path.read_bytes(), 20, 0))
    vault = Vault.open(vault.directory)
    assert vault.check() and everything(vault) == wanted
    vault.repair()
    assert everything(vault) == wanted and vault.check() == [] and (vault.directory / "damaged" / "000001").exists()
    assert filled(vault, {b"b": b"c"}).number == 2 and Vault.open(vault.directory).damage is None


@pytest.mark.parametrize("point", ["keep.before", "keep.after", "head.before", "head.after"])
def test_a_repair_that_fails_can_be_repeated(
    whole: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    from limpet import crashpoint as crashing

    wanted = everything(Vault.open(whole))
    path = copy / "gens" / "000005"
    path.write_bytes(flipped(path.read_bytes(), 20, 3))
    monkeypatch.setattr(crashing, "_orders", str(orders := tmp_path / "orders"))
    orders.write_text(f"vault.repair.{point}=raise")
    with pytest.raises(LimpetError, match="crash point"):
        Vault.open(copy).repair()
    vault = Vault.open(copy)
    vault.repair()
    assert vault.head is not None and vault.head.number == 4 and vault.check() == []
    assert everything(vault) == {number: wanted[number] for number in (3, 4)}
    assert len(list((copy / "damaged").iterdir())) == 1


def test_progress_is_told_and_a_check_remembered(copy: Path) -> None:
    vault = Vault.open(copy)
    told: list[tuple[int, int]] = []
    found = vault.inspect(progress=lambda done, total: told.append((done, total)))
    assert found.problems == [] and told[-1][0] == told[-1][1] == found.bytes > 0 and found.objects > 10
    assert vault.last_verified is None
    vault.mark_verified(EPOCH)
    assert Vault.open(copy).last_verified == EPOCH


def test_nothing_of_a_damaged_object_is_served(copy: Path) -> None:
    """D6"""
    path = next((copy / "packs").iterdir())
    path.write_bytes(flipped(path.read_bytes(), 12, 1))
    vault = Vault.open(copy)
    refused = 0
    for name in (b"old", b"dir", b"dir/1", b"long"):
        for read in (lambda t, n: t.lookup(n), lambda t, n: list(t.walk(n)), lambda t, n: list(t.read(t.lookup(n)))):
            refused += fails(lambda r=read, n=name: r(vault.generation(4).tree("home"), n))  # type: ignore[misc]
    assert refused


def test_an_object_that_holds_something_else_than_its_digest_says_is_found_and_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D6: what changed in memory on its way to the disk has a frame and a checksum that are right."""

    def compressed(self: ObjectWriter, pack: int, ordinal: int, digest: bytes, raw: bytes) -> None:
        changed = raw.replace(b"meant", b"other") if raw.startswith(b"meant") else raw
        self.append(pack, ordinal, digest, zstandard.compress(changed))

    vault = Vault.open(tmp_path / "v")
    with monkeypatch.context() as patch:
        patch.setattr(ObjectWriter, "add", compressed)
        filled(vault, {b"a": b"meant" * 100, b"b": b"whole"})
    assert any("000001" in problem for problem in vault.check())
    tree = Vault.open(vault.directory).generation(1).tree("home")
    assert fails(lambda: list(tree.walk()) and b"".join(tree.read(node_of(tree, b"a"))))
    assert b"".join(tree.read(node_of(tree, b"b"))) == b"whole"


def node_of(tree: Tree, path: bytes) -> Node:
    node = tree.lookup(path)
    assert node is not None
    return node


def fails(read: Callable[[], object]) -> bool:
    try:
        read()
    except Damaged as error:
        assert "is damaged" in error.message
        return True
    return False
