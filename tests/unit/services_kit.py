"""A daemon's shared parts without a daemon: real store, real layers on a small image, real checkpoints of sandboxes
that do not run."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from limpet import durable
from limpet.daemon import build_host
from limpet.digests import Seal
from limpet.models import SandboxSpec, State
from limpet.names import new_id
from limpet.paths import Paths
from limpet.services import checkpointing, manifests
from limpet.services.catalogue import Checkpoint
from limpet.services.host import Host
from limpet.services.machines import MachineFacts
from limpet.services.manifests import Manifest
from limpet.store import SandboxRecord, Store
from limpet.vmm.memory import MemoryImage
from tests.unit import images_kit

FACTS = MachineFacts(accel="tcg", qemu="7.2.0", vcpus=2, memory_mib=512, network="user")
PAGES = {"ram": b"\0" * 8192 + b"page" * 1024, "state": b"devices" * 100, "agent.squashfs": b"agent" * 100}


@contextlib.contextmanager
def host_in(home: Path) -> Iterator[Host]:
    """A host with the image `base`."""
    paths = Paths(home / "data", home / "cache", home / "run")
    paths.make()
    if not paths.images.exists():
        paths.images.mkdir()
        images_kit.publish(paths, "base", b"system")
    store = Store.open(paths)
    try:
        yield build_host(paths, store)
    finally:
        store.close()


def add_sandbox(host: Host, name: str = "box", **changes: Any) -> SandboxRecord:
    """A sandbox that was stopped, with disks on the image and a directory."""
    if "disks" not in changes:
        root = next((host.paths.images / "base").glob("*/root.raw"))
        changes["disks"] = {disk: asyncio.run(host.layers.overlay(root, "raw")) for disk in ("root", "data")}
    record = SandboxRecord(new_id("sb"), name, State.STOPPED, SandboxSpec(), datetime.now(UTC))
    record = replace(record, **changes)
    host.records.insert(record)
    host.paths.sandbox(record.id).root.mkdir(mode=0o700)
    return record


def add_checkpoint(host: Host, record: SandboxRecord, **options: Any) -> Checkpoint:
    """A disk checkpoint, as `limpet checkpoint create` makes it."""
    return asyncio.run(checkpointing.make(host, host.records.by_id(record.id), **options))


def add_memory(host: Host, checkpoint: Checkpoint, files: dict[str, bytes] = PAGES) -> Checkpoint:
    """The same checkpoint under a new id, with a memory."""
    identity = new_id("ck")
    staging = durable.staging(host.paths.checkpoints, identity)
    for name, content in files.items():
        (staging / name).write_bytes(content)
    info = checkpoint.info.model_copy(update={"id": identity, "kind": "full"})
    seals = {name: Seal.of(staging / name) for name in files}
    manifest = checkpoint.manifest.model_copy(update={"info": info, "machine": FACTS, "files": seals})
    return host.catalogue.publish(staging, manifest)


def problems(host: Host, checkpoint: Checkpoint, *, thorough: bool = False) -> list[str]:
    return checkpoint.manifest.problems(checkpoint.directory, host.layers, thorough=thorough)


def read_manifest(checkpoint: Checkpoint) -> Manifest:
    return manifests.read(Manifest, checkpoint.directory / "checkpoint.json")


def memory_of(checkpoint: Checkpoint) -> MemoryImage:
    return MemoryImage(checkpoint.directory)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """One bit of a file is another one, as a bad disk does it: its times tell nothing but the change time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
