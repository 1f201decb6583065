"""Disks and the accelerator's verdict, with real qemu-img and real files."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from limpet.errors import FailedPrecondition
from limpet.vmm import accel, disks
from limpet.vmm.disks import Overlay

HYPERVISOR = "flags\t\t: fpu tsc constant_tsc hypervisor tsc_known_freq\ncpu MHz\t\t: 2596.128\n"


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def info(path: Path) -> dict[str, object]:
    out = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True).stdout
    found: dict[str, object] = json.loads(out)
    return found


def test_disks_are_made_at_once_and_belong_to_this_user(tmp_path: Path) -> None:
    """VM-13: an overlay with the size asked for, a copy, and a sparse intake disk; also below an odd path."""
    home = tmp_path / "a, b"
    home.mkdir()
    image, blank = sparse(tmp_path / "root.raw", 64 << 20), tmp_path / "blank"
    blank.write_bytes(b"blank" * 1000)
    root, data, intake = home / "root.qcow2", home / "data.qcow2", home / "intake.raw"
    overlay = Overlay(root, image, size=128 << 20)
    asyncio.run(disks.create_disks([overlay], intake, copies={data: blank}, intake_bytes=1 << 30))
    assert info(root)["virtual-size"] == 128 << 20 and info(root)["backing-filename"] == str(image)
    assert data.read_bytes() == blank.read_bytes()
    assert intake.stat().st_size == 1 << 30 and disks.disk_used(intake) == 0
    assert {path.stat().st_mode & 0o777 for path in (root, data, intake)} == {0o600}
    assert disks.disk_used(root, data, home / "none") > 0


def test_failed_creation_leaves_no_disk(tmp_path: Path) -> None:
    """VM-6: all or nothing."""
    good = Overlay(tmp_path / "a.qcow2", sparse(tmp_path / "a.raw", 1 << 20))
    with pytest.raises(FailedPrecondition, match="missing"):
        asyncio.run(disks.create_disks([good, Overlay(tmp_path / "b.qcow2", tmp_path / "no")], tmp_path / "i"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.raw"]


def test_creation_never_overwrites_a_disk(tmp_path: Path) -> None:
    """A disk that exists may hold somebody's work."""
    image = sparse(tmp_path / "a.raw", 1 << 20)
    (tmp_path / "a.qcow2").write_text("work")
    with pytest.raises(FailedPrecondition, match="exists already"):
        asyncio.run(disks.create_disks([Overlay(tmp_path / "a.qcow2", image)], tmp_path / "i"))
    assert (tmp_path / "a.qcow2").read_text() == "work"


def test_a_disk_grows_but_never_shrinks(tmp_path: Path) -> None:
    """VM-18: shrinking would cut off data."""
    overlay = Overlay(tmp_path / "a.qcow2", sparse(tmp_path / "a.raw", 8 << 20))
    asyncio.run(disks.create_disks([overlay], tmp_path / "i"))
    asyncio.run(disks.resize(overlay.path, 16 << 20))
    assert info(overlay.path)["virtual-size"] == 16 << 20
    with pytest.raises(FailedPrecondition, match="only grow"):
        asyncio.run(disks.resize(overlay.path, 8 << 20))


@pytest.mark.parametrize(
    ("cpuinfo", "khz"),
    [
        (HYPERVISOR, 2596128),
        (HYPERVISOR.replace("hypervisor", ""), None),  # a real processor: `cpu MHz` is its speed at this moment
        (HYPERVISOR.replace("fpu", "aperfmperf"), None),
        (HYPERVISOR.replace("tsc_known_freq", ""), None),
        ("", None),
    ],
)
def test_the_counters_frequency_is_believed_only_where_it_is_that(cpuinfo: str, khz: int | None) -> None:
    """DESIGN §2: a wrong frequency makes the guest's clock run wrong."""
    assert accel.trusted_tsc_khz(cpuinfo) == khz


def test_a_damaged_probe_cache_is_no_error(tmp_path: Path) -> None:
    """VM-20: caches may be cut off by a crash."""
    (tmp_path / "probe.json").write_text("{")
    assert asyncio.run(accel.tsc_khz(tmp_path / "probe.json", kernel=tmp_path / "none")) in (
        accel.trusted_tsc_khz(Path("/proc/cpuinfo").read_text()),
        None,
    )
