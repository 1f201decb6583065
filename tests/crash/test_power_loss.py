"""The power goes while a guest writes: what it was told is durable is there (D1). Everything that QEMU writes to the
host's file of the data disk is logged; disks are made of what a host may have kept of that."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet.vmm.command import MachineSpec
from tests.crash import power
from tests.crash.blocklog import BlockLog, Entry
from tests.crash.counting import COUNT, Loss, noticed
from tests.crash.power import Ack
from tests.vm.test_machine import prepare

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

ALL = os.environ.get("LIMPET_TEST_CRASH") == "all"
_DISKS = 5  # looked at by one machine
PHASES = {"synced": 40, "unnamed": 12, "unsynced": 12, "again": 25}


@pytest.fixture
def spec(pieces: Path, tmp_path: Path) -> Iterator[MachineSpec]:
    yield prepare(pieces, tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)


class Losses:
    """Disks after a power loss at several moments, and what is on them."""

    def __init__(self, pieces: Path, base: Path, log: Path, acks: list[Ack]) -> None:
        self._home, self._base, self._log, self.acks = pieces, base, BlockLog(log), acks
        self._states: list[tuple[int, list[Entry]]] = []

    def at(self, position: int, choice: random.Random | None = None) -> int:
        """Plan one; by which number `look` finds it."""
        self._states.append((position, self._log.survivors(position, choice)))
        return len(self._states) - 1

    def look(self) -> list[power.Found]:
        found: dict[int, power.Found] = {}
        work = self._base.parent
        # A kernel refuses to mount an older copy of a file system that it has seen.
        order = sorted(range(len(self._states)), key=lambda number: len(self._states[number][1]))
        for chunk in (order[begin : begin + _DISKS] for begin in range(0, len(order), _DISKS)):
            disks = [work / f"state-{number}.qcow2" for number in chunk]
            for number, disk in zip(chunk, disks, strict=True):
                self._log.replay(self._base, disk, self._states[number][1])
                power.inspect(disk)
            found |= dict(zip(chunk, asyncio.run(power.look(self._home, disks, work)), strict=True))
            for disk in disks:
                disk.unlink()
            COUNT.states += len(chunk)
        return [found[number] for number in range(len(self._states))]

    def demand(self, state: int, found: power.Found, *phases: str) -> None:
        """Raise Loss unless everything that was told before that moment is there."""
        position, _ = self._states[state]
        told = [ack for ack in self.acks if ack.position <= position]
        for phase in phases:
            if missing := found.missing(told, phase):
                COUNT.losses.append(complaint := f"{phase}: {missing} were acknowledged and are gone, at {position}")
                raise Loss(complaint)


def last(acks: list[Ack], phase: str) -> int:
    return max(ack.position for ack in acks if ack.phase == phase)


def test_what_was_synced_is_there_after_a_power_loss_at_any_moment(pieces: Path, spec: MachineSpec) -> None:
    """D1, and both negative controls: without fsync of the file, and of its directory, acknowledged ones are gone."""
    base, log = spec.data_disk.with_name("base"), spec.data_disk.with_name("log")
    shutil.copyfile(spec.data_disk, base)
    acks = asyncio.run(power.write(spec, log, PHASES))
    losses = Losses(pieces, base, log, acks)
    choice = random.Random(len(acks))
    safe = [losses.at(choice.choice([ack for ack in acks if ack.phase == "synced"]).position, choice)
            for _ in range(22 if ALL else 2)]  # fmt: skip
    unnamed, unsynced = losses.at(last(acks, "unnamed")), losses.at(last(acks, "unsynced"))
    end = losses.at(log.stat().st_size)
    found = losses.look()
    for state in [*safe, unnamed, unsynced, end]:
        losses.demand(state, found[state], "synced", "again")
    with noticed("unnamed: .* are gone"):
        losses.demand(unnamed, found[unnamed], "unnamed")
    with noticed("unsynced: .* are gone"):
        losses.demand(unsynced, found[unsynced], "unsynced")


@pytest.mark.skipif(not ALL, reason="make test-crash: one more boot")
def test_a_disk_whose_flushes_go_nowhere_is_noticed(pieces: Path, spec: MachineSpec) -> None:
    """D1, a negative control: with cache=unsafe nothing that was synced need be there."""
    base, log = spec.data_disk.with_name("base"), spec.data_disk.with_name("log")
    shutil.copyfile(spec.data_disk, base)
    losses = Losses(pieces, base, log, asyncio.run(power.write(spec, log, {"synced": 30}, flushes=False)))
    end = losses.at(log.stat().st_size)
    found = losses.look()
    with noticed("synced: .* are gone"):
        losses.demand(end, found[end], "synced")
