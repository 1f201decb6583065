"""Images and everything else a VM is started with; the door of the package.

>>> await setup(paths, progress=print)              # once, or after an update
>>> artifacts(paths).kernel
>>> find_image(paths, "base").root
"""

from limpet.images.plan import Artifacts, artifacts
from limpet.images.registry import Image, find_image, list_images
from limpet.images.requirements import missing_tools, namespace_problem
from limpet.images.steps import setup

__all__ = [
    "Artifacts", "Image", "artifacts", "find_image", "list_images", "missing_tools", "namespace_problem", "setup",
]  # fmt: skip
