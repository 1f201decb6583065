"""The operations that keep what a guest writes: syncs, vaults, payloads, the trash."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from limpet.client import Sandbox
from limpet.errors import NotFound
from tests.crash.world import SHAPE, TOKEN, World, until

_CONTENT = b"was on the host before\n"
_MOUNT = "/workspace/data"


# ── vaults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def sync(world: World) -> None:
    """What was written before is in the generation that is answered."""
    generation = world.box.sync().generation
    assert generation is not None
    assert world.box.vault.read(TOKEN, at=generation) == f"{world.token}\n".encode()


def unsynced(world: World) -> None:
    """There is something to be synced, whatever the daemon does by itself."""
    world.ready()
    world.client.config.set("sync.auto", "off")
    world.box.exec("date +%N > /home/user/noise; sync").check()


def collect(world: World) -> None:
    world.client.vaults.gc("box")
    world.check_vault()


def repair(world: World) -> None:
    (checked,) = world.client.vaults.repair("box")
    assert checked.ok and not checked.repaired


def restore_file(world: World) -> None:
    """Into the running guest, where it was changed since."""
    world.box.exec(f"echo changed > {TOKEN}.copy; sync").check()
    world.box.vault.restore(TOKEN)
    assert world.read(world.box)[0] == world.token


def synced(world: World) -> None:
    world.ready()
    sync(world)


# ── the trash ────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_twin(world: World) -> None:
    world.ready()
    world.gone("twin")
    world.empty_trash()
    world.box.fork(name="twin")


def trash(world: World) -> None:
    with contextlib.suppress(NotFound):
        world.client.sandboxes.get("twin").remove(force=True)
    assert [entry.name for entry in world.client.trash.list()] == ["twin"]
    world.empty_trash()


def trashed(world: World) -> None:
    with_twin(world)
    world.client.sandboxes.get("twin").remove(force=True)


def undelete(world: World) -> None:
    with contextlib.suppress(NotFound):
        world.client.trash.undelete("twin")
    twin = world.client.sandboxes.get("twin")
    twin.wake()
    assert world.read(twin)[0] == world.token
    twin.remove(force=True, purge=True)


# ── payloads ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def host_directory(world: World) -> Path:
    return world.home / "payload" / "host"


def _bare(world: World) -> None:
    """The host directory as it is without a payload."""
    shutil.rmtree(world.home / "payload", ignore_errors=True)
    host_directory(world).mkdir(parents=True)
    (host_directory(world) / "kept").write_bytes(_CONTENT)


def without_payload(world: World) -> None:
    world.ready()
    _remove_all(world.box)
    _bare(world)


def with_payload(world: World) -> None:
    without_payload(world)
    world.box.payloads.add(host_directory(world), _MOUNT)


def add_payload(world: World) -> None:
    """What the host has is in the guest, what the guest writes comes back; then it is let go."""
    if not world.box.payloads.list():
        world.box.payloads.add(host_directory(world), _MOUNT)
    assert world.box.exec(["cat", f"{_MOUNT}/kept"]).check().stdout == _CONTENT
    publish(world)
    remove_payload(world)


def publish(world: World) -> None:
    """What the guest writes is on the host."""
    world.box.exec(f"echo {world.token} > {_MOUNT}/new; sync").check()
    until(lambda: _published(world) or not world.alive(), 15, "what the guest wrote is not published")


def work_on(world: World) -> None:
    """The payload is there, and goes both ways."""
    assert world.box.payloads.list(), "the payload is gone"
    world.token = f"{world.token}-on"
    world.write(world.token)
    add_payload(world)


def let_go(world: World) -> None:
    """The payload is there and works, or it is gone without a trace."""
    if world.box.payloads.list():
        publish(world)
    else:
        check_host(world)


def remove_payload(world: World) -> None:
    _remove_all(world.box)
    check_host(world)


def check_host(world: World) -> None:
    """The host directory has all that it had, and nothing of limpet's lies in it or beside it, but for a while what was
    replaced, for those who still read there."""
    assert (host_directory(world) / "kept").read_bytes() == _CONTENT
    until(lambda: _strays(world) == [], 10, f"left behind: {_strays(world)}")


def _strays(world: World) -> list[str]:
    found = [str(path) for path in (world.home / "payload").iterdir() if ".old-" not in path.name]
    return [path for path in found if ".limpet" in path] + [
        str(path) for path in host_directory(world).rglob(".limpet*")
    ]


def _published(world: World) -> bool:
    new = host_directory(world) / "new"
    return new.is_file() and new.read_text() == f"{world.token}\n"


def _remove_all(box: Sandbox) -> None:
    for payload in box.payloads.list():
        with contextlib.suppress(NotFound):
            box.payloads.remove(payload.payload.id)


def with_new_payload(world: World) -> None:
    """Another sandbox has it, to be gone with it."""
    without_payload(world)
    world.gone("new")
    world.client.sandboxes.create("new", payloads=[(host_directory(world), _MOUNT)], **SHAPE)


def purge_payload(world: World) -> None:
    world.gone("new")
    check_host(world)
