"""Layers, with real qemu-img and real files: what is made, what lies on what, and what is garbage."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from limpet import durable
from limpet.errors import AlreadyExists, FailedPrecondition, InsufficientSpace
from limpet.vmm import layers as module
from limpet.vmm.layers import Layers, backing_file, chain, copy, occupied

SIZE = 64 << 20


def info(path: Path) -> dict[str, Any]:
    out = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True).stdout
    found: dict[str, Any] = json.loads(out)
    return found


def write(path: Path, pattern: int, start: int, length: int = 65536) -> None:
    argv = ["qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} {start} {length}", str(path)]
    subprocess.run(argv, check=True, capture_output=True)


def content(path: Path, target: Path) -> bytes:
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(target)], check=True)
    return target.read_bytes()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image's root disk beside the layers, below a path with all that QEMU's options could stumble over."""
    path = tmp_path / "odd, home" / "images" / "base" / "root.raw"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def layers(image: Path) -> Layers:
    directory = image.parents[2] / "layers"
    directory.mkdir()
    return Layers(directory)


def stack(layers: Layers, image: Path, depth: int) -> list[str]:
    """Layers on each other, the lowest first."""
    made = [asyncio.run(layers.overlay(image, "raw"))]
    for _ in range(depth - 1):
        made.append(asyncio.run(layers.overlay(layers.path(made[-1]))))
    return made


def test_a_layer_on_an_image_reads_as_the_image_and_belongs_to_this_user(layers: Layers, image: Path) -> None:
    """VM-13: of the image's size, private, and small."""
    layer = layers.path(*stack(layers, image, 1))
    found = info(layer)
    assert (found["format"], found["virtual-size"]) == ("qcow2", SIZE)
    assert found["backing-filename-format"] == "raw"
    assert layer.stat().st_mode & 0o777 == 0o600
    assert backing_file(layer) == image and occupied(layer) < 1 << 20


@pytest.mark.parametrize("folder", ["i", "a rather long name of a directory" * 6, "späte Straße", "x,y=z"])
def test_every_layer_is_what_qemu_img_would_have_made(layers: Layers, image: Path, folder: str) -> None:
    """VM-13: a layer is made without starting a program, whatever the length of the name of what it lies on."""
    asyncio.run(layers.overlay(image, "raw"))  # the first one of this size is qemu-img's own
    other = image.parents[1] / folder / "root.raw"
    other.parent.mkdir()
    shutil.copyfile(image, other)
    made, reference = layers.path(asyncio.run(layers.overlay(other, "raw"))), layers.path("ly_reference")
    base = os.path.relpath(other, reference.parent)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", str(reference)]
    subprocess.run(argv, check=True)
    subprocess.run(["qemu-img", "check", "-q", str(made)], check=True)
    assert made.read_bytes() == reference.read_bytes()
    assert backing_file(made) == other and occupied(made) <= occupied(reference) + 4096


def test_a_backing_name_that_no_qcow2_file_can_hold_is_refused(layers: Layers, image: Path) -> None:
    """docs/interop/qcow2.txt: at most 1023 bytes."""
    deep = image.parent
    for _ in range(5):
        deep = deep / ("d" * 250)
    deep.mkdir(parents=True)
    shutil.copyfile(image, deep / "root.raw")
    asyncio.run(layers.overlay(image, "raw"))
    with pytest.raises(FailedPrecondition, match="too long"):
        asyncio.run(layers.overlay(deep / "root.raw", "raw"))
    assert len(list(layers.path("x").parent.iterdir())) == 1


def test_what_is_written_above_is_not_seen_below(layers: Layers, image: Path, tmp_path: Path) -> None:
    """FRZ-6: a layer that something lies on never changes."""
    below, above = (layers.path(layer) for layer in stack(layers, image, 2))
    write(below, 0x11, 0)
    before = below.read_bytes()
    write(above, 0x22, 65536)
    assert below.read_bytes() == before
    seen = content(above, tmp_path / "seen")
    assert seen[:65536] == b"\x11" * 65536 and seen[65536:131072] == b"\x22" * 65536


