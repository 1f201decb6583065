"""What takes how much of the host's disk, and removing what nothing needs: `limpet system df` and `prune`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from limpet import durable, images
from limpet.images import upkeep
from limpet.models import DiskUsage, Operation, PruneRequest, PruneResult, Usage
from limpet.services import garbage
from limpet.services.catalogue import size_of
from limpet.services.host import Host
from limpet.services.operations import Stages
from limpet.services.records import known_as
from limpet.services.templates import Templates
from limpet.store import SandboxRecord
from limpet.vmm.layers import occupied

Users = Callable[[Path], list[str]]
_KEEP = ("base",)  # images that `setup` would only make anew


class Storage:
    def __init__(self, host: Host, templates: Templates) -> None:
        self._host, self._templates = host, templates

    async def usage(self) -> DiskUsage:
        """Every byte under data and cache, by kind; a layer that several need is counted once, for the first of
        sandboxes, checkpoints, templates and the trash that needs it. The trash's checkpoints and vaults are counted
        with the others."""
        stale = {info.key for info in await self._templates.list() if not info.current}
        records, roots, users = self._host.records.everything(), list(garbage.roots(self._host)), self.image_users()
        rows = await asyncio.to_thread(self._rows, stale, records, roots, users)
        total = sum(row.size for row in rows)
        return DiskUsage(rows=rows, total=total, free=durable.free_bytes(self._host.paths.data))

    def _rows(self, stale: set[str], records: list[SandboxRecord], roots: list[str], users: Users) -> list[Usage]:
        host, paths = self._host, self._host.paths
        counted: set[tuple[int, int]] = set()

        def take(files: Iterator[Path]) -> int:
            """The bytes of files that were not counted yet (hard links are one file)."""
            total = 0
            for file in files:
                try:
                    status = file.lstat()
                except FileNotFoundError:
                    continue
                if (key := (status.st_dev, status.st_ino)) not in counted:
                    counted.add(key)
                    total += status.st_blocks * 512
            return total

        doomed = garbage.found(host, roots)
        waste = sum(occupied(path) for path in doomed)
        artifacts = take(_tree(paths.artifacts)) + take(_tree(paths.pieces))
        image_bytes = take(_tree(paths.images.resolve()))
        names = images.list_images(paths)
        of_images = upkeep.prune(paths, users, tagged=True, keep=_KEEP, dry_run=True)[1]
        removed = [record for record in records if record.trash]
        kept = [record for record in records if not record.trash]
        trash = sum(take(_tree(paths.sandbox(record.id).root)) for record in removed)
        sandboxes = take(_tree(paths.sandboxes)) + sum(take(self._disks(record)) for record in kept)
        checkpoints = take(_tree(paths.checkpoints)) + take(self._layers(host.catalogue.roots()))
        known = host.templates.all()
        old = sum(size_of(template.directory) for template in known if template.key in stale)
        templates = take(_tree(paths.templates)) + take(self._layers(host.templates.roots()))
        trash += sum(take(self._disks(record)) for record in removed)
        vaults = take(_tree(paths.vaults))
        rest = take(iter(doomed)) + take(_tree(paths.data)) + take(_tree(paths.cache))
        live = len(host.live)
        return [
            Usage(kind="images", count=len(names), active=len({record.spec.image for record in records}),
                  size=image_bytes, reclaimable=of_images),
            Usage(kind="templates", count=len(known), active=len(known) - len(stale), size=templates, reclaimable=old),
            Usage(kind="checkpoints", count=len(host.catalogue.all()), active=0, size=checkpoints, reclaimable=0),
            Usage(kind="sandboxes", count=len(kept), active=live, size=sandboxes, reclaimable=0),
            Usage(kind="artifacts", count=4, active=4, size=artifacts, reclaimable=0),
            Usage(kind="trash", count=len(removed), active=0, size=trash, reclaimable=0),
            Usage(kind="vaults", count=sum(1 for _ in paths.vaults.glob("sb_*")), active=live, size=vaults,
                  reclaimable=0),
            Usage(kind="other", count=len(doomed), active=0, size=rest, reclaimable=waste),
        ]  # fmt: skip

    def _disks(self, record: SandboxRecord) -> Iterator[Path]:
        return self._layers((record.disks or {}).values())

    def _layers(self, tops: Iterable[str]) -> Iterator[Path]:
        for top in tops:
            for path in self._host.layers.reachable(top):
                if path.suffix != ".raw":
                    yield path

    def image_users(self) -> Users:
        """Who builds on an image version, as things are now: a function from its directory to the names of sandboxes,
        ids of checkpoints and keys of templates. It may be called in a thread."""
        host = self._host
        tops: list[tuple[str, list[str]]] = [
            *((known_as(record), list((record.disks or {}).values())) for record in host.records.everything()),
            *((known.info.id, list(known.manifest.layer_ids().values())) for known in host.catalogue.all()),
            *((f"template {known.key}", list(known.layers.values())) for known in host.templates.all()),
        ]

        def users(directory: Path) -> list[str]:
            target = directory.resolve()
            return [name for name, layers in tops if any(self._lies_in(target, layer) for layer in layers)]

        return users

    def _lies_in(self, directory: Path, layer: str) -> bool:
        return any(directory in path.resolve().parents for path in self._host.layers.reachable(layer))

    async def prune(self, request: PruneRequest) -> Operation:
        """Remove unreachable layers, templates that are out of date, versions of images that no tag names; if asked,
        images that nothing uses."""
        stale = [info.key for info in await self._templates.list() if not info.current] if request.templates else []

        async def work(stages: Stages) -> PruneResult:
            async with stages.run("prune"):
                return await self._prune(request, stale)

        return self._host.operations.start("prune", None, work)

    async def _prune(self, request: PruneRequest, stale: list[str]) -> PruneResult:
        host = self._host
        doomed = garbage.found(host, list(garbage.roots(host)))
        removed = [*(f"layer {path.stem}" for path in doomed), *(f"template {key}" for key in stale)]
        freed = sum(occupied(path) for path in doomed)
        freed += sum(size_of(host.paths.templates / key) for key in stale)
        if not request.dry_run:
            for key in stale:
                host.templates.remove(key)
            await garbage.collect(host)
        of_images = await asyncio.to_thread(
            upkeep.prune, host.paths, self.image_users(), tagged=request.images, keep=_KEEP, dry_run=request.dry_run
        )
        return PruneResult(removed=[*removed, *of_images[0]], freed=freed + of_images[1])


def _tree(directory: Path) -> Iterator[Path]:
    """All files below a directory; symbolic links are not followed."""
    for root, _directories, files in os.walk(directory):
        yield from (Path(root) / file for file in files)
