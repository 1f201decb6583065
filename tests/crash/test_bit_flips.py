"""One bit of a stored file is changed: that is found and named, or nothing depends on it; it is never served (D6).

Templates are in tests/unit/test_templatecache.py, whole checkpoints of real VMs in tests/vm/test_checkpoints.py."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from limpet.digests import Seal
from limpet.errors import FailedPrecondition, LimpetError
from limpet.images import find_image, upkeep
from limpet.models import CheckpointInfo, SandboxSpec, State
from limpet.names import new_id
from limpet.paths import Paths
from limpet.process import ProcessRef, start_time
from limpet.services.manifests import LayerSeal, Manifest
from limpet.services.manifests import read as read_manifest
from limpet.services.manifests import write as write_manifest
from limpet.store import SandboxRecord, Store
from limpet.vault import Vault
from limpet.vmm.handles import Handles
from limpet.vmm.layers import Layers
from tests.crash import vaultkit as kit
from tests.crash.counting import COUNT, Loss, noticed
from tests.unit import images_kit

ALL = os.environ.get("LIMPET_TEST_CRASH") == "all"
_EVERY = 1 if ALL else 16  # of the small files every so many bytes are flipped, of large ones so many places


def places(path: Path, seed: int = 0) -> list[int]:
    """Where to flip: all over the file, always its first and its last byte."""
    size = path.stat().st_size
    inner = range(1, size - 1, max(1, _EVERY * size // 4000)) if size > 2 else range(0)
    chosen = random.Random(seed).sample(inner, min(len(inner), 400 if ALL else 40))
    return sorted({0, size - 1, *chosen})


def flips(path: Path) -> Iterator[int]:
    """Have the file with one bit changed, at one place after the other; as it was at the end."""
    content, mode = path.read_bytes(), path.stat().st_mode
    for place in places(path):
        kit.flip(path, place)
        COUNT.faults += 1
        yield place
    path.write_bytes(content)
    path.chmod(mode)


def demand(condition: bool, complaint: str) -> None:
    COUNT.states += 1
    if not condition:
        COUNT.losses.append(complaint)
        raise Loss(complaint)


# ── vaults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A vault with generations, packs and a pin."""
    kit.packed_setup(tmp_path)
    vault = Vault.open(tmp_path / "vault")
    vault.forget([3, 4])
    vault.pin(5, "test")
    kit.commit(vault, "home", kit.edit_a)
    assert any(vault.directory.joinpath("packs").iterdir())
    return vault.directory


def served(vault: Vault) -> dict[tuple[int, bytes], object]:
    """Everything that it gives out; what it refuses is left out."""
    found: dict[tuple[int, bytes], object] = {}
    for generation in vault.generations():
        for name, volume in generation.volumes.items():
            try:
                for path, node in generation.tree(name).walk():
                    data = b"".join(generation.tree(name).read(node)) if node.kind == "file" else b""
                    found[generation.number, volume.mount + b"/" + path] = (node.kind, node.mode, node.size, data)
            except LimpetError:
                continue
    return found


@pytest.mark.parametrize("kind", ["gens", "packs", "ledger", "HEAD"])
def test_a_flipped_bit_in_a_vault_is_found_and_never_served(whole: Path, kind: str, tmp_path: Path) -> None:
    """D6: whatever is still given out is what was stored; `check` or opening it tells."""
    before = served(Vault.open(whole))
    files = sorted((whole / kind).iterdir()) if (whole / kind).is_dir() else [whole / kind]
    for file in files:
        for place, damaged in _copies(whole, file, tmp_path):
            try:
                vault = Vault.open(damaged)
            except FailedPrecondition:
                continue  # it is named
            wrong = {key for key, value in served(vault).items() if before.get(key) != value}
            demand(not wrong, f"{file.name}, byte {place}: {sorted(wrong)[:3]} are served changed")
            demand(vault.damage is not None or vault.check() != [], f"{file.name}, byte {place}: nobody notices")


def _copies(vault: Path, file: Path, scratch: Path) -> Iterator[tuple[int, Path]]:
    """Copies of a vault with one bit of one file changed. Opening one may change it."""
    for place in places(file) if not file.is_symlink() else range(0, len(os.readlink(file)), 5):
        copy = scratch / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(vault, copy, symlinks=True)
        target = copy / file.relative_to(vault)
        if file.is_symlink():
            text = bytearray(os.readlink(file).encode())
            text[place] ^= 1
            target.unlink()
            target.symlink_to(os.fsdecode(bytes(text)))
        else:
            kit.flip(target, place)
        COUNT.faults += 1
        yield place, copy


