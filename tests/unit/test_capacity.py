"""How many more VMs fit, on a host whose memory and disk the test decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from limpet import durable
from limpet.errors import FailedPrecondition, InsufficientSpace
from limpet.models import SandboxSpec
from limpet.paths import Paths
from limpet.services import capacity

MIB, GIB = 1 << 20, 1 << 30
SPEC = SandboxSpec(memory_mib=512)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path, tmp_path, tmp_path)


class Room:
    """A host with this much free."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._meminfo = tmp_path / "meminfo"
        monkeypatch.setattr(capacity, "_MEMINFO", self._meminfo)
        monkeypatch.setattr(durable, "free_bytes", lambda _path: self._disk)
        self.set(memory=16 * GIB, disk=100 * GIB)

    def set(self, *, memory: int, disk: int = 100 * GIB) -> None:
        self._meminfo.write_text(f"MemTotal: 1 kB\nMemFree: 2 kB\nMemAvailable: {memory >> 10} kB\n")
        self._disk = disk


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(tmp_path, monkeypatch)


def test_a_clone_counts_with_what_it_takes_and_not_with_its_whole_memory(paths: Paths, room: Room) -> None:
    """Issue 3: "50 sandboxes alive on this machine"; its RAM is mapped privately."""
    assert 64 * MIB <= capacity.each(SPEC) <= 128 * MIB
    assert capacity.each(SandboxSpec(memory_mib=8192)) > capacity.each(SPEC)
    room.set(memory=6 * GIB)
    assert capacity.fitting(paths, SPEC) >= 50


def test_as_many_fit_as_the_scarcer_of_memory_and_disk_allows(paths: Paths, room: Room) -> None:
    """FRZ-8"""
    one = capacity.each(SPEC)
    room.set(memory=512 * MIB + 3 * one)
    assert capacity.fitting(paths, SPEC) == 3
    room.set(memory=512 * MIB + 3 * one - MIB)
    assert capacity.fitting(paths, SPEC) == 2
    room.set(memory=16 * GIB, disk=5 * 64 * MIB)
    assert capacity.fitting(paths, SPEC) == 5
    room.set(memory=100 * MIB)
    assert capacity.fitting(paths, SPEC) == 0


def test_too_little_memory_is_refused_and_says_how_many_fit(paths: Paths, room: Room) -> None:
    """Issue 3, bad input."""
    room.set(memory=512 * MIB + 3 * capacity.each(SPEC))
    capacity.require(paths, SPEC, 3)
    with pytest.raises(FailedPrecondition, match="not enough memory for 4 more sandboxes: 3 fit") as refused:
        capacity.require(paths, SPEC, 4)
    assert "at most 3" in (refused.value.hint or "")


def test_too_little_disk_is_refused_as_such(paths: Paths, room: Room) -> None:
    """VM-19"""
    room.set(memory=16 * GIB, disk=2 * 64 * MIB)
    with pytest.raises(InsufficientSpace, match="no room on the disk for 4 more sandboxes: 2 fit"):
        capacity.require(paths, SPEC, 4)


def test_memory_is_what_this_host_says(paths: Paths) -> None:
    """The real /proc/meminfo."""
    assert 1 * MIB < capacity.available_memory() < 1 << 50


def test_a_kernel_that_does_not_tell_has_no_memory_to_give(paths: Paths, room: Room, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    assert capacity.available_memory() == 0 == capacity.fitting(paths, SPEC)
