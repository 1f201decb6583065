"""Who has a host directory: real flocks, held by real processes, through bind mounts and symlinks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from limpet.errors import BadRequest, Busy, FailedPrecondition
from limpet.services.payloads import locking, places
from limpet.services.payloads.marker import NAME, Marker
from limpet.services.payloads.scanning import scan
from tests.unit.payload_kit import lock, paths_in

_HOLD = """
import sys, time
from pathlib import Path
from limpet.services.payloads import locking
from limpet.services.payloads.marker import Marker
held = locking.take(Marker.new("pl_other", "owner", "sb_owner", Path("/home/y"), Path(sys.argv[1])))
print("held", flush=True)
time.sleep(300)
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    directory = tmp_path / "work" / "host"
    directory.mkdir(parents=True)
    return directory


class Holder:
    """A process that has a directory, as another limpet's VM would."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(directory)], stdout=subprocess.PIPE, text=True, env={**os.environ}
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def held(host: Path) -> Iterator[Holder]:
    holder = Holder(host)
    try:
        yield holder
    finally:
        holder.kill()


@pytest.fixture
def bind(tmp_path: Path, host: Path) -> Iterator[Path]:
    """The parent of the host directory under another name."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    if subprocess.run(["mount", "--bind", str(host.parent), str(place)], check=False).returncode:
        pytest.skip("no bind mounts here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.usefixtures("held")
def test_a_second_owner_is_refused_and_told_whose_it_is(host: Path) -> None:
    """PAY-3: path, owner, host, since when, and how to get it."""
    with pytest.raises(Busy) as refused:
        lock(host)
    for word in (str(host), "sandbox owner of /home/y", os.uname().nodename, "since 20"):
        assert word in refused.value.message
    assert refused.value.hint is not None and "limpet payload rm owner pl_other" in refused.value.hint
    with pytest.raises(Busy):
        locking.peek(host)


@pytest.mark.usefixtures("held")
def test_parents_and_children_of_a_taken_directory_are_refused(host: Path) -> None:
    """PAY-3."""
    child = host / "deep" / "er"
    child.mkdir(parents=True)
    with pytest.raises(Busy, match="overlaps with"):
        lock(child)
    assert not (child / NAME).exists()
    with pytest.raises(Busy, match="overlaps with"):
        locking.refuse_nested(host.parent, scan(host.parent).nested)


@pytest.mark.usefixtures("held")
def test_bind_mounts_and_symlinks_do_not_hide_that_it_is_taken(host: Path, bind: Path, tmp_path: Path) -> None:
    """PAY-3: the same directory, a child and a parent under other names."""
    (host / "child").mkdir()
    (tmp_path / "link").symlink_to(host)
    assert places.check_host(str(tmp_path / "link"), paths_in(tmp_path / "home")) == host
    with pytest.raises(Busy):
        lock(bind / "host")
    with pytest.raises(Busy, match="overlaps with"):
        lock(bind / "host" / "child")
    assert scan(bind).nested == [b"host"]
    assert places.overlap(bind / "host" / "child", host)
    assert not places.overlap(bind.parent / "link2", host / "child")


def test_a_bind_mount_of_a_subdirectory_is_seen_to_be_inside(tmp_path: Path, host: Path) -> None:
    """PAY-3: no path says that it is a child."""
    (host / "sub" / "own").mkdir(parents=True)
    place = tmp_path / "alias"
    place.mkdir()
    if subprocess.run(["mount", "--bind", str(host / "sub"), str(place)], check=False).returncode:
        pytest.skip("no bind mounts here")
    holder = Holder(host)
    try:
        assert places.overlap(place / "own", host)
        with pytest.raises(Busy, match="overlaps with"):
            lock(place / "own")
        with pytest.raises(BadRequest, match="mount point"):
            places.check_host(str(place), paths_in(tmp_path / "home"))
    finally:
        holder.kill()
        subprocess.run(["umount", str(place)], check=True)


def test_the_kernel_releases_the_lock_when_its_holder_is_killed(host: Path, held: Holder) -> None:
    """PAY-3: it cannot go stale; what is left of the marker is taken over."""
    held.kill()
    assert not locking.locked(host)
    taken = lock(host)
    assert b"pl_01test" in (host / NAME).read_bytes()
    taken.close()


def test_the_lock_goes_on_with_a_descriptor_that_was_handed_down(host: Path) -> None:
    """PAY-3: QEMU has it when the daemon is gone."""
    taken = lock(host)
    with subprocess.Popen(["sleep", "300"], pass_fds=[taken.fd]) as machine:
        taken.close()
        assert locking.locked(host)
        assert not locking.release(host, taken.marker.nonce)
        machine.kill()
    assert locking.release(host, taken.marker.nonce)
    assert not (host / NAME).exists()


def test_a_released_marker_is_removed_only_when_it_is_ours(host: Path) -> None:
    """PAY-4."""
    taken = lock(host)
    taken.close()
    assert not locking.release(host, "somebody else's")
    assert (host / NAME).exists()
    assert locking.release(host, taken.marker.nonce)


@pytest.mark.parametrize("what", ["text", "symlink", "directory", "fifo", "copied", "other host"])
def test_a_foreign_marker_is_refused_and_left_alone(host: Path, what: str) -> None:
    """PAY-4: with what to do about it."""
    path, own = host / NAME, Marker.new("pl_x", "box", "sb_x", Path("/home/y"), host)
    if what == "text":
        path.write_text("not limpet's")
    elif what == "symlink":
        path.symlink_to("/etc/passwd")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "copied":
        path.write_bytes(Marker.new("pl_x", "box", "sb_x", Path("/home/y"), host.parent).to_bytes())
    else:
        path.write_bytes(replace(own, host="another-host").to_bytes())
    before = path.lstat()[:7]  # all but the times: a look at it counts as access
    with pytest.raises(FailedPrecondition, match="no marker that this limpet can take over") as refused:
        lock(host)
    assert refused.value.hint is not None and f"remove {path}" in refused.value.hint
    assert path.lstat()[:7] == before
    with pytest.raises(FailedPrecondition):
        locking.peek(host)


def test_a_refusal_leaves_nothing(host: Path) -> None:
    """PAY-10."""
    taken = lock(host)
    (host / "child").mkdir()
    before = sorted(host.parent.rglob("*"))
    with pytest.raises(Busy):
        lock(host / "child")
    assert sorted(host.parent.rglob("*")) == before
    taken.close()