def test_a_moved_home_takes_its_chains_with_it(layers: Layers, image: Path, tmp_path: Path) -> None:
    """Backing files are named relative to the layers."""
    top = stack(layers, image, 3)[-1]
    assert info(layers.path(top))["backing-filename"] == layers.chain(top)[1].name
    moved = shutil.move(image.parents[2], tmp_path / "elsewhere")
    store = Layers(Path(moved) / "layers")
    found = store.chain(top)
    assert [path.suffix for path in found] == [".qcow2", ".qcow2", ".qcow2", ".raw"]
    assert all(path.is_file() and path.is_relative_to(tmp_path / "elsewhere") for path in found)
    assert len(content(store.path(top), tmp_path / "seen")) == SIZE  # QEMU finds them too


def test_a_layer_on_nothing_is_refused_and_leaves_nothing(layers: Layers, image: Path) -> None:
    """VM-6: all or nothing, also on what is no disk."""
    with pytest.raises(FailedPrecondition, match="missing"):
        asyncio.run(layers.overlay(image.with_name("none")))
    foreign = image.with_name("foreign")
    foreign.write_bytes(b"no disk at all" * 100)
    with pytest.raises(FailedPrecondition, match="damaged"):
        asyncio.run(layers.overlay(foreign, "qcow2"))
    assert list(layers.path("x").parent.iterdir()) == []


