"""Digests and seals: what changes them, what does not, and what is wrong with a file that is not as it was sealed."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet import digests
from limpet.digests import BLOCK, Digest, Seal, blocks, file_digest

SIZE = 4 * BLOCK + 1234


def sparse(path: Path, pieces: dict[int, bytes], size: int = SIZE) -> Path:
    """A file with only these pieces written."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, content in pieces.items():
            file.seek(offset)
            file.write(content)
    return path


def full(path: Path, pieces: dict[int, bytes], size: int = SIZE) -> Path:
    """The same content with every zero stored."""
    content = bytearray(size)
    for offset, piece in pieces.items():
        content[offset : offset + len(piece)] = piece
    path.write_bytes(content)
    return path


pieces = st.dictionaries(st.integers(0, SIZE - 5000), st.binary(min_size=1, max_size=5000), max_size=4)


@settings(deadline=None, max_examples=60)
@given(pieces)
def test_a_digest_is_of_the_content_and_not_of_how_it_is_stored(
    tmp_path_factory: pytest.TempPathFactory, written: dict[int, bytes]
) -> None:
    """FRZ-6: a copy without holes, or on another file system, has the same digest."""
    directory = tmp_path_factory.mktemp("digest")
    with_holes, without = sparse(directory / "a", written), full(directory / "b", written)
    assert with_holes.read_bytes() == without.read_bytes()
    assert file_digest(with_holes) == file_digest(without)


@settings(deadline=None, max_examples=60)
@given(pieces, st.integers(0, SIZE - 1), st.integers(0, 7))
def test_every_bit_counts(
    tmp_path_factory: pytest.TempPathFactory, written: dict[int, bytes], where: int, bit: int
) -> None:
    """FRZ-6: one flipped bit anywhere, also in a hole."""
    path = sparse(tmp_path_factory.mktemp("digest") / "a", written)
    before = file_digest(path)
    content = bytearray(path.read_bytes())
    content[where] ^= 1 << bit
    path.write_bytes(content)
    assert file_digest(path) != before


def test_where_something_lies_and_how_long_the_file_is_counts_too(tmp_path: Path) -> None:
    """Zeroes are left out of the digest, but not forgotten."""
    block = b"x" * BLOCK
    variants = [({0: block}, SIZE), ({BLOCK: block}, SIZE), ({0: block}, SIZE + 1), ({}, SIZE), ({}, SIZE + 1), ({}, 0)]
    found = {file_digest(sparse(tmp_path / "a", written, size)) for written, size in variants}
    assert len(found) == len(variants)


def test_holes_are_not_read(tmp_path: Path) -> None:
    """A memory image of a terabyte with one page in it is digested at once."""
    path = sparse(tmp_path / "a", {700 * BLOCK + 5: b"page"}, 1 << 40)
    with path.open("rb") as file:
        [(offset, content)] = blocks(file)
    assert offset == 700 * BLOCK and len(content) == BLOCK and content[5:9] == b"page"
    digest = Digest(1 << 40)
    digest.add(offset, content)
    assert digest.hexdigest() == file_digest(path)  # what comes block by block from elsewhere is the same


def test_an_unreadable_block_is_not_taken_for_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FRZ-6: a disk that fails must not make a file seem whole, or empty."""
    path = full(tmp_path / "a", {0: b"data"})
    seal = Seal.of(path)

    def fail(_fd: int, _position: int, _how: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "lseek", fail)
    with pytest.raises(OSError, match="Input/output"):
        file_digest(path)
    assert seal.problem(path, thorough=True) == f"{path} cannot be read: Input/output error"


def set_back(path: Path, before: os.stat_result) -> None:
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_each_kind_of_damage_is_named_with_the_file(tmp_path: Path) -> None:
    """FRZ-6: missing, truncated, longer, changed; also by who covers his tracks."""
    path = sparse(tmp_path / "ram", {5: b"page"})
    seal, before = Seal.of(path), path.stat()
    assert seal.problem(path) is None and seal.problem(path, thorough=True) is None
    os.truncate(path, SIZE - 1)
    assert seal.problem(path) == f"{path} has {SIZE - 1} bytes instead of {SIZE}"
    os.truncate(path, SIZE)
    set_back(path, before)
    assert seal.problem(path) is None  # what was cut off was a hole: read again, and found to be the same
    with path.open("r+b") as file:
        file.seek(6)
        file.write(b"A")
    set_back(path, before)
    assert seal.problem(path) == f"{path} is damaged: its content has changed"
    path.unlink()
    assert seal.problem(path) == f"{path} is missing"
    path.mkdir()
    assert seal.problem(path) is not None


def test_a_sealed_file_is_not_read_again_while_its_stamp_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start from a template of 200 MiB costs a stat, not a read; `thorough` reads."""
    path = sparse(tmp_path / "ram", {5: b"page"})
    seal = Seal.of(path)
    read: list[Path] = []

    def watched(path: Path) -> str:
        read.append(path)
        return file_digest(path)

    monkeypatch.setattr(digests, "file_digest", watched)
    assert seal.problem(path) is None and read == []
    assert seal.problem(path, thorough=True) is None and read == [path]
    with contextlib.closing(path.open("r+b")) as file:
        file.write(b"x")
    assert seal.problem(path) is not None and read == [path, path]


def test_damage_behind_the_back_of_the_stamp_is_found_when_it_is_looked_for(tmp_path: Path) -> None:
    """FRZ-9: a bit that the disk lost changes no stamp; `verify` reads everything."""
    path = sparse(tmp_path / "ram", {5: b"page"})
    seal = replace(Seal.of(path), digest="0" * 64)
    assert seal.problem(path) is None
    assert seal.problem(path, thorough=True) == f"{path} is damaged: its content has changed"


def test_a_second_name_for_a_file_is_no_damage(tmp_path: Path) -> None:
    """Templates and layers are hard links: a link changes the inode's stamp, not its content."""
    path = sparse(tmp_path / "root.qcow2", {5: b"disk"})
    seal = Seal.of(path)
    os.link(path, tmp_path / "ly_x.qcow2")
    assert seal.problem(path) is None and seal.problem(tmp_path / "ly_x.qcow2") is None
    assert Seal.of(path, seal.digest).digest == seal.digest
