"""The images that sandboxes are made from. `{image}` is NAME[:TAG]."""

from __future__ import annotations

from collections.abc import Sequence

from limpet.api._endpoint import Call, Endpoint, Many
from limpet.models import ImageBuildRequest, ImageFileRequest, ImageInfo, ImageVersion, Operation, PruneResult

_ONE = "/v1/images/{image}"


async def list_images(call: Call) -> Sequence[ImageInfo]:
    return await call.services.images.list()


async def get_image(call: Call) -> ImageInfo:
    return await call.services.images.get(call.path("image"))


async def image_history(call: Call) -> Sequence[ImageVersion]:
    return await call.services.images.history(call.name)


async def remove_image(call: Call) -> None:
    await call.services.images.remove(call.path("image"))


async def prune_images(call: Call) -> PruneResult:
    return await call.services.images.prune()


async def verify_image(call: Call) -> Operation:
    return await call.services.images.verify(call.path("image"))


async def export_image(call: Call) -> Operation:
    return await call.services.images.export(call.path("image"), call.body(ImageFileRequest))


async def build_image(call: Call) -> Operation:
    return await call.services.images.build(call.body(ImageBuildRequest))


async def import_image(call: Call) -> Operation:
    return await call.services.images.import_file(call.body(ImageFileRequest))


ROUTES = (
    Endpoint("GET", "/v1/images", list_images, "List images", Many(ImageInfo)),
    Endpoint("POST", "/v1/images/build", build_image, "Make the image of one of limpet's own recipes, unless it is "
             "current (result: ImageInfo)", Operation, body=ImageBuildRequest, status=202),
    Endpoint("POST", "/v1/images/import", import_image, "A .limpet file or the tar of a root file system as an image "
             "(result: ImageInfo)", Operation, body=ImageFileRequest, status=202),
    Endpoint("POST", "/v1/images/prune", prune_images, "Remove versions that no tag names and nothing uses",
             PruneResult),
    Endpoint("GET", _ONE, get_image, "Show one image", ImageInfo),
    Endpoint("DELETE", _ONE, remove_image, "Remove an image"),
    Endpoint("GET", "/v1/images/{name}/history", image_history, "Its versions, the newest first", Many(ImageVersion)),
    Endpoint("POST", _ONE + "/verify", verify_image, "Compare it with its digests (result: VerifyResult)", Operation,
             status=202),
    Endpoint("POST", _ONE + "/export", export_image, "Write it to one file (result: ImageInfo)", Operation,
             body=ImageFileRequest, status=202),
)  # fmt: skip
