"""Whatever ends the daemon or a VM, wherever: nothing that was promised is lost, and nothing is left lying about.

`make test` kills the daemon at every point once and during recovery; `make test-crash` also makes each operation fail
at each of its points and kills VMs in the middle (LIMPET_TEST_CRASH=all), and does every operation again.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from limpet.models import State
from tests.crash.cases import OPERATIONS, Case, cases, suspend
from tests.crash.counting import COUNT, noticed
from tests.crash.recoveries import RECOVERIES
from tests.crash.world import World

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

ALL = os.environ.get("LIMPET_TEST_CRASH") == "all"
_LATER_S = 3  # seconds in which a daemon is cut off


@pytest.mark.parametrize("case", [case for case in cases() if ALL or case.first], ids=str)
def test_a_fault_in_the_middle_loses_nothing(world: World, case: Case) -> None:
    """VM-6, VM-8, VM-10, FRZ-4, FRZ-6: the sandbox is what it says, its data and its checkpoints are whole, no VM and
    no file is left over, and the operation can be done again."""
    operation = OPERATIONS[case.operation]
    world.ready()
    world.write(f"token-{COUNT.faults}")
    operation.prepare(world)
    error = world.crash(case.point, case.action, lambda: operation.run(world))
    if case.action == "kill":
        world.recover()
    else:
        assert error is not None or case.action == "machine" or not operation.told, "nobody was told"
        world.client.system.prune()
    if case.operation.startswith("pool"):
        world.drain()
    machine_died = case.action == "machine"
    world.check(
        states=(*operation.states, State.ERROR, State.STOPPED) if machine_died else operation.states,
        memory=operation.memory and not machine_died, goes_back=operation.goes_back, others=operation.others,
    )  # fmt: skip
    if operation.proof is not None and case.action == "kill":
        operation.proof(world)
    if ALL or (case.last and operation.told and operation.memory):
        world.write(f"token-{COUNT.faults}-again")
        operation.prepare(world)
        operation.run(world)
        if case.operation.startswith("pool"):
            world.drain()
    world.tidy()


@pytest.mark.parametrize(
    ("name", "point"),
    [(name, point) for name, known in RECOVERIES.items()
     for point in (*known.points.split(), *(known.more.split() if ALL else ()))],
)  # fmt: skip
def test_a_daemon_killed_while_it_recovers_is_recovered_from(world: World, name: str, point: str) -> None:
    """VM-10: recovery can be cut off, too."""
    recovery = RECOVERIES[name]
    world.ready()
    world.write(f"token-{COUNT.faults}")
    recovery.left(world)
    world.die_starting(point)
    world.recover()
    world.check(states=(State.RUNNING, State.STOPPED, State.SUSPENDED), memory=recovery.memory)
    if recovery.proof is not None:
        recovery.proof(world)
    world.tidy()


def test_the_early_checkpoint_can_still_be_gone_back_to(world: World) -> None:
    """FRZ-6, FRZ-7: after all of this."""
    world.ready()
    assert world.client.checkpoints.verify(world.early, boot=True).booted
    suspend(world)


# ── the checks themselves can fail ───────────────────────────────────────────────────────────────────────────────────

_LATE = """
from limpet.services.records import Records
update = Records.update
Records.update = lambda self, of, **new: self.by_id(of) if set(new) == {"disks"} else update(self, of, **new)
"""
_NO_COLLECTION = """
from limpet.services import garbage
async def collect(host):
    return 0
garbage.collect = collect
"""


@pytest.mark.parametrize("patch", ["", _LATE], ids=["as-it-is", "changed"])
def test_what_is_written_after_a_switch_survives_only_because_that_was_recorded_before(
    spoilt: World, patch: str
) -> None:
    """FRZ-6, and a negative control: a daemon that records new disks only after the switch, and ends in between, loses
    what the guest writes from then on."""
    world = spoilt
    world.stop_daemon()
    world.start_changed(patch)
    world.box.exec(f"sleep {_LATER_S}; echo later > /home/user/token; sync", detach=True)
    world.crash("instant.switch.after", "kill", world.box.checkpoint)
    time.sleep(_LATER_S + 1)
    for machine in world.machines():
        os.kill(machine, signal.SIGKILL)
    world.token = "later"
    world.recover()
    if not patch:
        world.check(states=(State.STOPPED, State.ERROR), memory=False)
        return
    with noticed("on the disk is"):
        world.check(states=(State.STOPPED, State.ERROR), memory=False)


def test_recovery_without_collection_is_noticed(spoilt: World) -> None:
    """A negative control: a daemon that leaves out a step of its recovery leaves something lying about."""
    world = spoilt
    world.crash("instant.overlay.after", "kill", world.box.checkpoint)
    world.start_changed(_NO_COLLECTION)
    with noticed("nothing needs"):
        world.check(states=(State.RUNNING,), memory=True)
    world.kill_daemon()
    world.recover()
    world.check(states=(State.RUNNING,), memory=True)
