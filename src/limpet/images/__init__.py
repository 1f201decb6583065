"""Images and everything else a VM is started with; the door of the package.

>>> await setup(paths, progress=print)              # once, or after an update
>>> artifacts(paths).kernel
>>> await build_image(paths, "docker", progress=print)   # one of limpet's own recipes
>>> find_image(paths, "base").root                  # NAME, NAME:TAG or NAME@DIGEST
"""

from limpet.images.commit import build_from_disks
from limpet.images.plan import Artifacts, artifacts
from limpet.images.recipes import RECIPES, Recipe, build_image, named, require_recipe
from limpet.images.registry import SPEC_KEYS, Image, ImageFacts, Reference, find_image, list_images
from limpet.images.requirements import missing_tools, namespace_problem
from limpet.images.steps import setup
from limpet.images.transfer import export, import_

__all__ = [
    "RECIPES", "SPEC_KEYS", "Artifacts", "Image", "ImageFacts", "Recipe", "Reference", "artifacts",
    "build_from_disks", "build_image", "export", "find_image", "import_", "list_images", "missing_tools", "named",
    "namespace_problem", "require_recipe", "setup",
]  # fmt: skip
