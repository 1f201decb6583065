"""The simulator itself: exactly the disks that a power loss may leave, no fewer and no others."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from limpet import durable
from tests.crash.counting import Loss, noticed
from tests.crash.proving import Workload, prove
from tests.crash.simulator import Disk, State


def states_after(directory: Path, work: Callable[[], object], limit: int = 1000) -> list[State]:
    """What may be left when the power goes right after `work`."""
    disk = Disk(directory)
    with durable.recording() as ops:
        work()
    for op in ops:
        disk.apply(op)
    return list(disk.states(len(ops), limit, random.Random(0)))


def looks(states: list[State]) -> set[frozenset[tuple[str, bytes]]]:
    """The files of each."""
    return {frozenset((name, content) for name, content, _ in state.files) for state in states}


def files(**content: bytes) -> frozenset[tuple[str, bytes]]:
    return frozenset(content.items())


def write_new(path: Path, *pieces: bytes) -> None:
    """As a careless program does it: no fsync."""
    file = durable.NewFile(path, 0o600)
    for piece in pieces:
        file.write(piece)
    file._close()


def test_a_file_that_was_not_synced_is_there_or_gone_or_cut_off_or_zeroed(tmp_path: Path) -> None:
    found = looks(states_after(tmp_path, lambda: write_new(tmp_path / "f", b"one", b"two")))
    assert found == {files(), files(f=b""), files(f=b"one"), files(f=b"onetwo"), files(f=bytes(6))}


def test_a_synced_file_whose_name_was_not_is_whole_or_gone(tmp_path: Path) -> None:
    def work() -> None:
        with durable.new_file(tmp_path / "f") as file:
            file.write(b"x")

    assert looks(states_after(tmp_path, work)) == {files(), files(f=b"x")}


def test_a_replaced_file_is_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    assert looks(states_after(tmp_path, lambda: durable.replace_file(tmp_path / "f", b"new"))) == {files(f=b"new")}


def test_a_rename_whose_directory_was_not_synced_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """And never the new one without its creation."""
    (tmp_path / "f").write_bytes(b"old")

    def work() -> None:
        with durable.new_file(tmp_path / "n") as file:
            file.write(b"new")
        durable.rename(tmp_path / "n", tmp_path / "f")

    assert looks(states_after(tmp_path, work)) == {files(f=b"old"), files(f=b"old", n=b"new"), files(f=b"new")}


def test_a_symlink_is_replaced_whole_or_not(tmp_path: Path) -> None:
    (tmp_path / "HEAD").symlink_to("1")
    found = states_after(tmp_path, lambda: durable.replace_symlink(tmp_path / "HEAD", "2"))
    assert {text for state in found for name, text in state.links if name == "HEAD"} == {"1", "2"}
    assert all(any(name == "HEAD" for name, _ in state.links) for state in found)


def test_of_two_removals_either_may_be_lost(tmp_path: Path) -> None:
    """No order between them."""
    for name in "ab":
        (tmp_path / name).write_bytes(b"")

    def work() -> None:
        durable.unlink(tmp_path / "a")
        durable.unlink(tmp_path / "b")

    assert looks(states_after(tmp_path, work)) == {files(), files(a=b""), files(b=b""), files(a=b"", b=b"")}


def test_a_file_in_a_directory_whose_name_was_not_synced_goes_with_it(tmp_path: Path) -> None:
    """A directory's own fsync is about what is in it."""

    def work() -> None:
        durable.mkdir(tmp_path / "d")
        durable.replace_file(tmp_path / "d" / "f", b"x")

    assert looks(states_after(tmp_path, work)) == {files(), files(**{"d/f": b"x"})}


def test_a_file_moved_to_another_directory_is_in_one_of_them(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "f").write_bytes(b"x")
    found = states_after(tmp_path, lambda: durable.rename(tmp_path / "a" / "f", tmp_path / "b" / "f"))
    assert looks(found) == {files(**{"a/f": b"x"}), files(**{"b/f": b"x"})}


def test_two_exchanged_directories_are_so_or_so(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"")
    found = states_after(tmp_path, lambda: durable.exchange(tmp_path / "a", tmp_path / "b"))
    assert looks(found) == {files(**{"a/a": b"", "b/b": b""}), files(**{"a/b": b"", "b/a": b""})}


def test_the_names_of_one_file_stay_the_names_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    both = [state for state in states_after(tmp_path, lambda: durable.link(tmp_path / "f", tmp_path / "g"))
            if len(state.files) == 2]  # fmt: skip
    both[0].materialize(tmp_path / "made")
    assert (tmp_path / "made" / "f").stat().st_ino == (tmp_path / "made" / "g").stat().st_ino


def test_what_others_wrote_counts_from_the_fsync_on(tmp_path: Path) -> None:
    """A tool made it; a library removed it."""
    (tmp_path / "gone").write_bytes(b"")
    disk = Disk(tmp_path)
    with durable.recording() as ops:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "f").write_bytes(b"x")
        (tmp_path / "d" / "l").symlink_to("f")
        (tmp_path / "gone").unlink()
        durable.sync_tree(tmp_path)
    for op in ops:
        disk.apply(op)
    (state,) = disk.states(len(ops), 10, random.Random(0))
    state.materialize(tmp_path / "made")
    assert (tmp_path / "made" / "d" / "f").read_bytes() == b"x"
    assert os.readlink(tmp_path / "made" / "d" / "l") == "f"
    assert not (tmp_path / "made" / "gone").exists()
    assert disk.learned


def test_too_many_states_are_sampled_with_the_extremes_among_them_and_the_same_each_time(tmp_path: Path) -> None:
    def work() -> None:
        for number in range(20):
            write_new(tmp_path / f"f{number}", b"x", b"y")

    found = states_after(tmp_path, work, limit=50)
    assert 20 < len(found) <= 200
    everything = {(f"f{number}", b"xy") for number in range(20)}
    assert everything in [set(look) for look in looks(found)] and frozenset() in looks(found)
    for number in range(20):
        (tmp_path / f"f{number}").unlink()
    assert looks(states_after(tmp_path, work, limit=50)) == looks(found)


# ── proofs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def replacing(path: Path) -> None:
    durable.replace_file(path / "f", b"new content")


def old_or_new(at: Path, acked: int, begun: int) -> None:
    assert (at / "f").read_bytes() in [[b"old", b"new content"][step] for step in (acked, begun)]


@pytest.mark.parametrize("omitted", ["fsync", "fsync_dir"])
def test_a_replacement_without_one_of_its_fsyncs_is_caught(omitted: str) -> None:
    """D5, negative controls: without the file's, it may be empty; without the directory's, it may be the old one though
    the new one was acknowledged."""
    workload = Workload(lambda path: (path / "f").write_bytes(b"old"), (("replace", replacing),))
    assert prove(workload, old_or_new).states >= 5
    with noticed("AssertionError"):
        prove(Workload(workload.setup, workload.steps, omit={omitted}), old_or_new)


def test_a_check_that_fails_tells_workload_and_state(tmp_path: Path) -> None:
    workload = Workload(lambda path: (path / "f").write_bytes(b"old"), (("replace", replacing),), omit={"fsync"})
    with noticed(r"replace; after \d effects: .*f \(0 B\)"):
        prove(workload, old_or_new)
    assert issubclass(Loss, AssertionError)
