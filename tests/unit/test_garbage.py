"""What nothing needs any more: real layers, records and checkpoints."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet.errors import FailedPrecondition
from limpet.services import garbage
from limpet.services.host import Host
from tests.unit import services_kit as kit


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with kit.host_in(tmp_path) as host:
        yield host


def there(host: Host) -> set[str]:
    return {path.stem for path in host.paths.layers.iterdir()}


def test_a_removed_sandbox_leaves_what_its_checkpoints_need_until_they_go(host: Host) -> None:
    """FRZ-6: one id for everything; deleting it frees its bytes."""
    box = kit.add_sandbox(host)
    first, second = kit.add_checkpoint(host, box), kit.add_checkpoint(host, box)
    active = set((host.records.by_id(box.id).disks or {}).values())
    host.forget(box)
    freed = host.layers.used(*active)
    assert asyncio.run(garbage.collect(host)) == freed > 0
    tops = {layer for made in (first, second) for layer in made.manifest.layer_ids().values()}
    assert there(host) == tops
    host.catalogue.forget(first.info.id)
    assert asyncio.run(garbage.collect(host)) == 0  # the second lies on it
    assert kit.problems(host, second, thorough=True) == []
    host.catalogue.forget(second.info.id)
    asyncio.run(garbage.collect(host))
    assert there(host) == set()


def test_hidden_sandboxes_keep_their_disks(host: Host) -> None:
    """A template that is being built, a pooled VM."""
    kit.add_sandbox(host, "+pool-1")
    before = there(host)
    assert asyncio.run(garbage.collect(host)) == 0 and there(host) == before


def test_what_is_made_while_garbage_is_looked_for_is_none(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """FRZ-6: the look took its time, a checkpoint was made meanwhile; its layers are not among what was looked at."""
    box = kit.add_sandbox(host)
    gate, real = threading.Event(), host.layers.garbage

    def slow(roots: list[str]) -> list[Path]:
        gate.wait(10)
        return real(roots)

    async def main() -> None:
        collecting = asyncio.create_task(garbage.collect(host))
        await asyncio.sleep(0.05)
        with host.layers.building():
            disks = {"root": await host.layers.overlay(host.layers.path((box.disks or {})["root"]))}
            host.records.update(box.id, disks=disks)
        gate.set()
        assert await collecting == 0
        assert host.layers.path(disks["root"]).exists()

    monkeypatch.setattr(host.layers, "garbage", slow)
    asyncio.run(main())
    asyncio.run(garbage.collect(host))  # nothing is built now: the data disk that was given up goes
    assert there(host) == {(box.disks or {})["root"], *(host.records.by_id(box.id).disks or {}).values()}


def test_what_a_sandbox_is_suspended_to_is_not_removed(host: Host) -> None:
    """Issue 3, item 6: its memory is nowhere else."""
    box = kit.add_sandbox(host)
    made = kit.add_checkpoint(host, box)
    garbage.require_unused(host, made.info.id)
    host.records.update(box.id, memory=made.info.id)
    with pytest.raises(FailedPrecondition, match="box is suspended to") as refused:
        garbage.require_unused(host, made.info.id)
    assert refused.value.hint == "limpet resume box"
