"""Images from files and to files; the doors of `portable` and `rootfs` for the daemon, which must go on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from limpet.errors import BadRequest
from limpet.images import portable, registry, rootfs
from limpet.images.bootstrap import Report
from limpet.images.registry import Image, Reference
from limpet.images.stages import Progress, stage
from limpet.paths import Paths
from limpet.threads import to_its_end


async def export(image: Image, file: Path, *, replace: bool = False, progress: Progress) -> None:
    """Write an image to the `.limpet` file `file`; raises as `portable.export` does."""
    with stage("export", progress) as report:
        await to_its_end(portable.export, image, file, replace=replace, advance=_advance(report, file.name))


async def import_(
    paths: Paths, file: Path, name: str | None = None, *, replace: bool = False, progress: Progress
) -> Image:
    """Make an image of a `.limpet` file, or of a root file system in a tar. `name` is `NAME[:TAG]`; a tar needs one.

    Raises BadRequest naming the file and what is wrong with it, AlreadyExists when the tag means something and is not
    to be replaced, NotFound, InsufficientSpace. Nothing is published then, and nothing is left."""
    if not await to_its_end(portable.is_portable, file):
        if name is None:
            raise BadRequest(f"a name is needed for the image in {file}", hint="limpet image import FILE NAME")
        reference = Reference.parse(name)
        _refuse(paths, reference, replace)
        return await _import_tar(paths, file, reference, progress)
    reference = Reference.parse(name) if name is not None else await to_its_end(portable.reference, file)
    _refuse(paths, reference, replace)
    with registry.staging(paths, reference.name) as work:
        with stage("import", progress) as report:
            found = await to_its_end(portable.unpack, file, work, advance=_advance(report, file.name))
        with stage("publish", progress):
            try:
                return await to_its_end(
                    registry.publish, paths, reference.name, work, found.facts, tag=reference.tag, expected=found.digest
                )
            except BadRequest as error:
                raise BadRequest(f"{file}: {error.message}", hint=error.hint) from None


async def _import_tar(paths: Paths, file: Path, reference: Reference, progress: Progress) -> Image:
    with registry.staging(paths, reference.name) as work:
        with stage("read", progress) as report:
            tree = await to_its_end(rootfs.survey, file, work / "tree.tar", advance=_advance(report, file.name))
        with stage("file system", progress):
            await rootfs.write(tree, work)
        with stage("publish", progress):
            facts = tree.facts(comment=f"from {file.name}")
            return await to_its_end(registry.publish, paths, reference.name, work, facts, tag=reference.tag)


def _refuse(paths: Paths, reference: Reference, replace: bool) -> None:
    if reference.digest is not None:
        raise BadRequest(f"an image cannot be given the digest {reference.digest}", hint="use NAME or NAME:TAG")
    if not replace:
        registry.refuse_existing(paths, reference)


def _advance(report: Report, detail: str) -> Callable[[float], None]:
    """A function for a worker thread: reports on the event loop, once for each percent."""
    loop, told = asyncio.get_running_loop(), 0

    def advance(fraction: float) -> None:
        nonlocal told
        if (percent := int(fraction * 100)) > told:
            told = percent
            loop.call_soon_threadsafe(report, fraction, detail)

    return advance
