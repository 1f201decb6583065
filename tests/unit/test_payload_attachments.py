"""Payloads of sandboxes that are about to start, failed to, or were forgotten by a daemon that was killed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from limpet.errors import BadRequest, Busy, LimpetError
from limpet.models import Payload, PayloadRequest, State
from limpet.services.host import Host
from limpet.services.payloads import Attachments, seeding, service
from limpet.services.payloads.locking import locked
from limpet.services.payloads.marker import NAME
from limpet.services.payloads.seeding import probe_host
from limpet.store import SandboxRecord
from tests.unit.payload_kit import lock
from tests.unit.services_kit import add_sandbox, host_in


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with host_in(tmp_path / "home") as host:
        yield host


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "work" / "sub").mkdir(parents=True)
    (tmp_path / "work" / "file").write_text("content")
    return tmp_path / "work"


def with_payload(host: Host, directory: Path) -> SandboxRecord:
    request = PayloadRequest(host_dir=str(directory), guest_dir="/workspace/data")
    return add_sandbox(host, "box", payloads=host.payloads.checked([request]))


def everything(directory: Path) -> list[Path]:
    return sorted(directory.parent.glob("work*/**/*")) + sorted(directory.parent.glob(".limpet*"))


def test_a_failed_start_leaves_no_lock_marker_or_directory(host: Host, directory: Path) -> None:
    """PAY-10: what was taken before the launch is given back."""
    record, before = with_payload(host, directory), everything(directory)

    async def start_and_fail() -> None:
        await host.payloads.lock(record)
        assert locked(directory)
        await host.payloads.release(record)

    asyncio.run(start_and_fail())
    assert everything(directory) == before and not locked(directory)
    host.payloads.forget(record)
    assert list(host.paths.payloads.iterdir()) == []


def test_a_start_that_is_refused_half_way_gives_the_first_directory_back(host: Host, directory: Path) -> None:
    """PAY-3, PAY-10: of two payloads the second one is somebody else's."""
    other = directory.parent / "other"
    other.mkdir()
    record = with_payload(host, directory)
    both = host.payloads.checked([PayloadRequest(host_dir=str(other), guest_dir="/workspace/other")], record.payloads)
    record = replace(record, payloads=(*record.payloads, *both))
    taken = lock(other, "owner")

    async def start() -> None:
        with pytest.raises(Busy, match="in use by sandbox owner"):
            await host.payloads.lock(record)
        await host.payloads.release(record)

    asyncio.run(start())
    assert not (directory / NAME).exists() and locked(other)
    taken.close()


def test_overlapping_payloads_of_one_sandbox_are_refused(host: Host, directory: Path) -> None:
    """PAY-3, bad input."""
    record = with_payload(host, directory)
    for host_dir, guest_dir in ((directory, "/workspace/x"), (directory / "sub", "/workspace/x")):
        with pytest.raises(BadRequest, match="overlaps with the payload"):
            host.payloads.checked([PayloadRequest(host_dir=str(host_dir), guest_dir=guest_dir)], record.payloads)
    other = directory.parent / "other"
    other.mkdir()
    with pytest.raises(BadRequest, match="in the guest"):
        request = PayloadRequest(host_dir=str(other), guest_dir="/workspace/data/sub")
        host.payloads.checked([request], record.payloads)


def test_a_marker_that_a_dead_vm_left_goes_when_the_daemon_starts(host: Host, directory: Path) -> None:
    """PAY-3, PAY-10: kill -9 of the daemon and of the VM."""
    record = with_payload(host, directory)

    async def crash_and_settle() -> None:
        await host.payloads.lock(record)
        for taken in host.payloads._locks.values():
            taken.close()  # the kernel does that
        assert (directory / NAME).exists()
        again = Attachments(host.paths, host.events, host.vaults)
        again.settle([record])
        assert not (directory / NAME).exists()
        [state] = again.states.all()
        assert state.nonce is None
        again.settle([])  # its sandbox is gone
        assert again.states.all() == []

    asyncio.run(crash_and_settle())


def test_a_lock_that_a_vm_holds_is_left_alone_when_the_daemon_starts(host: Host, directory: Path) -> None:
    """PAY-3."""
    record = with_payload(host, directory)

    async def restart() -> None:
        await host.payloads.lock(record)
        Attachments(host.paths, host.events, host.vaults).settle([record])
        assert locked(directory)
        await host.payloads.release(record)

    asyncio.run(restart())


def test_a_forgotten_sandbox_leaves_nothing_of_its_payloads(host: Host, directory: Path) -> None:
    """PAY-10: a create that is cut off."""
    record = with_payload(host, directory)
    host.records.update(record.id, state=State.CREATING)

    async def lock_it() -> None:
        await host.payloads.lock(record)

    asyncio.run(lock_it())
    host.forget(record)
    assert not (directory / NAME).exists() and list(host.paths.payloads.iterdir()) == []


def test_the_probe_says_what_was_expected_and_what_to_run(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAY-9."""
    before = everything(directory)
    probe_host(directory)
    assert everything(directory) == before

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("limpet.durable.link", full)
    with pytest.raises(LimpetError, match=r"the probe .*/\.limpet-probe-.* could not be written") as refused:
        probe_host(directory)
    assert "touch" in (refused.value.hint or "")
    assert everything(directory) == before


def test_many_directories_are_read_at_once_by_few_threads(directory: Path) -> None:
    """PAY-1: on a host with one processor; those that write wait for those that take what they wrote."""
    (directory / "large").write_bytes(bytes(4 << 20))

    async def read() -> int:
        return sum([len(piece) async for piece in seeding._tar(directory)])

    async def read_many() -> list[int]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        return await asyncio.gather(*(read() for _ in range(6)))

    found: list[int] = []
    reading = threading.Thread(target=lambda: found.extend(asyncio.run(read_many())), daemon=True)
    reading.start()
    reading.join(20)
    assert len(found) == 6 and min(found) > 4 << 20


@pytest.mark.parametrize("there", [True, False])
def test_what_is_no_volume_is_not_removed_from_the_guest(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAY-10: a file that is where a payload could not be mounted."""
    removed: list[str] = []

    class Played:
        def __init__(self, _agent: object) -> None: ...

        async def remove(self, _name: str) -> bool:
            return there

    class Guest:
        async def agent(self) -> Guest:
            return self

        async def remove(self, path: str) -> None:
            removed.append(path)

    vm: Any = Guest()
    monkeypatch.setattr(service, "Volumes", Played)
    asyncio.run(service._remove_copy(vm, Payload(id="pl_1", host_dir="/h", guest_dir="/workspace/file", interval=1.0)))
    assert removed == ["/workspace/file"] * there


def test_a_stopped_sandbox_tells_what_its_directory_shows(host: Host, directory: Path) -> None:
    """PAY-8."""
    record = with_payload(host, directory)
    [status] = host.payloads.status(record)
    assert (status.state, status.generation, status.failures) == ("stopped", None, 0)
