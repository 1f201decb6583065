"""What reaches the disk, in which order, and what is left when it fails (D5). What a power loss leaves of it is the
business of tests/crash/test_durable.py."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from pathlib import Path

import pytest

from limpet import durable
from limpet.durable import _primitives
from limpet.errors import InsufficientSpace, Unimplemented


def kinds(ops: list[durable.Op]) -> list[str]:
    return [op.kind for op in ops]


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_a_replaced_file_is_written_synced_renamed_and_its_name_synced_in_this_order(tmp_path: Path) -> None:
    """D5."""
    target = tmp_path / "f"
    target.write_bytes(b"old")
    with durable.recording() as ops:
        durable.replace_file(target, b"new", mode=0o640)
    assert kinds(ops) == ["create", "write", "fsync", "rename", "fsync_dir"]
    assert ops[1].data == ops[2].data == b"new"
    assert ops[3].target == target
    assert json.loads(ops[4].data or b"") == {"f": "file"}
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o7777 == 0o640
    assert names(tmp_path) == ["f"]


def test_nothing_is_recorded_outside_of_the_block(tmp_path: Path) -> None:
    with durable.recording() as ops:
        pass
    durable.replace_file(tmp_path / "f", b"x")
    assert ops == []


def test_a_new_file_is_appended_to_and_read_while_it_is_written(tmp_path: Path) -> None:
    with durable.recording() as ops, durable.new_file(tmp_path / "f", 0o600) as file:
        file.write(b"one")
        file.write(memoryview(b"two"))
        assert file.read(2, 3) == b"etw"
        assert file.read(4, 100) == b"wo"
        assert file.size == 6
    assert (tmp_path / "f").read_bytes() == b"onetwo"
    assert [(op.kind, op.offset, op.data) for op in ops] == [
        ("create", 0, None), ("write", 0, b"one"), ("write", 3, b"two"), ("fsync", 0, b"onetwo"),
    ]  # fmt: skip


def test_a_new_file_has_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        with durable.new_file(tmp_path / "f", 0o644):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o7777 == 0o644


def test_a_new_file_that_failed_is_gone(tmp_path: Path) -> None:
    """D5."""
    with pytest.raises(KeyError), durable.new_file(tmp_path / "f") as file:
        file.write(b"half")
        raise KeyError
    assert names(tmp_path) == []


def test_a_new_file_never_takes_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(FileExistsError), durable.new_file(tmp_path / "f"):
        pass
    assert (tmp_path / "f").read_bytes() == b"old"


def test_a_full_disk_is_called_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InsufficientSpace, match="no space left to write"), durable.new_file(tmp_path / "f") as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_failed_fsync_fails_the_replacement_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: the kernel tells of a lost page once."""
    target = tmp_path / "f"
    target.write_bytes(b"old")
    tries = []

    def failing(fd: int) -> None:
        tries.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        durable.replace_file(target, b"new")
    assert len(tries) == 1
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_two_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_bytes(b"b")
    with durable.recording() as ops:
        durable.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == b"b"
    assert (tmp_path / "b").is_dir()
    assert kinds(ops) == ["exchange"]


def test_an_exchange_with_nothing_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match="b"):
        durable.exchange(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_an_exchange_on_a_file_system_that_cannot_is_unimplemented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Refusing:
        def renameat2(self, *_: object) -> int:
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(_primitives, "_libc", Refusing)
    with pytest.raises(Unimplemented, match="cannot exchange two names"):
        durable.exchange(tmp_path / "a", tmp_path / "b")


def test_a_symlink_is_replaced_whole(tmp_path: Path) -> None:
    with durable.recording() as ops:
        durable.replace_symlink(tmp_path / "HEAD", "000001-aa")
        durable.replace_symlink(tmp_path / "HEAD", "000002-bb")
    assert os.readlink(tmp_path / "HEAD") == "000002-bb"
    assert names(tmp_path) == ["HEAD"]
    assert kinds(ops) == ["symlink", "rename"] * 2
    assert ops[0].target == "000001-aa"


def test_a_symlink_that_cannot_be_renamed_leaves_no_stray(tmp_path: Path) -> None:
    (tmp_path / "HEAD").mkdir()
    with pytest.raises(IsADirectoryError):
        durable.replace_symlink(tmp_path / "HEAD", "x")
    assert names(tmp_path) == ["HEAD"]


def test_a_link_is_the_same_file_and_no_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "s").symlink_to("f")
    durable.link(tmp_path / "f", tmp_path / "g")
    durable.link(tmp_path / "s", tmp_path / "t")
    assert (tmp_path / "f").stat().st_ino == (tmp_path / "g").stat().st_ino
    assert (tmp_path / "t").is_symlink()
    with pytest.raises(FileExistsError):
        durable.link(tmp_path / "f", tmp_path / "g")


