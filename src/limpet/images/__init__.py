"""Images and everything else a VM is started with; the door of the package.

>>> await setup(paths, progress=print)              # once, or after an update
>>> artifacts(paths).kernel
>>> find_image(paths, "base").root                  # NAME, NAME:TAG or NAME@DIGEST
"""

from limpet.images.commit import build_from_disks
from limpet.images.plan import Artifacts, artifacts
from limpet.images.registry import SPEC_KEYS, Image, ImageFacts, Reference, find_image, list_images
from limpet.images.requirements import missing_tools, namespace_problem
from limpet.images.steps import setup
from limpet.images.transfer import export, import_

__all__ = [
    "SPEC_KEYS", "Artifacts", "Image", "ImageFacts", "Reference", "artifacts", "build_from_disks", "export",
    "find_image", "import_", "list_images", "missing_tools", "namespace_problem", "setup",
]  # fmt: skip
