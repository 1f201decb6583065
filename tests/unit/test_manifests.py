"""Manifests: what is written beside a checkpoint, and that nothing which is not as it was written is believed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limpet.errors import BadRequest, FailedPrecondition
from limpet.models import WorkspaceInfo
from limpet.services import manifests, origins
from limpet.services.catalogue import Catalogue, Checkpoint
from limpet.services.host import Host
from limpet.services.manifests import Manifest
from tests.unit import services_kit as kit


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with kit.host_in(tmp_path) as host:
        yield host


@pytest.fixture
def checkpoint(host: Host) -> Checkpoint:
    """Two deep, with a memory."""
    box = kit.add_sandbox(host)
    kit.add_checkpoint(host, box)
    return kit.add_memory(host, kit.add_checkpoint(host, box, label="second"))


def test_a_manifest_is_read_as_it_was_written(host: Host, tmp_path: Path) -> None:
    """FRZ-6: spec, layers with seals, workspace: also host paths of any bytes."""
    workspace = WorkspaceInfo(host_dir="/home/\udcff", guest_dir="/workspace", status="complete", kind="git")
    box = kit.add_sandbox(host, workspace=workspace)
    made = kit.add_checkpoint(host, box, label="before: ünï")
    found = kit.read_manifest(made)
    assert found == made.manifest and found.info.label == "before: ünï"
    assert {disk: [layer.id for layer in chain] for disk, chain in found.disks.items()} == {
        disk: [layer] for disk, layer in (box.disks or {}).items()
    }
    assert all(path is not None and path.startswith("../images/base/") for path in found.image.values())


def test_a_whole_checkpoint_has_no_problem(host: Host, checkpoint: Checkpoint) -> None:
    """FRZ-9"""
    assert [len(chain) for chain in checkpoint.manifest.disks.values()] == [2, 2]
    assert kit.problems(host, checkpoint) == kit.problems(host, checkpoint, thorough=True) == []


def layer(host: Host, checkpoint: Checkpoint, depth: int) -> Path:
    return host.layers.path(checkpoint.manifest.disks["root"][depth].id)


PARTS: dict[str, Callable[[Host, Checkpoint], Path]] = {
    "ram": lambda host, checkpoint: checkpoint.directory / "ram",
    "state": lambda host, checkpoint: checkpoint.directory / "state",
    "agent disk": lambda host, checkpoint: checkpoint.directory / "agent.squashfs",
    "top layer": lambda host, checkpoint: layer(host, checkpoint, 0),
    "layer below": lambda host, checkpoint: layer(host, checkpoint, 1),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "foreign"])
def test_each_damage_of_each_file_is_named_and_nothing_is_started(
    host: Host, checkpoint: Checkpoint, part: str, kind: str
) -> None:
    """FRZ-6, issue 3: "refused, named, never booted"."""
    path = PARTS[part](host, checkpoint)
    if kind == "flipped":
        kit.flip(path, 100)
    elif kind == "truncated":
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1)
    elif kind == "missing":
        path.unlink()
    else:
        path.write_bytes(b"x" * path.stat().st_size)
    assert [str(path) in problem for problem in kit.problems(host, checkpoint)] == [True]
    with pytest.raises(BadRequest, match="not as it was written") as refused:
        asyncio.run(origins.of(host, checkpoint))
    assert str(path) in refused.value.message
    if "layer" in part:
        with pytest.raises(BadRequest, match=path.name):
            asyncio.run(origins.of(host, checkpoint, disk_only=True))
    else:  # the disks are as good as ever
        assert asyncio.run(origins.of(host, checkpoint, disk_only=True)) is None


def test_a_missing_image_is_named(host: Host, checkpoint: Checkpoint) -> None:
    """FRZ-6"""
    shutil.rmtree(host.paths.images / "base")
    found = kit.problems(host, checkpoint)
    assert len(found) == 2 and all("root.raw is missing" in problem for problem in found)


def test_several_damages_are_all_told(host: Host, checkpoint: Checkpoint) -> None:
    """FRZ-9"""
    for part in ("ram", "top layer"):
        kit.flip(PARTS[part](host, checkpoint), 100)
    assert len(kit.problems(host, checkpoint)) == 2
    with pytest.raises(BadRequest, match=r"and 1 more"):
        asyncio.run(origins.of(host, checkpoint))


def test_disks_without_memory_are_only_disks(host: Host) -> None:
    """FRZ-7"""
    made = kit.add_checkpoint(host, kit.add_sandbox(host))
    assert made.manifest.machine is None
    assert asyncio.run(origins.of(host, made)) is None


def test_the_spec_comes_back_with_the_machine_that_the_memory_is_of(host: Host, checkpoint: Checkpoint) -> None:
    """VM-18: what `set` changed for the next start does not fit a memory that exists."""
    spec = checkpoint.info.spec.model_copy(update={"vcpus": 7, "memory_mib": 4096})
    info = checkpoint.info.model_copy(update={"spec": spec})
    later = Checkpoint(checkpoint.directory, checkpoint.manifest.model_copy(update={"info": info}))
    found = origins.spec(later, kit.memory_of(later))
    assert (found.vcpus, found.memory_mib) == (2, 512)
    assert origins.spec(later, None) == spec


# ── the manifest itself ──────────────────────────────────────────────────────────────────────────────────────────────


def forged(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A manifest whose own digest is right, but that says something else."""

    def forge(path: Path) -> None:
        content = json.loads(path.read_text())["manifest"]
        change(content)
        document = {"digest": manifests._digest(content), "manifest": content}
        path.write_text(json.dumps(document))

    return forge


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "damaged or foreign"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "damaged or foreign"),
    "no JSON": (lambda path: path.write_bytes(b"\xff\xfe"), "damaged or foreign"),
    "other JSON": (lambda path: path.write_bytes(b"[1, 2]"), "damaged or foreign"),
    "a number": (lambda path: path.write_bytes(b"7"), "damaged or foreign"),
    "no digest": (lambda path: path.write_bytes(b'{"manifest": {}}'), "damaged or foreign"),
    "manifest of another kind": (lambda path: path.write_text(
        json.dumps({"digest": manifests._digest([]), "manifest": []})), "damaged or foreign"),  # type: ignore[arg-type]
    "changed": (lambda path: path.write_text(path.read_text().replace('"vcpus": 2', '"vcpus": 3')), "its digest is"),
    "newer": (forged(lambda content: content.update(format=2)), "it has format 2, this limpet knows 1"),
    "without layers": (forged(lambda content: content.pop("disks")), "damaged or foreign"),
    "seal without digest": (forged(lambda content: content["files"]["ram"].pop("digest")), "damaged or foreign"),
    "seal of text": (forged(lambda content: content["disks"]["root"][0].update(seal="x")), "damaged or foreign"),
    "missing": (lambda path: path.unlink(), "cannot be read"),
    "a directory": (lambda path: path.rename(path.with_name("moved")).with_name(path.name).mkdir(), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_each_damage_of_a_manifest_is_named_and_the_others_are_served(
    host: Host, checkpoint: Checkpoint, kind: str
) -> None:
    """FRZ-6: the daemon starts, lists what is whole, and says of the other what is wrong when it is asked for."""
    damage, said = BAD[kind]
    other = kit.add_checkpoint(host, kit.add_sandbox(host, "other"))
    path = checkpoint.directory / "checkpoint.json"
    damage(path)
    with pytest.raises(FailedPrecondition, match=said) as refused:
        manifests.read(Manifest, path)
    assert str(path) in refused.value.message
    again = Catalogue(host.paths.checkpoints, host.layers)
    again.load()
    assert other.info.id in {known.info.id for known in again.all()}
    assert list(again.damaged) == [checkpoint.info.id]
    with pytest.raises(BadRequest, match=said):
        again.find(checkpoint.info.id)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_of_a_manifest_is_refused_or_changes_nothing(
    host: Host, checkpoint: Checkpoint, data: st.DataObject
) -> None:
    """FRZ-6: a typed error or, where only white space was hit, the manifest as it was."""
    path = checkpoint.directory / "checkpoint.json"
    whole = path.read_bytes()
    content = bytearray(whole)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        assert manifests.read(Manifest, path) == checkpoint.manifest
    except FailedPrecondition as refused:
        assert str(path) in refused.message
    finally:
        path.write_bytes(whole)


def test_a_checkpoint_under_another_name_is_foreign(host: Host, checkpoint: Checkpoint) -> None:
    """FRZ-6: a directory that was copied must not answer for another checkpoint, nor be removed in its place."""
    copied = checkpoint.directory.with_name("ck_00000000000000000000000000")
    shutil.copytree(checkpoint.directory, copied)
    host.catalogue.load()
    assert [known.directory for known in host.catalogue.all() if known.info.id == checkpoint.info.id] == [
        checkpoint.directory
    ]
    assert checkpoint.info.id in host.catalogue.damaged[copied.name]


# ── seals of layers ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_layers_are_read_once_however_many_checkpoints_they_are_in(
    host: Host, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FRZ-6: a checkpoint costs what is new; also after a restart of the daemon."""
    again = Catalogue(host.paths.checkpoints, host.layers)
    again.load()
    monkeypatch.setattr("limpet.digests.file_digest", lambda path: pytest.fail(f"{path} was read again"))
    for store in (host.catalogue, again):
        tops = checkpoint.manifest.layer_ids()
        chains, _ = manifests.chains(host.layers, tops, store.seals)
        assert chains == checkpoint.manifest.disks


def test_a_layer_that_was_damaged_is_not_sealed_as_if_it_were_whole(host: Host, checkpoint: Checkpoint) -> None:
    """FRZ-6: the next checkpoint on it says so too."""
    damaged = layer(host, checkpoint, 1)
    kit.flip(damaged, 100)
    later = kit.add_checkpoint(host, host.records.by_name("box"))
    assert kit.problems(host, later) == [f"{damaged} is damaged: its content has changed"]
    kit.flip(damaged, 100)
    assert kit.problems(host, later) == kit.problems(host, checkpoint) == []
