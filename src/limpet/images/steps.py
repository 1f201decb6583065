"""Setup: everything that sandboxes are made of, from Debian packages, step by step.

    pieces ─┬─ kernel ───────┐
            ├─ initramfs     ├─ data disk
            └─ agent disk    ┘
    image base, and those that have been made on demand

Each step makes its result in a staging directory and publishes it by one rename under a name that is a hash of what
went into it. So a step whose name is there is done; a setup that was killed leaves strays, which the next one sweeps,
and goes on with the first step that is missing. A lock lets one setup work at a time; others wait and find it done.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from limpet import durable
from limpet.errors import InsufficientSpace
from limpet.images import agent_disk, blank, initramfs, kernel, pieces, requirements
from limpet.images.alone import alone
from limpet.images.bootstrap import Report
from limpet.images.plan import Plan
from limpet.images.recipes import RECIPES, Recipe
from limpet.images.stages import Progress, stage
from limpet.paths import Paths

_KEEP = 3  # versions of each artifact and of the pieces; older ones go


async def setup(paths: Paths, *, progress: Progress, force: bool = False, mirror: str | None = None) -> list[str]:
    """Make what is missing and return the names of the steps that were done (none the second time).

    `mirror` is an argument of mmdebstrap: a URL or a sources.list line. `force` makes the image base anew although its
    recipe is unchanged, for newer packages; running sandboxes keep the version that they have.
    Raises Unavailable (tools, network), FailedPrecondition (namespaces) or InsufficientSpace, each with a remedy."""
    plan = Plan.make(paths)
    if not plan.missing() and not _images(paths, force):
        return []
    paths.make()
    async with alone(paths, progress):
        wanted = _images(paths, force)
        if plan.missing() or wanted:
            await requirements.check(paths)
        return await _Setup(plan, progress, mirror).run(wanted)


def _images(paths: Paths, force: bool) -> list[Recipe]:
    """The images to make: base unless it is current, and others that were made here by a recipe that has changed."""
    base, *others = RECIPES.values()
    wanted = [base] if force or not base.is_current(paths) else []
    return [*wanted, *(recipe for recipe in others if recipe.is_outdated(paths))]


class _Setup:
    """One run of setup, under its lock."""

    def __init__(self, plan: Plan, progress: Progress, mirror: str | None) -> None:
        self._plan, self._progress, self._mirror = plan, progress, mirror
        self._done: list[str] = []

    async def run(self, images: Sequence[Recipe]) -> list[str]:
        paths = self._plan.paths
        for directory in (paths.pieces, paths.artifacts, *(paths.image(recipe.name) for recipe in images)):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            durable.sweep(directory)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._artifacts())
                group.create_task(self._images(images))
        except ExceptionGroup as errors:
            raise _first(errors) from errors
        for kind in ("vmlinux", "initramfs", "agent", "data"):
            _forget_old(self._plan.paths.artifacts, kind)
        _forget_old(self._plan.paths.pieces)
        return self._done

    async def _artifacts(self) -> None:
        if not self._plan.missing():
            return
        found = await self._pieces()
        await self._file("kernel", self._plan.kernel, lambda _, target: _write_kernel(found, target))
        await self._file("initramfs", self._plan.initramfs, lambda _, target: _write_initramfs(found, target))
        await self._file("agent disk", self._plan.agent_disk, functools.partial(agent_disk.build, found))
        await self._file("data disk", self._plan.blank_data, functools.partial(blank.build, found, self._plan.kernel))

    async def _pieces(self) -> pieces.Pieces:
        target = self._plan.pieces
        if not target.exists():
            with self._stage("pieces") as report, _staging(target.parent, "pieces") as work:
                await pieces.build(work, report, self._mirror)
                await asyncio.to_thread(durable.publish, work, target)
        return pieces.load(target)

    async def _file(self, name: str, target: Path, build: Callable[[Path, Path], Awaitable[None]]) -> None:
        if target.exists():
            return
        with self._stage(name), _staging(target.parent, target.name) as work:
            result = work / "result"
            await build(work, result)
            result.chmod(0o444)
            await asyncio.to_thread(durable.publish, result, target)

    async def _images(self, images: Sequence[Recipe]) -> None:
        for recipe in images:
            await recipe.make(self._plan.paths, self._progress, self._mirror)
            self._done.append(f"image {recipe.name}")

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[Report]:
        """Tell how a step goes, and count it as done."""
        with stage(name, self._progress) as report:
            yield report
        self._done.append(name)


async def _write_kernel(found: pieces.Pieces, target: Path) -> None:
    target.write_bytes(await kernel.vmlinux(found.vmlinuz.read_bytes()))


async def _write_initramfs(found: pieces.Pieces, target: Path) -> None:
    target.write_bytes(initramfs.build(found))


@contextlib.contextmanager
def _staging(directory: Path, name: str) -> Iterator[Path]:
    work = durable.staging(directory, name)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)  # whatever was published is no longer in it


def _forget_old(directory: Path, kind: str | None = None) -> None:
    """Remove all but the newest versions of an artifact or of the pieces; a VM that runs from one keeps it open."""
    found = sorted(directory.glob(f"{kind}-*" if kind else "*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in found[_KEEP:]:
        if old.is_dir():
            durable.remove_tree(old)
        else:
            old.unlink(missing_ok=True)


def _first(group: ExceptionGroup[Exception]) -> Exception:
    """What went wrong first, as an error that the user can do something about."""
    error = group.exceptions[0]
    if isinstance(error, ExceptionGroup):
        return _first(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientSpace("no space left for limpet setup", hint="free some space and run it again")
    return error
