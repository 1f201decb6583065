"""QEMU is killed under a writer that says what it has written: what was synced is there (D1), of all else at most the
last two seconds are gone (D2)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from limpet.client import Sandbox
from limpet.errors import Unavailable
from limpet.models import State
from tests.crash.counting import COUNT, Loss, noticed
from tests.crash.world import SHAPE, World, until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

ROUNDS = 12 if os.environ.get("LIMPET_TEST_CRASH") == "all" else 2
_LOST_S = 2.0
_HOME = "/home/user"

# A line is written to the end of `lines`, and now and then a file is replaced as careful programs do it. Each line is
# told with the time at which it was written. Arguments: whether to sync, and how often to write.
_WRITER = """
import os, sys, time
synced, pause = sys.argv[1] == "synced", float(sys.argv[2])
def put(name, text, flags):
    file = os.open(name, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    os.write(file, text.encode())
    if synced:
        os.fsync(file)
    os.close(file)
directory = os.open(".", os.O_RDONLY)
n = 0
while True:
    n += 1
    put("lines", f"{n} {time.time():.3f}\\n", os.O_APPEND)
    if n % 5 == 0:
        put("new", f"{n}", os.O_TRUNC)
        os.rename("new", "current")
    if synced:
        os.fsync(directory)
    print(n, f"{time.time():.3f}", flush=True)
    time.sleep(pause)
"""


@pytest.fixture(scope="module")
def written(worlds: object, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    world: World = worlds.get()  # type: ignore[attr-defined]
    world.client.config.set("sync.auto", "off")  # it would write out more than the guest does by itself
    box = world.client.sandboxes.create("writer", **SHAPE)
    try:
        yield box
    finally:
        box.remove(force=True, purge=True)
        world.client.config.set("sync.auto", "on")


def killed_under(box: Sandbox, how: str, pause: float, seconds: float, where: str = _HOME) -> tuple[int, float]:
    """The number of the last line that the writer told before its VM was killed, and when it wrote that."""
    box.wake()
    box.exec(f"mkdir -p {where}; cd {where}; rm -f lines new current; sync", user="root", cwd="/").check()
    told, begun = b"", 0.0
    command = ["python3", "-c", _WRITER, how, str(pause)]
    with contextlib.suppress(Unavailable), box.exec(command, user="root", cwd=where, stream=True) as writer:
        while (chunk := writer.read()) is not None:
            told += chunk.data
            begun = begun or time.monotonic()
            if begun and time.monotonic() - begun > seconds:
                pid, seconds = box.refresh().pid, float("inf")
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
    COUNT.faults += 1
    number, when = told[: told.rindex(b"\n")].splitlines()[-1].split()
    until(lambda: box.refresh().state == State.ERROR, 10, "nobody noticed that the VM is dead")
    return int(number), float(when)


def found(box: Sandbox, where: str = _HOME) -> tuple[list[int], float, int]:
    """After a new start: the numbers of the lines that are there, when the last was written, and the file's number (0
    when it has none)."""
    box.wake()
    text = box.exec(f"cat {where}/lines 2>/dev/null", user="root", cwd="/").text
    whole = text[: text.rfind("\n") + 1]  # what was not synced may end at the end of a page, within a line
    lines = [line.split() for line in whole.splitlines()]
    current = box.exec(f"cat {where}/current 2>/dev/null || echo 0", user="root", cwd="/").check().text
    COUNT.states += 1
    demand(bool(lines), "all lines are lost")
    demand(all(len(line) == 2 for line in lines), "there are holes in what was written")
    return [int(number) for number, _ in lines], float(lines[-1][1]), int(current) if current.strip().isdigit() else 0


def demand(condition: bool, complaint: str) -> None:
    if not condition:
        COUNT.losses.append(complaint)
        raise Loss(complaint)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_what_was_synced_is_there_after_the_vm_was_killed(written: Sandbox, seed: int) -> None:
    """D1: every line that the writer told, and the file that it replaced, whole."""
    told, _ = killed_under(written, "synced", 0, random.Random(seed).uniform(0.5, 3))
    numbers, _, current = found(written)
    demand(numbers == list(range(1, len(numbers) + 1)), f"the lines are not those that were written: {numbers[-20:]}")
    demand(numbers[-1] >= told, f"line {told} was synced, {numbers[-1]} is the last that is there")
    demand(current >= told - told % 5, f"file {told - told % 5} was synced, {current} is there")


def lost(box: Sandbox, seconds: float, where: str = _HOME) -> float:
    """How many seconds before the kill what is there was written."""
    _, when = killed_under(box, "unsynced", 0.02, seconds, where)
    numbers, last, _ = found(box, where)
    demand(numbers == list(range(1, len(numbers) + 1)), f"there are holes in what was written: {numbers[-20:]}")
    return when - last


@pytest.mark.parametrize("where", [_HOME, "/srv/written"], ids=["data disk", "root disk"])
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_of_what_was_not_synced_at_most_two_seconds_are_gone(written: Sandbox, seed: int, where: str) -> None:
    """D2: Btrfs writes everything out when it commits; on the root disk it is the kernel's intervals that count."""
    gone = lost(written, random.Random(seed).uniform(4, 7), where)
    print(f"{gone:.2f} s lost")
    demand(gone <= _LOST_S, f"{gone:.2f} s are lost, {_LOST_S} are promised")


def test_a_guest_that_keeps_its_writes_to_itself_is_noticed(written: Sandbox) -> None:
    """D2, a negative control: with the kernel's own intervals more is lost."""
    written.wake()
    intervals = "echo 3000 > /proc/sys/vm/dirty_expire_centisecs; echo 3000 > /proc/sys/vm/dirty_writeback_centisecs"
    written.exec(f"{intervals}; /run/limpet/agent/bin/busybox mount -o remount,commit=30 /home", user="root").check()
    with noticed("are lost|holes"):
        gone = lost(written, 5)
        demand(gone <= _LOST_S, f"{gone:.2f} s are lost, {_LOST_S} are promised")
