"""A payload's host directory without a VM: published to, locked, unlocked; and what is true after a crash in that."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

from limpet import durable
from limpet.errors import Unimplemented
from limpet.services.payloads import locking, marker, seeding
from limpet.vault import Generation
from tests.crash.killing import left_by
from tests.unit import payload_kit as kit

_OLD = {"a": b"one", "sub/b": b"b"}
_NEW = {**_OLD, "a": b"two"}
_EDIT = b"edited"
_worlds: dict[Path, tuple[kit.World, Generation, Generation]] = {}


def setup(directory: Path) -> None:
    """One generation is published, the next one is there."""
    world = kit.World(directory / "world", dict(_OLD))
    first = world.generation()
    world.publish(first)
    _worlds[directory] = (world, first, world.generation(kit.write("a", b"two")))


def publish(directory: Path) -> None:
    world, first, second = _worlds[directory]
    world.publish(second, first)


def publish_without_exchange(directory: Path) -> None:
    with mock.patch.object(durable, "exchange", side_effect=Unimplemented("as on some file systems")):
        publish(directory)


def check(directory: Path, acked: int, begun: int) -> None:
    """One generation or the other, with our marker; published anew, nothing is left beside it."""
    world, first, second = _worlds[directory]
    publisher = world.restarted()
    publisher.recover()
    found = kit.files(world.host)
    assert found in ([_OLD, _NEW][acked], [_OLD, _NEW][begun]), found
    publisher.look()  # no drift is seen in what a crash left
    known = publisher.state.published
    world.publish(second, {1: first, 2: second}[known.generation] if known and known.generation else None)
    assert kit.files(world.host) == _NEW
    for tree in publisher.replaced:
        tree.expire()
    assert publisher.tend() == [] and world.beside == []


def check_going_on(directory: Path) -> None:
    """One generation or the other, and the next one is published, without a new daemon."""
    world, _, second = _worlds[directory]
    world.publisher.look()
    assert kit.files(world.host) in (_OLD, _NEW)
    world.publish(second)
    assert kit.files(world.host) == _NEW


def replaced_setup(directory: Path) -> None:
    setup(directory)
    publish(directory)


def tend(directory: Path) -> None:
    """The replaced tree goes."""
    publisher = _worlds[directory][0].publisher
    for tree in publisher.replaced:
        tree.expire()
    publisher.tend()


def check_tended(directory: Path, acked: int, begun: int) -> None:
    check(directory, begun, begun)


# ── a crash, and what the next daemon does with what it left ─────────────────────────────────────────────────────────


def exchanged_setup(directory: Path) -> None:
    """The new generation has the name, and nobody noted that."""
    left_by(setup, publish, "payload.publish.exchange.after")(directory)


def recover(directory: Path) -> None:
    """What the next daemon does."""
    _worlds[directory][0].restarted().recover()


def check_published(directory: Path, acked: int, begun: int) -> None:
    """The exchange was made: the new generation stays."""
    check(directory, 1, 1)


def twice_edited_setup(directory: Path) -> None:
    """Somebody wrote into the old tree in the instant before it lost its name, and into the new one after that."""
    exchanged_setup(directory)
    world, _, _ = _worlds[directory]
    (world.publisher.staging / "b").write_bytes(_EDIT)
    (world.host / "c").write_bytes(_EDIT)


def check_edits(directory: Path, acked: int, begun: int) -> None:
    """No edit is gone, wherever it was made, and nothing of ours is left."""
    publisher = _worlds[directory][0].restarted()
    publisher.recover()
    world = _worlds[directory][0]
    assert kit.files(world.host) == {**_OLD, "b": _EDIT}, kit.files(world.host)
    [saved] = world.beside
    assert kit.files(world.host.parent / saved) == {**_NEW, "c": _EDIT}


def edited_setup(directory: Path) -> None:
    """The host directory was edited, so that publishing has to be confirmed."""
    setup(directory)
    (_worlds[directory][0].host / "b").write_bytes(_EDIT)


def publish_anyway(directory: Path) -> None:
    world, first, second = _worlds[directory]
    world.publish(second, first, confirmed=True)


def check_kept(directory: Path, acked: int, begun: int) -> None:
    """What was edited has the name, or another one beside it."""
    world = _worlds[directory][0]
    world.restarted().recover()
    trees = [kit.files(world.host), *(kit.files(world.host.parent / name) for name in world.beside)]
    assert {**_OLD, "b": _EDIT} in trees, trees
    assert all(".saved-" in name for name in world.beside), world.beside


# ── locks and probes ─────────────────────────────────────────────────────────────────────────────────────────────────


def bare_setup(directory: Path) -> None:
    (directory / "a").write_bytes(b"one")


def lock(directory: Path) -> None:
    taken = kit.lock(directory)
    taken.close()


def check_lockable(directory: Path, acked: int, begun: int) -> None:
    """Whoever held it is gone, so that the next one can have it; and lets it go."""
    taken = kit.lock(directory)
    taken.close()
    assert locking.release(directory, taken.marker.nonce)
    assert sorted(os.listdir(directory)) == ["a"]


def locked_setup(directory: Path) -> None:
    bare_setup(directory)
    lock(directory)


def release(directory: Path) -> None:
    mark = marker.read(directory)
    assert mark is not None and locking.release(directory, mark.nonce)


def probe(directory: Path) -> None:
    seeding.probe_host(directory)


def check_probed(directory: Path, acked: int, begun: int) -> None:
    assert sorted(os.listdir(directory)) == ["a"]
