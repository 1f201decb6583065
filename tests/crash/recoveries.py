"""A daemon that is killed while it recovers from how an earlier one left the world."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.crash.cases import fork, remove, suspend, with_twin
from tests.crash.world import World, until


def left_running(world: World) -> None:
    world.ready()
    world.kill_daemon()


def left_dead(world: World) -> None:
    """Nobody saw the VM die."""
    left_running(world)
    for machine in world.machines():
        os.kill(machine, signal.SIGKILL)
    until(lambda: not world.machines(), 10, "the VM does not die")


def left_half_made(world: World) -> None:
    world.ready()
    world.crash("start.launch.after", "kill", lambda: fork(world))


def left_half_suspended(world: World) -> None:
    world.ready()
    world.crash("suspend.record.after", "kill", lambda: suspend(world))


def left_half_removed(world: World) -> None:
    with_twin(world)
    world.crash("rm.checkpoints.before", "kill", lambda: remove(world))


@dataclass(frozen=True)
class Recovery:
    """How a daemon left the world, and where the next one is killed. `memory`: as for operations."""

    left: Callable[[World], None]
    points: str
    memory: bool = True


RECOVERIES = {
    "running": Recovery(
        left_running,
        "reconcile.sweep.after reconcile.adopt.before reconcile.adopt.after reconcile.records.after "
        "reconcile.collect.after",
    ),
    "dead": Recovery(left_dead, "reconcile.demote.before reconcile.demote.after", memory=False),
    "half-made": Recovery(
        left_half_made, "reconcile.unfinished.before reconcile.unfinished.after forget.row.before forget.row.after"
    ),
    "half-suspended": Recovery(left_half_suspended, "reconcile.suspended.before reconcile.suspended.after"),
    "half-removed": Recovery(
        left_half_removed, "checkpoint.remove.before checkpoint.remove.after layer.delete.before layer.delete.after"
    ),
}
