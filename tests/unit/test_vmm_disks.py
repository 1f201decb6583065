"""The intake disk, sizes, and the accelerator's verdict, with real qemu-img and real files."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from limpet.errors import FailedPrecondition
from limpet.vmm import accel, disks

HYPERVISOR = "flags\t\t: fpu tsc constant_tsc hypervisor tsc_known_freq\ncpu MHz\t\t: 2596.128\n"


def image(path: Path, size: int) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)], check=True)
    return path


def virtual_size(path: Path) -> int:
    out = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True).stdout
    return int(json.loads(out)["virtual-size"])


def test_the_intake_disk_is_sparse_private_and_empty(tmp_path: Path) -> None:
    """VM-6: scratch; whatever an earlier run left in it is gone."""
    intake = tmp_path / "a, b.raw"
    intake.write_bytes(b"left over" * 1000)
    intake.chmod(0o600)
    disks.create_intake(intake, 1 << 30)
    status = intake.stat()
    assert status.st_size == 1 << 30 and status.st_blocks == 0
    with intake.open("rb") as file:
        assert file.read(9) == bytes(9)
    fresh = tmp_path / "fresh.raw"
    disks.create_intake(fresh)
    assert fresh.stat().st_mode & 0o777 == 0o600 and fresh.stat().st_size == disks.INTAKE_BYTES


def test_a_disk_grows_but_never_shrinks(tmp_path: Path) -> None:
    """VM-18: shrinking would cut off data."""
    disk = image(tmp_path / "a, b.qcow2", 8 << 20)
    asyncio.run(disks.resize(disk, 16 << 20))
    assert virtual_size(disk) == 16 << 20
    with pytest.raises(FailedPrecondition, match="only grow"):
        asyncio.run(disks.resize(disk, 8 << 20))
    assert virtual_size(disk) == 16 << 20


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
