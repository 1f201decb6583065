"""The disks of sandboxes, as layers: `root` and `data`, always changed together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from limpet import images
from limpet.services.host import Host
from limpet.store import SandboxRecord

Disks = dict[str, str]  # {"root": layer, "data": layer}


async def fresh(host: Host, record: SandboxRecord) -> Disks:
    """New disks for a sandbox that has none: on its image, with the image's data disk or a blank one."""
    image = images.find_image(host.paths, record.spec.image)
    layers = host.layers
    data = layers.overlay(image.data, "raw") if image.data else layers.copy(images.artifacts(host.paths).blank_data)
    root, data_layer = await asyncio.gather(layers.overlay(image.root, "raw"), data)
    await layers.durable()
    return {"root": root, "data": data_layer}


async def on(host: Host, below: Mapping[str, str]) -> Disks:
    """New, empty layers on these, durable."""
    names = list(below)
    made = await asyncio.gather(*(host.layers.overlay(host.layers.path(below[name])) for name in names))
    await host.layers.durable()
    return dict(zip(names, made, strict=True))


def used(host: Host, record: SandboxRecord) -> int:
    """Bytes that a sandbox's own, active layers take on the host."""
    return host.layers.used(*(record.disks or {}).values())
