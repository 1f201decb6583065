"""Locks, handles and leftovers, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import process
from limpet.errors import BadRequest, Busy, DeadlineExceeded, Unavailable
from limpet.process import ProcessRef
from limpet.vmm import lock
from limpet.vmm.handles import Handles, rediscover
from limpet.vmm.machine import Machine, end_leftovers


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    return tmp_path / "vm.lock"


@contextlib.contextmanager
def holding(lock_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child that inherited the lock, as QEMU does."""
    with lock.taken(lock_file) as fd:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def handles_of(child: subprocess.Popen[bytes], lock_file: Path) -> Handles:
    ref = process.reference(child.pid)
    assert ref is not None
    directory = lock_file.parent
    return Handles("web", "u-u-i-d", "tcg", ref, (), directory / "qmp", directory / "chan", lock_file)


def test_a_machine_without_a_lock_file_does_not_run(lock_file: Path) -> None:
    """VM-9: liveness is one function."""
    assert not lock.held(lock_file)


def test_the_lock_lives_as_long_as_the_child_that_inherited_it(lock_file: Path) -> None:
    """VM-9: our own copy is closed, the child's counts; kill -9 frees it."""
    with holding(lock_file) as child:
        assert lock.held(lock_file)
        child.kill()
        child.wait()
        assert not lock.held(lock_file)


def test_a_second_machine_on_the_same_lock_is_refused(lock_file: Path) -> None:
    """VM-8: never two QEMUs on one sandbox."""
    with holding(lock_file), pytest.raises(Busy), lock.taken(lock_file):
        pass


def test_asking_whether_it_runs_does_not_make_it_run(lock_file: Path) -> None:
    """VM-9: the probe leaves the lock free."""
    with lock.taken(lock_file):
        pass
    assert not lock.held(lock_file)
    with lock.taken(lock_file):
        assert lock.held(lock_file)


def test_the_holder_is_found_without_any_record(lock_file: Path) -> None:
    """VM-10: a lost handles file is survived."""
    with holding(lock_file) as child:
        found = lock.holder(lock_file)
        assert found is not None and found.pid == child.pid
        again = rediscover("web", "u-u-i-d", lock_file, lock_file.parent / "qmp", lock_file.parent / "chan")
        assert again is not None and again.qemu == found
    assert rediscover("web", "u-u-i-d", lock_file, lock_file.parent / "qmp", lock_file.parent / "chan") is None


def test_handles_survive_the_file(lock_file: Path) -> None:
    """VM-9: what is written is what is read."""
    with holding(lock_file) as child:
        handles = handles_of(child, lock_file)
        assert Handles.from_dict(handles.to_dict()) == handles


@pytest.mark.parametrize(
    "damage", [{"qemu": None}, {"qemu": {"pid": "1"}}, {"accel": "magic"}, {"lock": 3}, {"helpers": {}}]
)
def test_a_damaged_record_is_a_typed_error(lock_file: Path, damage: dict[str, object]) -> None:
    """VM-10: a corrupt handles file is survived."""
    with holding(lock_file) as child:
        record = handles_of(child, lock_file).to_dict()
    with pytest.raises(BadRequest):
        Handles.from_dict({**record, **damage})
    with pytest.raises(BadRequest):
        Handles.from_dict({})


def test_a_machine_that_ended_is_not_adopted(lock_file: Path) -> None:
    """VM-10: the lock is free, so it does not run, whatever the record says."""
    with holding(lock_file) as child:
        record = handles_of(child, lock_file).to_dict()
    assert asyncio.run(Machine.adopt(record)) is None


def test_a_reused_pid_is_not_adopted(lock_file: Path) -> None:
    """VM-9: same pid, other start time: not the machine that was recorded."""
    with holding(lock_file) as child:
        record = handles_of(child, lock_file).to_dict()
        record["qemu"] = {"pid": child.pid, "started": 1}
        with pytest.raises(Unavailable, match="held, but not by process"):
            asyncio.run(Machine.adopt(record))


def test_a_machine_that_does_not_greet_is_not_adopted(lock_file: Path) -> None:
    """VM-10: every wait is bounded."""
    with holding(lock_file) as child, socket.socket(socket.AF_UNIX) as mute:
        handles = handles_of(child, lock_file)
        mute.bind(str(handles.qmp_socket))
        mute.listen()
        with pytest.raises(Unavailable, match="did not greet"):
            asyncio.run(Machine.adopt(handles.to_dict(), timeout=0.1))


def test_leftovers_are_killed_with_a_record_and_without(lock_file: Path) -> None:
    """VM-10: what cannot be taken over is torn down."""
    with holding(lock_file) as child, subprocess.Popen(["sleep", "60"]) as helper:
        ref = process.reference(helper.pid)
        assert ref is not None
        record = {**handles_of(child, lock_file).to_dict(), "helpers": [{"pid": ref.pid, "started": ref.started}]}
        asyncio.run(end_leftovers(record, lock_file))
        assert child.wait(5) == helper.wait(5) == -signal.SIGKILL
    with holding(lock_file) as child:
        asyncio.run(end_leftovers(None, lock_file))
        assert child.wait(5) == -signal.SIGKILL


def test_leftovers_of_another_start_are_left_alone(lock_file: Path) -> None:
    """VM-10: a pid in an old record may be anybody's by now."""
    with subprocess.Popen(["sleep", "60"]) as stranger:
        ref = process.reference(stranger.pid)
        assert ref is not None
        old = Handles("web", "u", "tcg", ProcessRef(stranger.pid, ref.started - 1), (), lock_file, lock_file, lock_file)
        asyncio.run(end_leftovers(old.to_dict(), lock_file))
        assert stranger.poll() is None
        stranger.kill()


def test_waiting_for_a_process_is_bounded() -> None:
    """VM-2: no wait without an end."""
    ref = process.reference(os.getpid())
    assert ref is not None
    with pytest.raises(DeadlineExceeded):
        asyncio.run(lock.gone(ref, 0.01))
