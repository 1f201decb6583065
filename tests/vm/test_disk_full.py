"""A host that runs out of disk: guests stand still and lose nothing, whoever asks is told why, and they go on.

The disks of the sandboxes lie on a file system of their own here, which is small and can be filled: that takes root."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Client, errors
from limpet.client import Sandbox
from limpet.paths import discover
from tests import small_disk
from tests.conftest import leave_home, new_home, run_cli
from tests.vm.kit import shell, wait_until

pytestmark = pytest.mark.vm

_LEFT = 60 << 20  # bytes that are free when a test begins
_WRITTEN = "160M"
# The sum is made of what goes to the disk, before it goes there.
_WRITER = f"head -c {_WRITTEN} /dev/urandom | tee $HOME/big | sha256sum > /dev/shm/sum; sync; touch /dev/shm/written"
_AGAIN = (
    "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /home/user/big | cmp - /dev/shm/sum && stat -c %s /home/user/big"
)


@pytest.fixture(scope="module")
def small_home(pieces: Path) -> Iterator[Path]:
    """A home whose layers have 700 MiB, and its vaults 640: some more than a generation leaves to others."""
    home = new_home(pieces)
    with (
        small_disk.mounted(discover(home).layers, 700) as layers,
        small_disk.mounted(discover(home).vaults, 640) as vaults,
    ):
        yield home
        for directory in (layers, vaults):
            (directory / small_disk.BALLAST).unlink(missing_ok=True)
        leave_home(home)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def small(small_home: Path) -> Iterator[Client]:
    with Client(home=small_home) as client:
        yield client


@pytest.fixture
def ballast(small_home: Path, box: Sandbox) -> Iterator[Path]:
    """A file that leaves little room to a sandbox that runs already."""
    path = small_disk.fill(discover(small_home).layers, _LEFT)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def box(small: Client) -> Iterator[Sandbox]:
    box = small.sandboxes.create("full", memory_mib=512)
    yield box
    box.remove(force=True, purge=True)


def fill(box: Sandbox) -> None:
    """Write until the guest stands still."""
    box.exec(["sh", "-c", _WRITER], user="user", detach=True, cwd="/")
    wait_until(lambda: box.refresh().error, 60)


def kinds(client: Client, box: Sandbox) -> list[str]:
    return [event.kind for event in client.events() if event.sandbox_id == box.info.id]


def told(client: Client, box: Sandbox) -> list[str]:
    return [kind for kind in kinds(client, box) if kind.startswith("sandbox.")]


def require_whole(box: Sandbox) -> None:
    """The writer comes to its end, every byte is on the disk, and the guest never saw an error."""
    wait_until(lambda: box.exec(["test", "-e", "/dev/shm/written"], cwd="/").ok, 60)
    assert int(shell(box, _AGAIN, user="root")) == 160 << 20
    assert not re.search("i/o error|btrfs.*error|corrupt", shell(box, "dmesg", user="root"), re.IGNORECASE)


def test_a_guest_on_a_full_disk_stands_still_and_goes_on_with_every_byte(
    small: Client, small_home: Path, box: Sandbox, ballast: Path
) -> None:
    """VM-19: the guest sees no error, everybody who asks is told why and at once, and space is all that it takes."""
    fill(box)
    assert (box.info.state, box.info.error is not None) == ("paused", True)
    assert "the host's disk is full" in (box.info.error or "")
    assert "the host's disk is full" in run_cli(small_home, "inspect", "full").stdout
    assert told(small, box)[-1] == "sandbox.disk_full"
    asked = time.monotonic()
    with pytest.raises(errors.InsufficientSpace, match="the guest stands still"):
        box.exec(["true"])
    with pytest.raises(errors.LimpetError, match=r"left running.*disk is full") as refused:
        box.stop()
    assert "free some space" in (refused.value.hint or "")
    with pytest.raises(errors.InsufficientSpace, match="disk is full"):
        box.resume()
    with pytest.raises(errors.InsufficientSpace, match=r"needs 512 MiB on .*, 0 MiB are free"):
        small.sandboxes.create("more", memory_mib=512)
    assert [found.name for found in small.sandboxes.list()] == ["full"]
    assert time.monotonic() - asked < 10
    ballast.unlink()
    wait_until(lambda: told(small, box)[-1] == "sandbox.went_on", 15)
    assert (box.refresh().state, box.info.error) == ("running", None)
    require_whole(box)
    assert abs(int(shell(box, "date +%s")) - time.time()) < 2


def test_a_daemon_that_finds_a_guest_standing_still_lets_it_go_on(
    small: Client, small_home: Path, box: Sandbox, ballast: Path
) -> None:
    """VM-19, VM-8: it says why at once; nothing of this is remembered, QEMU is asked."""
    fill(box)
    assert run_cli(small_home, "daemon", "stop").returncode == 0
    wait_until(lambda: "disk is full" in run_cli(small_home, "inspect", "full").stdout)
    assert run_cli(small_home, "daemon", "stop").returncode == 0
    ballast.unlink()
    wait_until(lambda: box.refresh().state == "running" and box.info.error is None, 15)
    require_whole(box)


def test_a_guest_that_stands_still_can_be_ended_by_force(small: Client, box: Sandbox, ballast: Path) -> None:
    """VM-2, VM-19: in bounded time, and the answer says that it was not clean; what was fsynced is there afterwards."""
    shell(box, "echo kept > /home/user/kept && sync")
    fill(box)
    result = box.stop(force=True)
    assert result.durability == "killed" and result.seconds < 15
    with pytest.raises(errors.InsufficientSpace, match="needs 512 MiB"):
        box.start()
    assert box.refresh().state == "stopped"
    ballast.unlink()
    box.start()
    assert shell(box, "cat /home/user/kept") == "kept\n"


def test_a_vault_whose_disk_is_full_keeps_what_it_has_and_catches_up(
    small: Client, small_home: Path, box: Sandbox
) -> None:
    """D3, VM-19, PAY-8: the generation that does not fit fails and is told; the sandbox goes on, nothing is lost."""
    shell(box, "echo first > /home/user/a", user="user")
    first = box.sync().generation
    vaults = discover(small_home).vaults
    ballast = small_disk.fill(vaults, 4 << 20)
    try:
        shell(
            box, "head -c 12M /dev/urandom > /home/user/big; sha256sum < /home/user/big > /home/user/sum", user="user"
        )
        with pytest.raises(errors.InsufficientSpace):
            box.sync()
        wait_until(lambda: "sync.degraded" in kinds(small, box), 30)
        status = box.sync_status()
        assert status.generation == first and status.failures > 0 and status.degraded
        assert "a generation needs" in (status.why or "")
        assert [found.generation for found in box.vault.history()][-1] == first
        assert box.exec(["true"]).ok
    finally:
        ballast.unlink()
    last = box.sync()
    assert last.generation is not None and first is not None and last.generation > first
    assert box.sync_status().failures == 0
    wait_until(lambda: "sync.recovered" in kinds(small, box), 10)
    assert [check.problems for check in small.vaults.check(box.name)] == [[]]
