"""How a sandbox is started: it goes on from the memory that it was suspended to, or from a template, or it boots.

suspended ──► its checkpoint's memory                    a failure leaves it suspended
first start ──► a template that fits ──► boots           a template that fails is removed, and told in the events
otherwise ──► boots its disks
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from limpet import log
from limpet.crashpoint import crashpoint
from limpet.errors import InsufficientSpace, LimpetError
from limpet.services import disks, garbage, origins
from limpet.services.boot import Start
from limpet.services.disks import Disks
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.templatecache import Template
from limpet.services.templates import Templates
from limpet.store import SandboxRecord

_log = log.get("starting")


class Starter:
    """Starts sandboxes; the caller holds the lifecycle lock."""

    def __init__(self, host: Host, templates: Templates) -> None:
        self._host, self._templates = host, templates

    async def start(self, record: SandboxRecord, stages: Stages) -> LiveVM:
        """The running VM of this sandbox, in the live table."""
        if record.memory is not None:
            with self._host.layers.building():
                vm = await self._resume(record, record.memory, stages)
            await garbage.collect(self._host)  # the layers that were made above the suspended ones
            return vm
        with self._host.layers.building():
            if record.disks is None:
                return await self._first(record, stages)
            return await Start(self._host, record).run(stages)

    async def _first(self, record: SandboxRecord, stages: Stages) -> LiveVM:
        template = await self._templates.find(record.spec)
        if template is not None:
            start = self._on_template(record, template)
            try:
                return await start.run(stages)
            except LimpetError as error:
                if not start.origin_at_fault or isinstance(error, InsufficientSpace):
                    raise  # no boot would do better
                self._templates.distrust(template.key, error.message)
                record = self._host.records.by_id(record.id)
        vm = await Start(self._host, record).run(stages)
        self._templates.missed(record.spec)
        return vm

    async def from_template(self, record: SandboxRecord, template: Template, stages: Stages) -> LiveVM:
        """Go on from a template, as this sandbox."""
        return await self._on_template(record, template).run(stages)

    def _on_template(self, record: SandboxRecord, template: Template) -> Start:
        async def layers() -> Disks:
            return await disks.on(self._host, template.layers)

        return Start(self._host, record, template.memory, layers)

    async def _resume(self, record: SandboxRecord, checkpoint_id: str, stages: Stages) -> LiveVM:
        """On new layers, so that the checkpoint stays whole until the sandbox runs."""
        host = self._host
        checkpoint = host.catalogue.find(checkpoint_id)
        async with stages.run("verify"):
            memory = await origins.of(host, checkpoint)
        new = await disks.on(host, checkpoint.manifest.layer_ids())
        crashpoint("resume.disks.before")
        record = host.records.update(record.id, disks=new)
        crashpoint("resume.disks.after")
        facts = checkpoint.manifest.machine  # `set` may have changed the spec for the next boot
        spec = facts.applied_to(record.spec) if facts else record.spec
        vm = await Start(host, replace(record, spec=spec), memory).run(stages)
        host.records.update(record.id, parent=checkpoint.info.parent)
        try:
            crashpoint("resume.forget.before")
            await asyncio.to_thread(host.catalogue.forget, checkpoint_id)
        except (LimpetError, OSError) as error:  # it runs; the next daemon removes what is used up
            _log.warning("checkpoint left behind", checkpoint=checkpoint_id, reason=str(error))
        return vm