def test_a_full_disk_refuses_a_layer_before_it_is_made(
    layers: Layers, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VM-19: creation is refused when the host cannot hold it."""
    monkeypatch.setattr(durable, "free_bytes", lambda _path: 1 << 20)
    with pytest.raises(InsufficientSpace, match="1 MiB are free"):
        asyncio.run(layers.overlay(image, "raw"))
    assert list(layers.path("x").parent.iterdir()) == []


def test_a_copy_is_the_same_and_its_own(layers: Layers, image: Path) -> None:
    """VM-13: every sandbox has a data disk of its own."""
    source = layers.path(*stack(layers, image, 1))
    write(source, 0x33, 0)
    made = layers.path(asyncio.run(layers.copy(source)))
    assert made.read_bytes() == source.read_bytes() and made.stat().st_ino != source.stat().st_ino
    assert made.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FailedPrecondition, match="missing"):
        asyncio.run(layers.copy(image.with_name("none")))


def test_a_copy_never_overwrites_a_disk_nor_removes_it(tmp_path: Path) -> None:
    """A disk that exists may hold somebody's work."""
    (tmp_path / "source").write_text("source")
    (tmp_path / "target").write_text("work")
    with pytest.raises(AlreadyExists):
        copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "work"


def test_a_copy_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FRZ-4: temporary files go away on every exit path."""
    (tmp_path / "source").write_bytes(bytes(1 << 20))

    def full(_source: object, target: Any, _size: int) -> None:
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    monkeypatch.setattr(module, "_FICLONE", 0)
    with pytest.raises(InsufficientSpace, match="No space left"):
        copy(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def header(path: Path, name: bytes, *, magic: bytes = b"QFI\xfb", size: int | None = None, offset: int = 112) -> Path:
    """A file that begins as a qcow2 file with this backing name does."""
    length = len(name) if size is None else size
    path.write_bytes(struct.pack(">4sIQI", magic, 3, offset, length).ljust(112, b"\0") + name)
    return path


DAMAGE = {
    "empty": b"",
    "cut off": b"QFI\xfb\0\0\0\x03\0\0",
    "of another kind": b"\x7fELF" + bytes(200),
    "name beyond the end": struct.pack(">4sIQI", b"QFI\xfb", 3, 4096, 8),
    "name too long": struct.pack(">4sIQI", b"QFI\xfb", 3, 20, 2000) + b"a" * 2000,
    "name with a zero": struct.pack(">4sIQI", b"QFI\xfb", 3, 20, 5) + b"a\0b.x",
    "name nowhere": struct.pack(">4sIQI", b"QFI\xfb", 3, 2**64 - 1, 8),
    "name where no file reaches": struct.pack(">4sIQI", b"QFI\xfb", 3, 2**63 - 1, 8),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_header_is_named_and_never_followed(tmp_path: Path, kind: str) -> None:
    """FRZ-6: qemu-img is not asked about a file that may be anything."""
    path = tmp_path / "ly_x.qcow2"
    path.write_bytes(DAMAGE[kind])
    with pytest.raises(FailedPrecondition, match=r"ly_x\.qcow2"):
        backing_file(path)


def test_a_backing_name_that_is_an_option_of_qemu_is_only_a_file_that_is_not_there(tmp_path: Path) -> None:
    """FRZ-6: `json:…` and URLs are never resolved."""
    path = header(tmp_path / "ly_x.qcow2", b'json:{"driver":"nbd","host":"example.org"}')
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        chain(path)


def test_a_chain_with_a_hole_or_a_loop_is_an_error_and_not_endless(layers: Layers, image: Path) -> None:
    """FRZ-6"""
    low, middle, top = stack(layers, image, 3)
    layers.path(low).unlink()
    with pytest.raises(FailedPrecondition, match=low):
        layers.chain(top)
    assert layers.reachable(top) == [layers.path(top), layers.path(middle), layers.path(low)]
    header(layers.path(low), f"{top}.qcow2".encode())
    with pytest.raises(FailedPrecondition, match="lies on itself"):
        layers.chain(top)
    assert len(layers.reachable(top)) == 3


def test_garbage_is_what_no_root_reaches(layers: Layers, image: Path) -> None:
    """FRZ-6: "deleting it frees its bytes", and takes nothing from others."""
    shared, left = stack(layers, image, 2)
    right = asyncio.run(layers.overlay(layers.path(shared)))
    alone = asyncio.run(layers.overlay(image, "raw"))
    assert layers.garbage([left, right, alone]) == []
    assert layers.garbage([left, right]) == [layers.path(alone)]
    assert layers.garbage([left, alone]) == [layers.path(right)]
    assert layers.garbage([alone]) == sorted(map(layers.path, (shared, left, right)))
    assert len(layers.garbage([])) == 4 and image.exists()


def test_what_is_no_layer_is_not_ours_to_delete(layers: Layers, image: Path) -> None:
    (layer,) = stack(layers, image, 1)
    directory = layers.path("x").parent
    for name in ("notes.txt", "ly_half.tmp", "other.qcow2"):
        (directory / name).write_text("mine")
    assert layers.garbage([]) == [layers.path(layer)]
    assert Layers(directory / "none").garbage([]) == []


def test_nothing_is_garbage_while_a_chain_is_damaged(layers: Layers, image: Path) -> None:
    """FRZ-6: what lies below the damage cannot be known, and may be all that is left of somebody's work."""
    low, middle, top = stack(layers, image, 3)
    alone = asyncio.run(layers.overlay(image, "raw"))
    whole = layers.path(middle).read_bytes()
    layers.path(middle).write_bytes(b"damaged")
    assert layers.garbage([top]) == []
    assert layers.garbage([low]) == sorted(map(layers.path, (middle, top, alone)))  # the damaged one is unreachable
    layers.path(middle).write_bytes(whole)
    assert layers.garbage([top, "ly_gone"]) == [layers.path(alone)]


def test_nothing_is_garbage_while_something_is_being_built(layers: Layers, image: Path) -> None:
    """A layer that is just being made is not reachable yet. Blocks nest."""
    stack(layers, image, 1)
    with layers.building():
        with layers.building():
            assert layers.garbage([]) == []
        assert layers.garbage([]) == []
    assert len(layers.garbage([])) == 1
    with pytest.raises(RuntimeError), layers.building():
        raise RuntimeError
    assert len(layers.garbage([])) == 1


def test_what_layers_take_is_counted_without_holes(layers: Layers, image: Path) -> None:
    """`limpet system df`"""
    low, top = stack(layers, image, 2)
    before = layers.used(top)
    write(layers.path(top), 0x44, 0, 1 << 20)
    assert 1 << 20 <= layers.used(top) - before < 2 << 20
    assert layers.used(low, top, "ly_gone") == layers.used(low) + layers.used(top)
    assert occupied(image) == 0


def test_dropping_is_final_and_may_be_done_twice(layers: Layers, image: Path) -> None:
    low, top = stack(layers, image, 2)
    layers.drop(top)
    layers.drop(top, "ly_never")
    assert [path.stem for path in layers.path("x").parent.iterdir()] == [low]


def test_a_new_layer_is_on_the_disk_when_it_is_told(
    layers: Layers, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FRZ-4: the database names it from then on, so a crash must find it."""
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    layer = layers.path(asyncio.run(layers.overlay(image, "raw")))
    asyncio.run(layers.durable())
    assert synced == [str(layer), str(layer.parent)]
