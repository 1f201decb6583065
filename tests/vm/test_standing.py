"""Sandboxes that stand still: paused, suspended, waiting in the pool; and daemons that die meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Client, errors
from limpet.client import Sandbox
from limpet.models import Stage
from limpet.paths import discover
from tests.vm.kit import (
    clock_error,
    count,
    counts_on,
    daemon_pid,
    hidden_rows,
    qemu_of,
    remains,
    shell,
    start_counter,
    wait_until,
)  # fmt: skip

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def box(client: Client) -> Iterator[Sandbox]:
    """A sandbox with a process that counts in memory."""
    box = client.sandboxes.create("still", memory_mib=512)
    start_counter(box)
    yield box
    box.remove(force=True, purge=True)


def alive(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_pause_stops_every_process_and_the_next_command_lets_it_go_on(box: Sandbox) -> None:
    """VM-18, GST-3: no processor time is used; then the same processes go on, and the clock is right."""
    counted, pid = count(box), box.refresh().pid
    assert box.pause().state == "paused"
    used = Path(f"/proc/{pid}/stat").read_text().split()[13:15]
    time.sleep(2.0)
    assert sum(map(int, Path(f"/proc/{pid}/stat").read_text().split()[13:15])) - sum(map(int, used)) < 50  # of 200
    assert box.pause().state == "paused"
    assert count(box) - counted < 10  # two seconds would have been ten
    assert (box.refresh().state, box.info.pid) == ("running", pid)
    assert clock_error(box) <= 0.1
    counts_on(box, counted)
    box.pause()
    assert box.resume().state == "running"
    assert box.resume().state == "running"


def test_suspend_ends_the_process_and_the_next_command_brings_the_memory_back(box: Sandbox, client: Client) -> None:
    """FRZ-6, GST-3: a checkpoint that is used up by the resume; ids of the machine stay, boot id and clock are new."""
    counted, before = count(box), box.refresh()
    who = shell(box, "hostname; cat /etc/machine-id")
    assert box.suspend().state == "suspended"
    assert not alive(before.pid)
    [checkpoint] = box.checkpoints()
    assert (checkpoint.made_by, checkpoint.kind) == ("suspend", "full")
    with pytest.raises(errors.FailedPrecondition, match="still is suspended to"):
        client.checkpoints.remove(checkpoint.id)
    assert box.suspend().state == "suspended"
    time.sleep(0.5)
    assert count(box) >= counted
    after = box.refresh()
    assert (after.state, after.incarnation) == ("running", before.incarnation + 1)
    assert after.boot_id != before.boot_id
    assert clock_error(box) <= 0.1
    assert shell(box, "hostname; cat /etc/machine-id") == who
    counts_on(box, count(box))
    assert box.checkpoints() == []
    assert not remains(client)
    box.suspend()  # and once more, from what it went on from
    counts_on(box, counted)


def test_an_idle_sandbox_is_suspended_but_not_one_that_is_in_use(box: Sandbox, client: Client) -> None:
    """VM-16: told in the events; the next command finds everything."""
    seen = max((event.seq for event in client.events()), default=0)
    box.set(idle_suspend=0.5)
    with box.exec(["sleep", "5.5"], stream=True, cwd="/") as command:  # longer than the period of looking
        assert command.result().exit_code == 0
        assert box.refresh().state == "running"
    wait_until(lambda: box.refresh().state == "suspended", 15)
    kinds = [(event.kind, event.data.get("why")) for event in client.events(seen) if event.sandbox == "still"]
    assert ("sandbox.expired", "idle suspend") in kinds
    box.set(idle_suspend=0)
    counts_on(box, count(box))
    assert box.refresh().spec.idle_suspend is None


def test_a_suspended_sandbox_whose_memory_is_damaged_can_still_boot_its_disks(
    box: Sandbox, client: Client, home: Path
) -> None:
    """FRZ-6, FRZ-7: it is not started from what is damaged and stays suspended; restore --disk-only gives it up."""
    shell(box, "echo kept > /home/user/kept; sync")
    box.suspend()
    [checkpoint] = box.checkpoints()
    state = discover(home).checkpoints / checkpoint.id / "state"
    os.truncate(state, state.stat().st_size - 1)
    for go_on in (box.resume, lambda: box.exec(["true"])):
        with pytest.raises(errors.BadRequest, match="state has"):
            go_on()
        assert box.refresh().state == "suspended"
    assert box.restore(checkpoint.id, disk_only=True).sandbox.state == "stopped"
    box.start()
    assert shell(box, "cat /home/user/kept") == "kept\n"
    client.checkpoints.remove(checkpoint.id)
    assert not remains(client)


def test_what_stands_still_survives_kill_9_of_the_daemon_but_nobodys_vm_does_not(own_home: Path) -> None:
    """VM-8, VM-10, FRZ-6: paused stays paused, suspended suspended; a VM of the pool that nobody claimed ends."""
    stages: set[str] = set()

    def note(stage: Stage) -> None:
        stages.add(stage.name)

    with Client(home=own_home) as c:
        first = c.sandboxes.create("first", memory_mib=512)
        counter = start_counter(first)
        c.config.set("pool.size", "1")
        wait_until(lambda: hidden_rows(own_home, "pooled"), 30)
        pooled = qemu_of(own_home, hidden_rows(own_home, "pooled")[0])
        assert [known.name for known in c.sandboxes.list()] == ["first"]
        second = c.sandboxes.create("second", memory_mib=512, on_stage=note)
        assert stages == {"wake"}
        assert second.refresh().pid == pooled
        assert shell(second, "hostname; cat /etc/hostname").split() == ["second"] * 2
        assert shell(second, "cat /etc/machine-id") != shell(first, "cat /etc/machine-id")
        assert clock_error(second) <= 0.1
        wait_until(lambda: hidden_rows(own_home, "pooled"), 30)
        left = qemu_of(own_home, hidden_rows(own_home, "pooled")[0])
        counted, paused = count(first), first.pause()
        shell(second, "echo memory > /dev/shm/file")
        second.suspend()
        os.kill(daemon_pid(own_home), signal.SIGKILL)
    with Client(home=own_home) as c:
        c.config.set("pool.size", "0")
        first, second = c.sandboxes.get("first"), c.sandboxes.get("second")
        assert (first.info.state, first.info.pid) == ("paused", paused.pid)
        assert second.info.state == "suspended"
        wait_until(lambda: not alive(left))
        assert shell(second, "cat /dev/shm/file") == "memory\n"
        counts_on(first, counted)
        assert counter.id in {known.id for known in first.execs()}
        assert not hidden_rows(own_home, "pooled")
        assert not remains(c)
