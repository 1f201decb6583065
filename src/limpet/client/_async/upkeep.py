"""What the daemon keeps on this host: templates, its configuration, and the disk space that all of it takes."""

from __future__ import annotations

import builtins
import json

from limpet.client import _wire
from limpet.client._async.operations import AsyncOperations, OnStage
from limpet.client._async.transport import AsyncTransport
from limpet.errors import NotFound, nearest
from limpet.models import DiskUsage, PruneResult, Setting, TemplateInfo


class AsyncTemplates:
    """Booted, warmed VMs that new sandboxes start from; made in the background when one is missed."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def list(self) -> builtins.list[TemplateInfo]:
        answer = await self._transport.request("GET", _wire.path_of("templates"))
        return [TemplateInfo.model_validate(item) for item in answer]

    async def build(
        self, image: str = "base", *, vcpus: int | None = None, memory_mib: int | None = None,
        network: str | None = None, on_stage: OnStage | None = None,
    ) -> TemplateInfo:  # fmt: skip
        """Build the one for sandboxes of this shape now."""
        body = {"image": image, "vcpus": vcpus, "memory_mib": memory_mib, "network": network}
        answer = await AsyncOperations(self._transport).run(
            "POST", _wire.path_of("templates"), body=body, on_stage=on_stage
        )
        return TemplateInfo.model_validate(answer)

    async def remove(self, key: str) -> None:
        await self._transport.request("DELETE", _wire.path_of("templates", key))


class AsyncConfig:
    """The daemon's settings; each is in force as soon as it is set."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def list(self) -> builtins.list[Setting]:
        return [Setting.model_validate(item) for item in await self._transport.request("GET", _wire.path_of("config"))]

    async def get(self, key: str) -> Setting:
        """Raises NotFound with the nearest key."""
        known = {setting.key: setting for setting in await self.list()}
        if key not in known:
            raise NotFound(f"no setting {key!r}", hint=nearest(key, known) or "limpet config ls")
        return known[key]

    async def set(self, key: str, value: str) -> Setting:
        """Raises NotFound with the nearest key, BadRequest with what is allowed."""
        return await self._put(key, value)

    async def unset(self, key: str) -> Setting:
        """Back to the default."""
        return await self._put(key, None)

    async def _put(self, key: str, value: str | None) -> Setting:
        content = json.dumps({"value": value}).encode()  # as content: None is left out of a body
        return Setting.model_validate(
            await self._transport.request("PUT", _wire.path_of("config", key), content=content)
        )


class AsyncSystem:
    """Disk space."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def df(self) -> DiskUsage:
        """What takes how many bytes, and what of it `prune` would free."""
        return DiskUsage.model_validate(await self._transport.request("GET", _wire.path_of("system", "df")))

    async def prune(
        self, *, images: bool = False, templates: bool = True, dry_run: bool = False, on_stage: OnStage | None = None
    ) -> PruneResult:
        """Remove what nothing uses. `images`: also untagged versions, and images that no sandbox uses; `dry_run` only
        tells."""
        body = {"images": images, "templates": templates, "dry_run": dry_run}
        answer = await AsyncOperations(self._transport).run(
            "POST", _wire.path_of("system", "prune"), body=body, on_stage=on_stage
        )
        return PruneResult.model_validate(answer)