def test_a_vault_that_does_not_look_is_noticed(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: `check` that finds nothing."""
    monkeypatch.setattr(Vault, "check", lambda self, progress=None: [])
    with noticed("nobody notices"):
        test_a_flipped_bit_in_a_vault_is_found_and_never_served(whole, "gens", tmp_path)


# ── checkpoints and layers ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_flipped_bit_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    """D6, FRZ-6: the manifest, the memory, the state of the devices, the layers."""
    directory, layers = tmp_path / "ck_1", Layers(tmp_path / "layers")
    directory.mkdir()
    (tmp_path / "layers").mkdir()
    files = {name: directory / name for name in ("ram", "state")}
    for number, path in enumerate(files.values()):
        path.write_bytes(kit.noise(number, 5000))
    layer = layers.path("ly_1")
    layer.write_bytes(kit.noise(9, 5000))
    info = CheckpointInfo(
        id="ck_1", sandbox="box", sandbox_id="sb_1", created_at=datetime.now(UTC), kind="full", spec=SandboxSpec()
    )
    seals = {name: Seal.of(path) for name, path in files.items()}
    disks = {"root": [LayerSeal(id="ly_1", seal=Seal.of(layer))]}
    write_manifest(directory, Manifest(info=info, disks=disks, image={}, files=seals), "checkpoint.json")
    manifest = read_manifest(Manifest, directory / "checkpoint.json")
    assert manifest.problems(directory, layers, thorough=True) == []
    for path in (*files.values(), layer):
        for place in flips(path):
            found = manifest.problems(directory, layers, thorough=True)
            demand(len(found) == 1 and str(path) in found[0], f"{path.name}, byte {place}: {found}")
    for place in flips(directory / "checkpoint.json"):
        try:
            changed = read_manifest(Manifest, directory / "checkpoint.json")
        except FailedPrecondition as error:
            demand("checkpoint.json" in error.message, f"byte {place}: {error.message}")
        else:
            demand(changed == manifest, f"checkpoint.json, byte {place} is believed")  # white space


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_flipped_bit_in_an_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D6, FRZ-4: its disks, its description, its tag."""
    monkeypatch.setattr(images_kit, "SIZE", 1 << 17)
    paths = images_kit.paths_in(tmp_path)
    image = images_kit.publish(paths, "tool", kit.noise(1, 1000), data=kit.noise(2, 1000))
    for name in ("root.raw", "data.raw"):
        for place in flips(image.directory / name):
            demand(_refused(paths), f"{name}, byte {place}: nobody notices")
    for place in flips(image.directory / "image.json"):
        demand(_refused(paths) or find_image(paths, "tool") == image, f"image.json, byte {place}: nobody notices")
    for place in flips(paths.image_tag("tool", "latest")):
        demand(_refused(paths) or find_image(paths, "tool").root == image.root, f"the tag, byte {place}")


def _refused(paths: Paths) -> bool:
    try:
        return upkeep.verify(paths, "tool") != []
    except LimpetError:
        return True


# ── the state ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_flipped_handles_of_a_vm_are_refused_or_of_the_same_machine_or_of_none(tmp_path: Path) -> None:
    """D6: which process may be touched is decided by what is asked from it, its start time and its uuid."""
    me = ProcessRef(os.getpid(), start_time(os.getpid()) or 0)
    handles = Handles("box", str(uuid4()), "tcg", me, (), tmp_path / "qmp", tmp_path / "chan", tmp_path / "vm.lock")
    file = tmp_path / "handles.json"
    file.write_text(json.dumps(handles.to_dict(), indent=1))
    for place in flips(file):
        try:
            found = Handles.from_dict(json.loads(file.read_bytes()))
        except (LimpetError, ValueError):
            continue
        demand(found.qemu == me or not found.qemu.alive(), f"byte {place}: another process is taken for the VM")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    paths = images_kit.paths_in(tmp_path)
    store = Store.open(paths)
    for number in range(10):
        spec = SandboxSpec(env={"KEY": f"value {number}"}, labels={"n": str(number)})
        store.insert_sandbox(SandboxRecord(new_id("sb"), f"box-{number}", State.STOPPED, spec, datetime.now(UTC)))
    store.save_setting("trash.days", "30")
    store.close()
    return paths.database


def test_a_flipped_bit_in_the_database_is_named_or_changes_nothing(database: Path) -> None:
    """D6: SQLite checks how its pages hang together when it is opened, the seal of every row what stands in it."""
    paths = Paths(database.parent, database.parent.parent / "cache", database.parent.parent / "run")
    content, expected = database.read_bytes(), _stored(paths)
    named = 0
    for place in [*places(database), *_in_rows(content)]:
        for extra in ("-wal", "-shm"):
            database.with_name(database.name + extra).unlink(missing_ok=True)
        database.write_bytes(content)
        kit.flip(database, place)
        COUNT.faults += 1
        try:
            found = _stored(paths)
        except (LimpetError, sqlite3.Error):
            named += 1
            continue
        demand(found == expected, f"byte {place} of the database is believed: {found}")
    assert named


def _stored(paths: Paths) -> tuple[list[SandboxRecord], dict[str, str]]:
    store = Store.open(paths)
    try:
        return store.sandboxes(), store.settings()
    finally:
        store.close()


def _in_rows(content: bytes) -> Iterator[int]:
    """Places in what rows say."""
    for number in range(10):
        for text in (f"box-{number}", f"value {number}"):
            yield content.index(text.encode()) + len(text) - 1
