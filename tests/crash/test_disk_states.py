"""After a power loss at any moment of what publishes images, checkpoints and copies: as before or as after (D5), and as
after once it was acknowledged (D3)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import pytest

from limpet import durable
from limpet.errors import NotFound
from limpet.images import registry, upkeep
from limpet.models import CheckpointInfo, SandboxSpec
from limpet.paths import Paths
from limpet.services.catalogue import Catalogue
from limpet.services.manifests import Manifest
from limpet.vmm.layers import Layers
from tests.crash.counting import noticed
from tests.crash.proving import Workload, prove
from tests.unit import images_kit

# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────

Tags = dict[str, bytes]  # what each reference means
IMAGE_STEPS: dict[str, tuple[Callable[[Paths], object], Callable[[Tags], object]]] = {
    "replace": (lambda paths: images_kit.publish(paths, "tool", b"new"), lambda tags: tags.update(tool=b"new")),
    "new name": (lambda paths: images_kit.publish(paths, "other", b"other"), lambda tags: tags.update(other=b"other")),
    "new tag": (
        lambda paths: images_kit.publish(paths, "tool", b"v1", tag="v1"), lambda tags: tags.update({"tool:v1": b"v1"}),
    ),
    "remove": (lambda paths: _remove(paths, "tool"), lambda tags: tags.pop("tool", None)),
    "prune": (lambda paths: upkeep.prune(paths, lambda _: ()), lambda tags: None),
}  # fmt: skip


def _paths(directory: Path) -> Paths:
    return Paths(directory / "data", directory / "cache", directory / "run")


def _remove(paths: Paths, name: str) -> None:
    with contextlib.suppress(NotFound):
        upkeep.remove(paths, name, lambda _: ())


def _image_setup(directory: Path) -> None:
    images_kit.publish(images_kit.paths_in(directory), "tool", b"old")


def _check_images(names: tuple[str, ...]) -> Callable[[Path, int, int], None]:
    def meant(steps: int) -> Tags:
        tags = {"tool": b"old"}
        for name in names[:steps]:
            IMAGE_STEPS[name][1](tags)
        return tags

    def check(directory: Path, acked: int, begun: int) -> None:
        paths = _paths(directory)
        upkeep.sweep(paths)
        found = {str(registry.Reference(info.name, info.tag)) for info in registry.list_images(paths)}
        legal = [meant(acked), meant(begun)]
        assert any(found == set(tags) and _holds(paths, tags) for tags in legal), f"images {found}, not {legal}"
        assert all(upkeep.verify(paths, reference) == [] for reference in found)
        assert images_kit.strays(paths) == []
        for name, _ in IMAGE_STEPS.items():
            IMAGE_STEPS[name][0](paths)  # everything still works

    return check


def _holds(paths: Paths, tags: Tags) -> bool:
    return all(content in registry.find_image(paths, name).root.read_bytes() for name, content in tags.items())


@pytest.fixture
def small_disks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(images_kit, "SIZE", 1 << 17)
    yield


def _image_work(names: tuple[str, ...], omit: str = "") -> Workload:
    steps = [(name, lambda directory, name=name: IMAGE_STEPS[name][0](_paths(directory))) for name in names]
    return Workload(_image_setup, tuple(steps), omit={omit})


@pytest.mark.parametrize("names", [n for length in (1, 2) for n in product(IMAGE_STEPS, repeat=length)], ids=" ".join)
def test_an_image_is_the_old_one_or_the_new_one(small_disks: None, names: tuple[str, ...]) -> None:
    """D3, D5, FRZ-4."""
    prove(_image_work(names), _check_images(names), limit=16)


@pytest.mark.parametrize("omitted", ["fsync", "fsync_dir"])
def test_an_image_published_without_one_of_its_fsyncs_is_noticed(small_disks: None, omitted: str) -> None:
    with noticed():
        prove(_image_work(("replace",), omitted), _check_images(("replace",)))


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────

A, B = "ck_01aaaa0001", "ck_01aaaa0002"


def _catalogue(directory: Path) -> Catalogue:
    durable.sweep(directory / "checkpoints")
    catalogue = Catalogue(directory / "checkpoints", Layers(directory / "layers"))
    catalogue.load()
    return catalogue


def _add(directory: Path, identity: str) -> None:
    catalogue = _catalogue(directory)
    staging = durable.staging(directory / "checkpoints", identity)
    (staging / "ram").write_bytes(b"memory of " + identity.encode())
    info = CheckpointInfo(
        id=identity, sandbox="box", sandbox_id="sb_1", created_at=datetime.now(UTC), kind="disk", spec=SandboxSpec()
    )
    catalogue.publish(staging, Manifest(info=info, disks={}, image={}))


def _forget(directory: Path, identity: str) -> None:
    _catalogue(directory).forget(identity)


CHECKPOINT_STEPS: dict[str, tuple[Callable[[Path], object], Callable[[set[str]], object]]] = {
    "add": (lambda directory: _add(directory, B), lambda known: known.add(B)),
    "forget A": (lambda directory: _forget(directory, A), lambda known: known.discard(A)),
    "forget B": (lambda directory: _forget(directory, B), lambda known: known.discard(B)),
}


def _checkpoint_setup(directory: Path) -> None:
    (directory / "checkpoints").mkdir()
    _add(directory, A)


def _check_checkpoints(names: tuple[str, ...]) -> Callable[[Path, int, int], None]:
    def known(steps: int) -> set[str]:
        ids = {A}
        for name in names[:steps]:
            CHECKPOINT_STEPS[name][1](ids)
        return ids

    def check(directory: Path, acked: int, begun: int) -> None:
        catalogue = _catalogue(directory)
        found = {checkpoint.info.id for checkpoint in catalogue.all()}
        assert not catalogue.damaged, catalogue.damaged
        assert found in (known(acked), known(begun)), f"checkpoints {found}"
        for identity in found:
            assert (directory / "checkpoints" / identity / "ram").read_bytes() == b"memory of " + identity.encode()
        assert {path.name for path in (directory / "checkpoints").iterdir()} == found

    return check


CHECKPOINT_WORK = [("add", "forget A"), ("add", "forget B"), ("forget A", "add"), ("add",), ("forget A",)]


@pytest.mark.parametrize("names", [*CHECKPOINT_WORK, ("add", "forget B", "add"), ("forget A", "add", "forget B")],
                         ids=" → ".join)  # fmt: skip
def test_a_checkpoint_is_there_whole_or_not_at_all(names: tuple[str, ...]) -> None:
    """D3, D5, FRZ-6."""
    steps = tuple((name, CHECKPOINT_STEPS[name][0]) for name in names)
    prove(Workload(_checkpoint_setup, steps), _check_checkpoints(names), recover=_catalogue, again=0.5)


@pytest.mark.parametrize("omitted", ["fsync", "fsync_dir"])
def test_a_checkpoint_published_without_one_of_its_fsyncs_is_noticed(omitted: str) -> None:
    with noticed():
        work = Workload(_checkpoint_setup, (("add", CHECKPOINT_STEPS["add"][0]),), omit={omitted})
        prove(work, _check_checkpoints(("add",)))


# ── directories that are taken away for a while ──────────────────────────────────────────────────────────────────────


def test_a_directory_that_was_set_aside_in_vain_is_there() -> None:
    """D5: what failed did not happen."""

    def fail(directory: Path) -> None:
        with contextlib.suppress(KeyError), durable.set_aside(directory / "d"):
            raise KeyError

    def setup(directory: Path) -> None:
        (directory / "d").mkdir()
        (directory / "d" / "f").write_bytes(b"x")

    def check(directory: Path, acked: int, begun: int) -> None:
        durable.sweep(directory)
        assert acked < begun or (directory / "d" / "f").read_bytes() == b"x"

    prove(Workload(setup, (("fail", fail),)), check)
    with noticed():
        prove(Workload(setup, (("fail", fail),), omit={"fsync_dir"}), lambda at, *_: check(at, 1, 1))
