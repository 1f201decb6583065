"""A daemon that is killed while it recovers from how an earlier one left the world."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.crash import keeping
from tests.crash.cases import fork, remove, suspend, with_twin
from tests.crash.world import World, until


def left_running(world: World) -> None:
    world.ready()
    world.kill_daemon()


def left_dead(world: World) -> None:
    """Nobody saw the VM die."""
    left_running(world)
    end_machines(world)


def end_machines(world: World) -> None:
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
    world.crash("purge.row.after", "kill", lambda: remove(world))


def left_half_purged(world: World) -> None:
    """It has a vault and a payload."""
    keeping.with_new_payload(world)
    world.client.sandboxes.get("new").sync()
    world.crash("purge.row.after", "kill", lambda: world.gone("new"))


def left_half_dropped(world: World) -> None:
    """Its vault is set aside, its row is there."""
    keeping.with_new_payload(world)
    world.client.sandboxes.get("new").sync()
    world.crash("vault.drop.after", "kill", lambda: world.gone("new"))


def left_half_committed(world: World) -> None:
    """A generation has its file, but HEAD names the one before. Who syncs next finds that."""
    world.ready()
    world.box.exec("date +%N > /home/user/noise; sync").check()
    world.crash("vault.commit.before", "kill", lambda: world.box.sync())


def left_half_published(world: World) -> None:
    """The new tree has the name, and nobody noted that."""
    keeping.with_payload(world)
    world.crash("payload.publish.exchange.after", "kill", lambda: keeping.publish(world))


def left_half_published_and_dead(world: World) -> None:
    left_half_published(world)
    end_machines(world)


def left_half_added(world: World) -> None:
    """The row has the payload, nobody else knows of it."""
    keeping.without_payload(world)
    world.crash("payload.add.recorded", "kill", lambda: keeping.add_payload(world))


def left_half_let_go(world: World) -> None:
    """The row has the payload no more, the VM still has its lock."""
    keeping.with_payload(world)
    world.crash("payload.rm.after", "kill", lambda: keeping.remove_payload(world))


@dataclass(frozen=True)
class Recovery:
    """How a daemon left the world, and where the next one is killed: always at `points`, at `more` when there is time.
    `memory`: as for operations. `proof`: what must be true besides, and work on."""

    left: Callable[[World], None]
    points: str
    more: str = ""
    memory: bool = True
    proof: Callable[[World], None] | None = None


RECOVERIES = {
    "running": Recovery(
        left_running,
        "reconcile.sweep.after reconcile.adopt.before reconcile.adopt.after reconcile.records.after "
        "reconcile.collect.after",
    ),
    "dead": Recovery(left_dead, "reconcile.demote.before reconcile.demote.after", memory=False),
    "half-made": Recovery(
        left_half_made, "reconcile.unfinished.before reconcile.unfinished.after",
        more="forget.row.before forget.row.after",
    ),
    "half-suspended": Recovery(left_half_suspended, "reconcile.suspended.before reconcile.suspended.after"),
    "half-removed": Recovery(
        left_half_removed, "",
        more="forget.files.before forget.row.after checkpoint.remove.before checkpoint.remove.after "
        "layer.delete.before layer.delete.after",
    ),
    "half-purged": Recovery(
        left_half_purged, "payload.forget.after",
        more="reconcile.sweep.after payload.forget.before vault.drop.before vault.drop.after forget.row.before "
        "forget.row.after",
        proof=keeping.check_host,
    ),
    "half-dropped": Recovery(
        left_half_dropped, "",
        more="reconcile.sweep.after reconcile.unfinished.after forget.row.before", proof=keeping.check_host,
    ),
    "half-committed": Recovery(
        left_half_committed, "vault.sweep.before", more="reconcile.adopt.after vault.sweep.after", proof=keeping.sync
    ),
    "half-published": Recovery(
        left_half_published, "payload.finish.before",
        more="payload.finish.after reconcile.sweep.after reconcile.adopt.before reconcile.adopt.after",
        proof=keeping.work_on,
    ),
    "half-published-dead": Recovery(
        left_half_published_and_dead, "",
        more="payload.finish.before payload.finish.after payload.release.before payload.release.after "
        "reconcile.demote.after",
        memory=False, proof=keeping.work_on,
    ),
    "half-added": Recovery(
        left_half_added, "payload.marker.before payload.seed.before",
        more="payload.lock.before payload.marker.after payload.give.before payload.give.after payload.volume.before "
        "payload.volume.after payload.seed.after payload.seeded.before payload.seeded.after",
        proof=keeping.work_on,
    ),
    "half-let-go": Recovery(
        left_half_let_go, "payload.unlock.after",
        more="payload.unlock.before payload.release.before payload.release.after reconcile.adopt.after",
        proof=keeping.check_host,
    ),
}  # fmt: skip
