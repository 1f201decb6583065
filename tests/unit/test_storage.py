"""`limpet system df` and `prune`: every byte is told, and what is removed is what was announced."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limpet.models import DiskUsage, PruneRequest, PruneResult
from limpet.services.host import Host
from limpet.services.storage import Storage
from limpet.services.templates import Templates
from limpet.vmm.layers import occupied
from tests.unit import images_kit
from tests.unit import services_kit as kit
from tests.unit.test_templatecache import publish


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with kit.host_in(tmp_path) as host:
        host.paths.templates.mkdir()
        yield host


def usage(host: Host) -> DiskUsage:
    return asyncio.run(Storage(host, Templates(host)).usage())


def sizes(host: Host) -> dict[str, int]:
    return {row.kind: row.size for row in usage(host).rows}


def prune(host: Host, **options: Any) -> PruneResult:
    async def run() -> PruneResult:
        operation = await Storage(host, Templates(host)).prune(PruneRequest(**options))
        ended = await host.operations.wait(operation.id)
        assert ended.state == "done", ended.error
        return PruneResult.model_validate(ended.result)

    return asyncio.run(run())


def on_disk(*roots: Path) -> int:
    """What du would say: every file once, whatever its names."""
    found = {}
    for root in roots:
        for directory, _, files in os.walk(root):
            for name in files:
                status = (Path(directory) / name).lstat()
                found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def test_every_byte_is_accounted_for_once(host: Host) -> None:
    """Issue 3, item 8: images, templates, checkpoints, sandboxes, and what nobody knows."""
    box = kit.add_sandbox(host)
    made = kit.add_checkpoint(host, box)
    kit.add_memory(host, made)
    layer = host.layers.path(next(iter((box.disks or {}).values())))
    template = publish(host, disk=layer.read_bytes())
    assert host.templates.whole(template) is None  # its disks have two names now
    kit.add_sandbox(host, "lower", disks=template.layers)
    (host.paths.artifacts).mkdir()
    (host.paths.artifacts / "vmlinux-x").write_bytes(b"k" * 50_000)
    (host.paths.data / "unknown").write_bytes(b"u" * 70_000)
    (host.paths.layers / "ly_garbage.qcow2").write_bytes(b"g" * 90_000)
    found = usage(host)
    assert found.total == sum(row.size for row in found.rows) == on_disk(host.paths.data, host.paths.cache)
    assert min(sizes(host)[kind] for kind in ("images", "templates", "checkpoints", "sandboxes", "artifacts")) > 0
    [other] = [row for row in found.rows if row.kind == "other"]
    assert other.reclaimable == occupied(host.paths.layers / "ly_garbage.qcow2") >= 90_000


def test_a_checkpoint_counts_for_what_only_it_needs(host: Host) -> None:
    """FRZ-6: "deleting it frees its bytes": what is told is what comes back."""
    box = kit.add_sandbox(host)
    before = sizes(host)
    made = kit.add_memory(host, kit.add_checkpoint(host, box), {"ram": b"x" * (1 << 20)})
    after = sizes(host)
    assert after["checkpoints"] - before["checkpoints"] >= 1 << 20
    host.catalogue.forget(made.info.id)
    assert after["checkpoints"] - sizes(host)["checkpoints"] >= 1 << 20


def test_pruning_removes_what_was_announced_and_nothing_else(host: Host) -> None:
    """Issue 3, item 8: a dry run says what a run does."""
    box = kit.add_sandbox(host)
    made = kit.add_checkpoint(host, box)
    waste = host.paths.layers / "ly_garbage.qcow2"
    waste.write_bytes(b"g" * 90_000)
    announced = prune(host, dry_run=True)
    assert announced.removed == ["layer ly_garbage"] and announced.freed == occupied(waste) > 0
    assert prune(host) == announced
    assert not waste.exists() and kit.problems(host, made, thorough=True) == []
    assert all(host.layers.path(layer).exists() for layer in (host.records.by_id(box.id).disks or {}).values())
    assert prune(host).removed == []


def test_templates_that_no_sandbox_can_be_made_from_any_more_are_pruned(host: Host) -> None:
    """Of an image, artifacts or a QEMU that are others now."""
    made = publish(host)
    assert prune(host, templates=False).removed == []
    assert made.directory.is_dir()
    assert prune(host, templates=True).removed == [f"template {made.key}"]
    assert not made.directory.exists()


def test_an_image_is_in_use_by_whatever_lies_on_it(host: Host) -> None:
    """FRZ-4: sandboxes, checkpoints of sandboxes that are gone."""
    image = next((host.paths.images / "base").glob("*/root.raw")).parent
    other = images_kit.publish(host.paths, "other", b"another").directory
    box = kit.add_sandbox(host)
    made = kit.add_checkpoint(host, box)
    users = Storage(host, Templates(host)).image_users()
    assert users(image) == ["box", made.info.id] and users(other) == []
    host.forget(box)
    users = Storage(host, Templates(host)).image_users()
    assert users(image) == [made.info.id]
    assert users(image.parent / ".." / "base" / image.name) == [made.info.id]  # however it is spelled


def test_images_go_only_when_asked_and_unused(host: Host) -> None:
    images_kit.publish(host.paths, "used", b"one")
    images_kit.publish(host.paths, "idle", b"two")
    root = next((host.paths.images / "used").glob("*/root.raw"))
    layer = asyncio.run(host.layers.overlay(root, "raw"))
    kit.add_sandbox(host, disks={"root": layer})
    assert prune(host).removed == []
    assert [name for name in prune(host, images=True).removed if "idle" in name]
    assert sorted(path.name for path in host.paths.images.iterdir() if not path.name.startswith(".")) == [
        "base", "used"
    ]  # fmt: skip
