"""An image out of a sandbox's disks.

    layers (immutable; the sandbox runs on above them)
      └─ throw-away overlays ── tidy VM: journals replayed, /tmp and identity left out, free space given back
           └─ qemu-img convert ── root.raw, data.raw ── digests ── superblocks ── publish ── tag

All in a staging directory of the image, which goes away on every path. What the tag meant before it means until the
last step.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from limpet import durable, process
from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition, InsufficientSpace, Internal
from limpet.images import filesystems, initramfs, oneoff, pieces, registry
from limpet.images.plan import Plan
from limpet.images.registry import Image, ImageFacts
from limpet.images.stages import Progress, stage
from limpet.names import check_name
from limpet.paths import Paths
from limpet.threads import to_its_end

_SLACK = 64 << 20  # bytes for overlays and metadata
_CONVERT_TIMEOUT = 1800.0  # seconds


async def build_from_disks(
    paths: Paths, *, name: str, tag: str, root: Path, data: Path, facts: ImageFacts, progress: Progress
) -> Image:
    """Make `name:tag` out of two qcow2 files that do not change while this runs, nor anything that they lie on.

    Raises BadRequest (name, tag), FailedPrecondition (setup is missing), InsufficientSpace, Unavailable (the tidy VM,
    with its console: a file system that cannot be mounted). Nothing is published then, and nothing is left."""
    check_name(name, "image")
    check_name(tag, "tag")
    with registry.staging(paths, name) as work:
        with stage("tidy", progress):
            crashpoint("image.tidy.before")
            overlays = await _tidy(paths, work, {"root": root, "data": data})
            crashpoint("image.tidy.after")
        with stage("flatten", progress):
            await _flatten(overlays, work)
            crashpoint("image.flatten.after")
        with stage("publish", progress):
            return await to_its_end(registry.publish, paths, name, work, facts, tag=tag)


async def _tidy(paths: Paths, work: Path, layers: dict[str, Path]) -> dict[str, Path]:
    """Overlays over the layers that hold what the image shall be."""
    plan = Plan.make(paths)
    try:
        archive = initramfs.build_tidy(pieces.load(plan.pieces))
    except (OSError, ValueError, KeyError):
        raise FailedPrecondition("not set up yet", hint="limpet setup") from None
    durable.require_space(work, _SLACK, "an image")
    (work / "initramfs").write_bytes(archive)
    overlays = {disk: work / f"{disk}.qcow2" for disk in layers}

    async def fresh() -> oneoff.Disks:
        for disk, overlay in overlays.items():
            backing = ["-b", str(layers[disk].absolute()), "-F", "qcow2"]
            await process.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(overlay)], timeout=60)
        return overlays

    what = "the virtual machine that tidies the disks of a new image"
    await oneoff.run("tidy", what, kernel=plan.kernel, initramfs=work / "initramfs", disks=fresh)
    (work / "initramfs").unlink()
    return overlays


async def _flatten(overlays: dict[str, Path], work: Path) -> None:
    """Write each overlay with everything below it to a raw file, and see that the result can be one of an image's."""
    needed = sum(await asyncio.gather(*(_measure(overlay) for overlay in overlays.values())))
    durable.require_space(work.parent, needed + _SLACK, "an image")
    try:
        async with asyncio.TaskGroup() as group:
            for disk, overlay in overlays.items():
                group.create_task(_convert(overlay, work / f"{disk}.raw"))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    for disk, overlay in overlays.items():
        raw = work / f"{disk}.raw"
        if (wrong := filesystems.problem(raw, disk)) is not None:
            raise FailedPrecondition(f"the sandbox's {disk} disk cannot become an image: {wrong}", hint="limpet doctor")
        overlay.unlink()


async def _convert(overlay: Path, raw: Path) -> None:
    """Write a disk to a raw file, and compare the two."""
    # -W: out of order, several at once. Zeroes of 4 KiB and more become holes (-S).
    options = ["-q", "-f", "qcow2", "-O", "raw", "-S", "4k", "-W", "-m", "8", "-t", "writeback", "-T", "writeback"]
    try:
        await process.run(["qemu-img", "convert", *options, str(overlay), str(raw)], timeout=_CONVERT_TIMEOUT)
    except process.CommandFailed as error:
        if b"No space left" in error.stderr:
            raise InsufficientSpace("no space left for the image", hint="free some space and try again") from None
        raise
    compare = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", str(overlay), str(raw)]
    if (await process.run(compare, timeout=_CONVERT_TIMEOUT, check=False)).returncode != 0:
        raise Internal(f"{raw.name} is not what was to be written to it", hint="check the host's disk and memory")


async def _measure(overlay: Path) -> int:
    """Bytes that a disk takes when it is flattened. For a raw file qemu-img would tell the size with the holes."""
    command = ["qemu-img", "measure", "--output=json", "-f", "qcow2", "-O", "qcow2", str(overlay)]
    return int(json.loads((await process.run(command, timeout=60)).stdout)["required"])
