"""What the daemon keeps on this host, and how: templates, the configuration, disk space."""

from __future__ import annotations

from collections.abc import Sequence

from limpet.api._endpoint import Call, Endpoint, Many
from limpet.models import (
    DiskUsage,
    Operation,
    PruneRequest,
    Setting,
    SettingRequest,
    TemplateInfo,
    TemplateRequest,
)


async def list_templates(call: Call) -> Sequence[TemplateInfo]:
    return await call.services.templates.list()


async def build_template(call: Call) -> Operation:
    return await call.services.templates.build(call.body(TemplateRequest))


async def remove_template(call: Call) -> None:
    await call.services.templates.remove(call.path("key"))


async def list_settings(call: Call) -> Sequence[Setting]:
    return await call.services.config.list()


async def set_setting(call: Call) -> Setting:
    return await call.services.config.set(call.path("key"), call.body(SettingRequest).value)


async def disk_usage(call: Call) -> DiskUsage:
    return await call.services.storage.usage()


async def prune_storage(call: Call) -> Operation:
    return await call.services.storage.prune(call.body(PruneRequest))


ROUTES = (
    Endpoint("GET", "/v1/templates", list_templates, "List templates", Many(TemplateInfo)),
    Endpoint("POST", "/v1/templates", build_template, "Build one now (result: TemplateInfo)", Operation,
             body=TemplateRequest, status=202),
    Endpoint("DELETE", "/v1/templates/{key}", remove_template, "Remove a template"),
    Endpoint("GET", "/v1/config", list_settings, "List all settings", Many(Setting)),
    Endpoint("PUT", "/v1/config/{key}", set_setting, "Change a setting; null: back to its default", Setting,
             body=SettingRequest),
    Endpoint("GET", "/v1/system/df", disk_usage, "What takes how much of the disk", DiskUsage),
    Endpoint("POST", "/v1/system/prune", prune_storage, "Remove what nothing uses (result: PruneResult)", Operation,
             body=PruneRequest, status=202),
)  # fmt: skip
