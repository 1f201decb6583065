"""The operations that are cut off, and at which points each of them is.

An operation is done by `run`, which also proves that it worked and leaves the world as it was, whatever an earlier,
cut-off run left behind. `prepare` brings the world to where it begins.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limpet.errors import NotFound
from limpet.models import State
from tests.crash import keeping
from tests.crash.world import EARLY, SHAPE, Action, World, until

R, P, S, X, E = State.RUNNING, State.PAUSED, State.SUSPENDED, State.STOPPED, State.ERROR


@dataclass(frozen=True)
class Operation:
    """`points`: where the daemon is killed, and made to fail but at those in `unraised`; `machine`: where VMs are
    killed. `states`: what the box may be after a crash in the middle. `memory`: whether its memory must have lasted.
    `goes_back`: the early token may be on its disk. `others`: sandboxes that may be there. `told`: whether whoever
    asked for it learns of a failure; it may be nobody, or there is another way. `proof`: of more, after a kill."""

    run: Callable[[World], None]
    points: str
    prepare: Callable[[World], None] = World.ready
    machine: str = ""
    unraised: str = ""
    states: tuple[State, ...] = (R,)
    memory: bool = True
    goes_back: bool = False
    others: tuple[str, ...] = ()
    told: bool = True
    proof: Callable[[World], None] | None = None


@dataclass(frozen=True)
class Case:
    """One fault. `first`: the first that kills the daemon at this point; `last`: the last one of its operation."""

    operation: str
    point: str
    action: Action
    first: bool = False
    last: bool = False

    def __str__(self) -> str:
        return f"{self.operation}-{self.point}-{self.action}"


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


def checkpoint(world: World) -> None:
    made = world.box.checkpoint()
    assert world.client.checkpoints.verify(made.id).ok
    world.client.checkpoints.remove(made.id)


def disk_checkpoint(world: World) -> None:
    world.box.checkpoint(disk_only=True)


def with_checkpoint(world: World) -> None:
    world.ready()
    world.box.checkpoint(disk_only=True, label="doomed")


def remove_checkpoint(world: World) -> None:
    with contextlib.suppress(NotFound):
        world.client.checkpoints.remove("box@doomed")


def fold(world: World) -> None:
    """Removing a checkpoint leaves a layer that is only in the way: the daemon folds it by itself."""
    remove_checkpoint(world)
    layers = world.home / "data" / "layers"
    before = {path.name for path in layers.iterdir()}
    until(lambda: bool(before - {path.name for path in layers.iterdir()}) or not world.alive(), 20, "nothing is folded")


def with_checkpoint_stopped(world: World) -> None:
    with_checkpoint(world)
    world.box.stop()


def restore(world: World) -> None:
    world.box.restore(EARLY, force=True)
    world.token = EARLY
    assert world.read(world.box) == (EARLY, EARLY)
    world.forget_checkpoints()


def undo(world: World) -> None:
    world.box.undo()
    world.token = EARLY
    assert world.read(world.box) == (EARLY, EARLY)
    world.forget_checkpoints()


def restore_as(world: World) -> None:
    world.gone("back")
    world.box.restore(EARLY, as_name="back")
    back = world.client.sandboxes.get("back")
    assert world.read(back) == (EARLY, EARLY)
    world.gone("back")


# ── copies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def fork(world: World) -> None:
    world.gone("twin")
    (twin,) = world.box.fork(name="twin")
    assert world.read(twin) == (world.token, world.token)
    world.gone("twin")


def with_twin(world: World) -> None:
    """A sandbox with a checkpoint and layers that nothing else needs."""
    world.ready()
    if not any(box.name == "twin" for box in world.client.sandboxes.list()):
        world.box.fork(name="twin")[0].checkpoint(disk_only=True)


def remove(world: World) -> None:
    world.gone("twin")
    assert [box.name for box in world.client.sandboxes.list()] == ["box"]


# ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def create(world: World) -> None:
    world.gone("new")
    new = world.client.sandboxes.create("new", **SHAPE)
    assert new.exec("echo alive").text == "alive\n"
    world.gone("new")


def pause(world: World) -> None:
    world.box.pause()
    world.box.resume()


def paused(world: World) -> None:
    world.ready()
    world.box.pause()


def wake(world: World) -> None:
    world.wake(world.box)
    assert world.read(world.box)[0] == world.token


def suspend(world: World) -> None:
    world.box.suspend()
    wake(world)


def suspended(world: World) -> None:
    world.ready()
    world.box.suspend()


def stopped(world: World) -> None:
    world.ready()
    world.box.stop()


def stop(world: World) -> None:
    world.box.stop()


def kill(world: World) -> None:
    world.box.kill()


# ── images, templates, the pool ──────────────────────────────────────────────────────────────────────────────────────


def commit(world: World) -> None:
    forget_image(world, "snap")
    made = world.box.commit("snap")
    assert world.client.images.verify(made.image.name).ok
    forget_image(world, "snap")


def without_image(world: World) -> None:
    world.ready()
    forget_image(world, "tiny")


def forget_image(world: World, name: str) -> None:
    with contextlib.suppress(NotFound):
        world.client.images.remove(name)
    world.client.images.prune()
    assert not (world.home / "data" / "images" / name).exists()


def import_image(world: World) -> None:
    """A root file system that is nothing but one file."""
    file = world.home / "tiny.tar"
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo("bin/sh")
        member.size, member.mode = 4, 0o755
        tar.addfile(member, io.BytesIO(b"\x7fELF"))
    world.client.images.import_(file, name="tiny", replace=True)
    assert world.client.images.verify("tiny").ok


def remove_image(world: World) -> None:
    forget_image(world, "tiny")


def export_image(world: World) -> None:
    file = world.home / "out" / "tiny.limpet"
    world.client.images.export("tiny", file, replace=True)
    world.client.images.import_(file, name="copy", replace=True)
    forget_image(world, "copy")


def with_image(world: World) -> None:
    world.ready()
    import_image(world)
    (world.home / "out").mkdir(exist_ok=True)
    for stray in (world.home / "out").glob(".tmp-*"):  # in a directory of the user's nobody sweeps
        for file in stray.iterdir():
            file.unlink()
        stray.rmdir()


SMALL: dict[str, Any] = {"vcpus": 1, "memory_mib": 256, "network": "none"}


def build_template(world: World) -> None:
    built = world.client.templates.build("base", **SMALL)
    new = world.client.sandboxes.create("new", **SMALL)
    assert new.exec("echo alive").text == "alive\n"
    world.gone("new")
    world.client.templates.remove(built.key)


def with_template(world: World) -> None:
    world.ready()
    world.client.templates.build("base", **SMALL)


def remove_template(world: World) -> None:
    for template in world.client.templates.list():
        if template.memory_mib == SMALL["memory_mib"]:
            world.client.templates.remove(template.key)


def fill_pool(world: World) -> None:
    """Have one warm VM."""
    world.client.config.set("pool.size", "1")
    until(lambda: "pooled" in world.pooled() or not world.alive(), 15, "the pool is not filled")


def drained(world: World) -> None:
    world.ready()
    world.drain()
    create(world)  # its shape is what the pool stands for


def filled(world: World) -> None:
    drained(world)
    fill_pool(world)


OPERATIONS = {
    "checkpoint": Operation(
        checkpoint,
        "instant.overlay.before instant.overlay.after instant.switch.before capture.begin.before capture.begin.after "
        "capture.disks.before capture.disks.after capture.memory.after instant.switch.after checkpoint.publish.before "
        "checkpoint.publish.after checkpoint.parent.before",
        machine="instant.switch.before capture.begin.after capture.disks.after capture.memory.after",
    ),
    "disk-checkpoint": Operation(
        disk_checkpoint, "switch.disks.before switch.disks.after", machine="switch.disks.before switch.disks.after"
    ),
    "checkpoint-rm": Operation(remove_checkpoint, "checkpoint.remove.before checkpoint.remove.after", with_checkpoint),
    "fold": Operation(fold, "fold.before fold.after", with_checkpoint, told=False),
    "fold-stopped": Operation(fold, "fold.after", with_checkpoint_stopped, states=(X,), memory=False, told=False),
    "fork": Operation(
        fork,
        "fork.clone.before start.disks.before start.disks.after start.disks.recorded start.launch.before "
        "launch.spawn.after start.launch.after start.record.before start.record.after fork.clone.after",
        machine="start.launch.after", others=("twin",),
    ),
    "rm": Operation(
        remove,
        "end.machine.before end.machine.after end.record.before forget.files.before forget.row.before forget.row.after "
        "purge.row.before purge.row.after vault.drop.before vault.drop.after layer.delete.before layer.delete.after",
        with_twin, unraised="forget.row.after", others=("twin",),
    ),
    "create": Operation(create, "create.row.after start.launch.after", unraised="start.launch.after", others=("new",)),
    "pause": Operation(pause, "pause.stop.before pause.stop.after", machine="pause.stop.before", states=(R, P)),
    "go-on": Operation(wake, "resume.cont.before resume.cont.after", paused, states=(R, P)),
    "suspend": Operation(
        suspend, "capture.disks.after suspend.record.before suspend.record.after end.machine.after",
        machine="capture.disks.after suspend.record.before suspend.record.after", states=(R, S),
    ),
    "resume": Operation(
        wake,
        "resume.disks.before resume.disks.after launch.spawn.after start.launch.after start.record.before",
        suspended, machine="start.launch.after start.record.before", states=(R, S),
    ),
    "resume-forget": Operation(wake, "resume.forget.before", suspended, states=(R, S), told=False),
    "restore": Operation(
        restore, "restore.end.before restore.end.after restore.disks.before restore.disks.after start.launch.after",
        machine="restore.end.before start.launch.after", states=(R, X), memory=False, goes_back=True,
    ),
    "undo": Operation(undo, "restore.disks.after", states=(R, X), memory=False, goes_back=True),
    "restore-as": Operation(restore_as, "start.disks.after start.launch.after", others=("back",)),
    "stop": Operation(
        stop, "stop.flush.before stop.runtime.before stop.runtime.after stop.off.after",
        machine="stop.flush.before", unraised="stop.runtime.before stop.runtime.after", states=(R, X), memory=False,
    ),
    "start": Operation(wake, "start.launch.after", stopped, "start.launch.after", states=(R, X), memory=False),
    "kill": Operation(kill, "kill.signal.before kill.signal.after", states=(R, X), memory=False),
    "image-import": Operation(
        import_image, "image.publish.before image.publish.after image.tag.before image.tag.after", without_image
    ),
    "image-export": Operation(export_image, "image.export.before image.export.after", with_image),
    "image-rm": Operation(
        remove_image, "image.untag.before image.untag.after image.delete.before image.delete.after", with_image
    ),
    "commit": Operation(
        commit, "commit.frozen switch.disks.after image.tidy.before image.tidy.after image.flatten.after",
        machine="commit.frozen",
    ),
    "template": Operation(
        build_template,
        "template.capture.before template.capture.after template.publish.before template.publish.after",
        machine="template.capture.before", others=("new",),
    ),
    "template-rm": Operation(remove_template, "template.remove.before template.remove.after", with_template),
    "pool-fill": Operation(fill_pool, "pool.park.before pool.park.after", drained, told=False),
    "pool-claim": Operation(
        create, "pool.claim.after pool.wake.before pool.wake.after", filled, unraised="pool.claim.after",
        machine="pool.wake.before", others=("new",), told=False,
    ),
    "sync": Operation(
        keeping.sync,
        "sync.snapshot.before sync.snapshot.after sync.send.before sync.commit.before sync.commit.after "
        "sync.forget.before sync.forget.after",
        keeping.unsynced, machine="sync.snapshot.after sync.send.before sync.forget.before", told=False,
    ),
    "vault-copy": Operation(fork, "vault.copy.before vault.copy.after", keeping.synced, others=("twin",)),
    "vault-gc": Operation(keeping.collect, "vault.gc.before vault.gc.after", keeping.synced),
    "vault-repair": Operation(keeping.repair, "vault.repair.before vault.repair.after", keeping.synced),
    "vault-restore": Operation(
        keeping.restore_file, "vault.restore.guest.before vault.restore.guest.after", keeping.synced,
        machine="vault.restore.guest.before",
    ),
    "trash": Operation(keeping.trash, "rm.trash.before rm.trash.after", keeping.with_twin, others=("twin",)),
    "undelete": Operation(
        keeping.undelete, "undelete.row.before undelete.row.after", keeping.trashed, others=("twin",)
    ),
    "payload-add": Operation(
        keeping.add_payload,
        "payload.add.recorded payload.give.before payload.give.after payload.volume.before payload.volume.after "
        "payload.seed.before payload.seed.after payload.seeded.before payload.seeded.after",
        keeping.without_payload, machine="payload.volume.after payload.seed.before",
    ),
    "payload-publish": Operation(
        keeping.publish, "", keeping.with_payload,
        machine="payload.publish.build.before payload.publish.exchange.before payload.publish.exchange.after",
    ),
    "payload-rm": Operation(
        keeping.remove_payload,
        "payload.take_out.before payload.take_out.after payload.rm.before payload.rm.after payload.unlock.before "
        "payload.unlock.after",
        keeping.with_payload, machine="payload.take_out.before", proof=keeping.let_go,
        unraised="payload.unlock.before payload.unlock.after",
    ),
    "payload-purge": Operation(
        keeping.purge_payload, "payload.forget.before payload.forget.after", keeping.with_new_payload,
        others=("new",), proof=keeping.check_host,
    ),
}  # fmt: skip


def cases() -> list[Case]:
    """Every fault, in the order of the operations."""
    found: list[Case] = []
    killed: set[str] = set()
    for name, operation in OPERATIONS.items():
        points = operation.points.split()
        found += [Case(name, point, "kill", point not in killed, point == points[-1]) for point in points]
        killed |= set(points)
        found += [Case(name, point, "raise") for point in points if point not in operation.unraised.split()]
        found += [Case(name, point, "machine") for point in operation.machine.split()]
    return found
