"""The images on this host: looked at, moved, removed. Whatever builds on one keeps it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from limpet import images
from limpet.errors import BadRequest, NotFound
from limpet.images import upkeep
from limpet.models import (
    ImageBuildRequest,
    ImageFileRequest,
    ImageInfo,
    ImageVersion,
    Operation,
    PruneResult,
    VerifyResult,
)
from limpet.services import garbage, imagebuild
from limpet.services.host import Host
from limpet.services.operations import Stages
from limpet.services.storage import Storage


class Images:
    def __init__(self, host: Host, storage: Storage) -> None:
        self._host, self._storage = host, storage

    async def list(self) -> Sequence[ImageInfo]:
        return images.list_images(self._host.paths)

    async def get(self, image: str) -> ImageInfo:
        found = images.named(self._host.paths, image)
        if isinstance(found, images.Recipe):
            raise NotFound(f"the image {image} has not been made yet", hint=f"limpet image build {found.name}")
        return found.info

    async def history(self, name: str) -> Sequence[ImageVersion]:
        return await asyncio.to_thread(upkeep.history, self._host.paths, name, self._storage.image_users())

    async def remove(self, image: str) -> None:
        """Raises FailedPrecondition naming who builds on it. Templates of it go with it."""
        digest = images.find_image(self._host.paths, image).info.digest
        for template in self._host.templates.all():
            if template.manifest.digest == digest:
                self._host.templates.remove(template.key)
        await garbage.collect(self._host)
        await asyncio.to_thread(upkeep.remove, self._host.paths, image, self._storage.image_users())
        self._host.events.emit("image.removed", image=image)

    async def prune(self) -> PruneResult:
        """Remove the versions that no tag names and nobody builds on."""
        removed, freed = await asyncio.to_thread(upkeep.prune, self._host.paths, self._storage.image_users())
        return PruneResult(removed=removed, freed=freed)

    async def verify(self, image: str) -> Operation:
        """Read it again and compare."""
        digest = images.find_image(self._host.paths, image).info.digest

        async def work(stages: Stages) -> VerifyResult:
            began = time.monotonic()
            async with stages.run("verify"):
                problems = await asyncio.to_thread(upkeep.verify, self._host.paths, image)
            seconds = round(time.monotonic() - began, 3)
            return VerifyResult(id=digest, ok=not problems, problems=problems, seconds=seconds)

        return self._host.operations.start("image verify", image, work)

    async def build(self, request: ImageBuildRequest) -> Operation:
        """Make the image of one of limpet's own recipes, unless it is current."""
        recipe = images.require_recipe(request.name)

        async def work(stages: Stages) -> ImageInfo:
            return (await imagebuild.build(self._host, recipe, stages, force=request.force)).info

        return self._host.operations.start("image build", request.name, work)

    async def export(self, image: str, request: ImageFileRequest) -> Operation:
        """Write it to one file of this host."""
        found, path = images.find_image(self._host.paths, image), _absolute(request.path)

        async def work(stages: Stages) -> ImageInfo:
            await images.export(found, path, replace=request.replace, progress=stages.report)
            return found.info

        return self._host.operations.start("image export", image, work)

    async def import_file(self, request: ImageFileRequest) -> Operation:
        """A `.limpet` file or the tar of a root file system becomes an image."""
        path = _absolute(request.path)

        async def work(stages: Stages) -> ImageInfo:
            image = await images.import_(
                self._host.paths, path, request.name, replace=request.replace, progress=stages.report
            )
            self._host.events.emit("image.imported", image=image.info.name, digest=image.info.digest)
            return image.info

        return self._host.operations.start("image import", request.name or path.name, work)


def _absolute(path: str) -> Path:
    if not path.startswith("/"):
        raise BadRequest(f"{path!r} is not an absolute path", hint="the daemon has a directory of its own")
    return Path(path)