def test_a_synced_file_system_is_recorded_as_every_file_and_directory_in_it(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x")
    (tmp_path / "s").symlink_to("d")
    with durable.recording() as ops:
        durable.sync_filesystem(tmp_path)
    assert [(op.kind, op.path) for op in ops] == [
        ("fsync", tmp_path / "d" / "f"), ("fsync_dir", tmp_path / "d"), ("fsync_dir", tmp_path),
    ]  # fmt: skip
    assert json.loads(ops[-1].data or b"") == {"d": "dir", "s": "link:d"}


def test_a_published_tree_is_synced_to_its_last_file_before_its_name(tmp_path: Path) -> None:
    """D5."""
    staged = durable.staging(tmp_path, "x")
    (staged / "sub").mkdir()
    (staged / "sub" / "f").write_bytes(b"x")
    with durable.recording() as ops:
        durable.publish(staged, tmp_path / "there")
    assert [(op.kind, op.path.name) for op in ops] == [
        ("fsync", "f"), ("fsync_dir", "sub"), ("fsync_dir", staged.name), ("rename", staged.name),
        ("fsync_dir", tmp_path.name),
    ]  # fmt: skip


def test_a_directory_is_made_durably_with_those_above_it(tmp_path: Path) -> None:
    """D5."""
    with durable.recording() as ops:
        durable.make_directory(tmp_path / "a" / "b")
        durable.make_directory(tmp_path / "a" / "b")
    assert [(op.kind, op.path.name) for op in ops] == [
        ("mkdir", "a"), ("fsync_dir", tmp_path.name), ("mkdir", "b"), ("fsync_dir", "a"),
    ]  # fmt: skip
    assert (tmp_path / "a" / "b").stat().st_mode & 0o7777 == 0o700


def test_a_removed_tree_is_renamed_aside_durably_before_anything_in_it_is_deleted(tmp_path: Path) -> None:
    """D5."""
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "sub" / "f").write_bytes(b"x")
    (tmp_path / "d" / "link").symlink_to("sub")
    with durable.recording() as ops:
        durable.remove_tree(tmp_path / "d")
    assert kinds(ops) == ["rename", "fsync_dir", "unlink", "rmdir", "unlink", "rmdir"]
    assert names(tmp_path) == []


def test_what_was_set_aside_has_its_name_again_durably_when_the_block_raises(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with durable.recording() as ops, pytest.raises(KeyError), durable.set_aside(tmp_path / "d"):
        assert not (tmp_path / "d").exists()
        raise KeyError
    assert (tmp_path / "d").is_dir()
    assert kinds(ops) == ["rename", "fsync_dir", "rename", "fsync_dir"]


def test_a_sweep_takes_strays_and_nothing_else(tmp_path: Path) -> None:
    staged = durable.staging(tmp_path, "x")
    (staged / "f").write_bytes(b"x")
    (tmp_path / ".tmp-file").write_bytes(b"x")
    (tmp_path / "keep").write_bytes(b"x")
    assert sorted(durable.sweep(tmp_path)) == sorted([staged, tmp_path / ".tmp-file"])
    assert names(tmp_path) == ["keep"]
    assert durable.sweep(tmp_path / "missing") == []
