"""The images that sandboxes are made from."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

from limpet.client import _wire
from limpet.client._async.operations import AsyncOperations, OnStage
from limpet.client._async.transport import AsyncTransport
from limpet.models import ImageInfo, ImageVersion, PruneResult, VerifyResult


class AsyncImages:
    """`image` is `NAME[:TAG]` or `NAME@DIGEST`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._operations = AsyncOperations(transport)

    async def list(self) -> builtins.list[ImageInfo]:
        answer = await self._transport.request("GET", _wire.path_of("images"))
        return [ImageInfo.model_validate(item) for item in answer]

    async def get(self, image: str) -> ImageInfo:
        """Raises NotFound with the nearest name."""
        return ImageInfo.model_validate(await self._transport.request("GET", _wire.path_of("images", image)))

    async def history(self, name: str) -> builtins.list[ImageVersion]:
        """Its versions, the newest first."""
        answer = await self._transport.request("GET", _wire.path_of("images", name, "history"))
        return [ImageVersion.model_validate(item) for item in answer]

    async def remove(self, image: str) -> None:
        """Raises FailedPrecondition, naming them, when sandboxes, checkpoints or templates build on it."""
        await self._transport.request("DELETE", _wire.path_of("images", image))

    async def prune(self) -> PruneResult:
        """Remove every version that no tag names and nothing builds on."""
        return PruneResult.model_validate(await self._transport.request("POST", _wire.path_of("images", "prune")))

    async def verify(self, image: str, *, on_stage: OnStage | None = None) -> VerifyResult:
        """Compare its disks with their digests."""
        path = _wire.path_of("images", image, "verify")
        return VerifyResult.model_validate(await self._operations.run("POST", path, on_stage=on_stage))

    async def build(self, name: str, *, force: bool = False, on_stage: OnStage | None = None) -> ImageInfo:
        """Make the image of one of limpet's own recipes (`docker`, `base`), unless it is current. `force`: anyway, for
        newer packages. Raises NotFound with the nearest name."""
        path, body = _wire.path_of("images", "build"), {"name": name, "force": force}
        return ImageInfo.model_validate(await self._operations.run("POST", path, body=body, on_stage=on_stage))

    async def export(
        self, image: str, file: str | os.PathLike[str], *, replace: bool = False, on_stage: OnStage | None = None
    ) -> ImageInfo:
        """Write it to one file, with which it can move to another host. The daemon writes it: whole or not at all.
        `replace` takes the place of a file that is there."""
        path, body = _wire.path_of("images", image, "export"), {"path": str(Path(file).absolute()), "replace": replace}
        return ImageInfo.model_validate(await self._operations.run("POST", path, body=body, on_stage=on_stage))

    async def import_(
        self, file: str | os.PathLike[str], *, name: str | None = None, replace: bool = False,
        on_stage: OnStage | None = None,
    ) -> ImageInfo:  # fmt: skip
        """Make an image of an exported file or of a tar archive (plain, gz, xz, zst) of a root file system. `name`:
        `NAME[:TAG]`, default: as in the file. `replace`: also when the tag is taken."""
        body = {"path": str(Path(file).absolute()), "name": name, "replace": replace}
        answer = await self._operations.run("POST", _wire.path_of("images", "import"), body=body, on_stage=on_stage)
        return ImageInfo.model_validate(answer)
