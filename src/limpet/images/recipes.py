"""The images that limpet makes itself: what goes into each, and making it.

    base     Debian 12 with what a coding agent expects to find; `limpet setup` makes it
    docker   base with a container engine; made on demand

The key of a recipe is a hash of everything that goes into it: one that has changed with an update is made anew when
`limpet setup` or `limpet image build` runs. A sandbox keeps the version that it was made from.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from limpet.errors import LimpetError, NotFound, nearest
from limpet.images import bootstrap, debian, initramfs, keys, plan, registry, requirements
from limpet.images.alone import alone
from limpet.images.registry import Image, ImageFacts, Reference
from limpet.images.stages import Progress, stage
from limpet.paths import Paths

BASE = "base"
DOCKER = "docker"

_PACKAGES = (
    "bash", "ca-certificates", "curl", "git", "iproute2", "less", "make", "ncurses-bin", "passwd", "procps",
    "python-is-python3", "python3", "sudo", "unzip", "xz-utils", "zstd",
)  # fmt: skip
_ENGINE = ("docker.io", "containerd", "runc", "iptables", "tini", "docker-compose")


@dataclass(frozen=True)
class Recipe:
    """An image made of Debian packages. `hooks` are scripts in guest/ that run in the new root directory, `spec` is
    what sandboxes of it begin with."""

    name: str
    packages: tuple[str, ...]
    hooks: tuple[str, ...]
    spec: dict[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """What the image depends on. The image itself is named by its content."""
        scripts = (script.encode() for script in self._scripts())
        return keys.key_of(self.name, bootstrap.SUITE, *self.packages, *debian.KEY_PARTS, *scripts)

    def facts(self) -> ImageFacts:
        return ImageFacts(user="user", home="/home/user", spec=self.spec)

    def is_current(self, paths: Paths) -> bool:
        """Whether the image of this name is the one that this version of limpet makes."""
        return registry.recipe(paths, self.name) == self.key()

    def is_outdated(self, paths: Paths) -> bool:
        """Whether the image of this name was made by this recipe, as it was before an update."""
        return registry.recipe(paths, self.name) not in (None, "", self.key())

    async def make(self, paths: Paths, progress: Progress, mirror: str | None) -> Image:
        """Make it and let the name mean it; the caller is `alone` and has checked the host's tools."""
        with stage(f"image {self.name}", progress) as report, registry.staging(paths, self.name) as work:
            await debian.build(work, self.packages, self._scripts(), report, mirror)
            return await asyncio.to_thread(
                registry.publish, paths, self.name, work, self.facts(), recipe_key=self.key()
            )

    def _scripts(self) -> tuple[str, ...]:
        return tuple((initramfs.GUEST / hook).read_text() for hook in self.hooks)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(BASE, _PACKAGES, ("customize.sh",)),
        # the engine, its container and what runs in it: less than 1 GiB soon begins to swap out its own code
        Recipe(DOCKER, (*_PACKAGES, *_ENGINE), ("customize.sh", "docker.sh"), {"memory_mib": 1024}),
    )
}


async def build_image(
    paths: Paths, name: str, *, progress: Progress, force: bool = False, mirror: str | None = None
) -> Image:
    """The image of a recipe, made now unless it is current; `force`: anyway, for newer packages.

    Raises NotFound with the nearest recipe, FailedPrecondition (no setup yet, namespaces), Unavailable (tools,
    network) or InsufficientSpace. Nothing is published then, and nothing is left."""
    recipe = require_recipe(name)
    if force or not recipe.is_current(paths):
        plan.artifacts(paths)  # without them no sandbox would run from it
        async with alone(paths, progress):
            if force or not recipe.is_current(paths):
                await requirements.check(paths)
                return await recipe.make(paths, progress, mirror)
    return registry.find_image(paths, name)


def named(paths: Paths, name: str) -> Image | Recipe:
    """The image of this name, or the recipe that its first use makes it by. Raises NotFound with the nearest name of
    both kinds."""
    try:
        return registry.find_image(paths, name)
    except NotFound as error:
        if (recipe := _on_demand(name)) is not None:
            return recipe
        known = [str(Reference(info.name, info.tag)) for info in registry.list_images(paths)]
        raise NotFound(error.message, hint=nearest(name, [*known, *RECIPES]) or error.hint) from None


def require_recipe(name: str) -> Recipe:
    """The recipe of this name. Raises NotFound with the nearest one."""
    if name not in RECIPES:
        raise NotFound(
            f"limpet has no recipe for an image '{name}'",
            hint=nearest(name, list(RECIPES)) or f"there are: {', '.join(RECIPES)}; others: limpet image import",
        )
    return RECIPES[name]


def _on_demand(name: str) -> Recipe | None:
    """The recipe that a first use makes: not base, for setup has made that unless somebody removed it on purpose."""
    try:
        reference = Reference.parse(name)
    except LimpetError:
        return None
    if reference.digest is not None or reference.tag != registry.LATEST or reference.name == BASE:
        return None
    return RECIPES.get(reference.name)
