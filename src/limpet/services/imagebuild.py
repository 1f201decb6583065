"""Making images by limpet's own recipes, on demand or because somebody asked."""

from __future__ import annotations

from limpet import images
from limpet.images import Image, Recipe
from limpet.services.host import Host
from limpet.services.operations import Stages


async def build(host: Host, recipe: Recipe, stages: Stages, *, force: bool = False) -> Image:
    """The image of a recipe, made now unless it is current; who comes while it is made waits and has it, too. Raises
    as `images.build_image` does."""
    new = force or not recipe.is_current(host.paths)
    image = await images.build_image(host.paths, recipe.name, progress=stages.report, force=force)
    if new:
        host.events.emit("image.built", image=image.info.name, digest=image.info.digest)
    return image
