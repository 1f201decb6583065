"""Templates: building them, finding the one that fits, and the verbs on them.

    boot ──► warm (agent, engine, shell, Python, git) ──► sync ──► pause ──► memory image, disks ──► publish

A template is built in the background when a create first misses it, one at a time, and never by anything but a
booted VM of exactly its shape. A create that finds none boots; one whose template fails says so and boots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from limpet import durable, images, log
from limpet.crashpoint import crashpoint
from limpet.digests import Seal
from limpet.errors import LimpetError
from limpet.guest.runtime import Runtime
from limpet.models import Operation, SandboxSpec, State, TemplateInfo, TemplateRequest
from limpet.names import new_id
from limpet.services import garbage, imagebuild, machines
from limpet.services.boot import Start
from limpet.services.catalogue import keep
from limpet.services.host import Host
from limpet.services.instants import agent_disk
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.templatecache import Template, TemplateManifest, key_of
from limpet.store import SandboxRecord
from limpet.vmm import capture
from limpet.vmm.memory import MemoryImage

# What a first command would otherwise pay for: page cache and, in a pooled VM, translated code.
_WARM = ("bash -c :", "python3 -c 'import json, subprocess'", "git --version")
_WARM_S = 60.0
_QUIET_S = 1.0  # seconds without a create before a missed template is built
_log = log.get("templates")


class Templates:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._building = asyncio.Lock()
        self._wanted: dict[str, SandboxSpec] = {}
        self._failed: set[str] = set()  # keys whose building failed: not tried again by this daemon
        self._background: asyncio.Task[None] | None = None

    # ── for those who start VMs ──────────────────────────────────────────────────────────────────────────────────

    async def find(self, spec: SandboxSpec) -> Template | None:
        """The template for a sandbox of this spec, whole, or None; a damaged one is removed and named in the events."""
        key, _ = await self._key(spec)
        try:
            template = self._host.templates.get(key)
            problem = await asyncio.to_thread(self._host.templates.whole, template)
        except LimpetError as error:
            problem = error.message if (self._host.templates.directory / key).is_dir() else None
            if problem is None:
                return None
        if problem is not None:
            self.distrust(key, problem)
            return None
        self._host.templates.touch(template)
        return template

    async def key(self, spec: SandboxSpec) -> str:
        """The key that a template for this spec has, whether or not there is one."""
        return (await self._key(spec))[0]

    def distrust(self, key: str, why: str) -> None:
        """Remove a template that is damaged, or that no VM starts from."""
        self._host.events.emit("template.removed", key=key, reason=why)
        self._host.templates.remove(key)

    def missed(self, spec: SandboxSpec) -> None:
        """Build the template for this spec in the background, if that is wanted."""
        if not self._host.config.template_auto:
            return
        shape = machines.shape(spec)
        self._wanted[shape.model_dump_json()] = shape
        if self._background is None or self._background.done():
            self._background = asyncio.create_task(self._build_wanted(), name="templates")

    async def _build_wanted(self) -> None:
        while self._wanted:
            await asyncio.sleep(_QUIET_S)
            _, spec = self._wanted.popitem()
            with log.operation():
                key = ""
                try:
                    key, _ = await self._key(spec)
                    if key not in self._failed:
                        await self._build(spec, Stages.unseen())
                except Exception as error:
                    self._failed.add(key)
                    _log.warning("template not built", reason=str(error))
                    self._host.events.emit("template.failed", key=key, reason=str(error))

    async def close(self) -> None:
        """Stop building."""
        if self._background is not None:
            self._background.cancel()
            await asyncio.gather(self._background, return_exceptions=True)

    # ── verbs ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def list(self) -> Sequence[TemplateInfo]:
        found = await asyncio.to_thread(self._host.templates.all)
        return [self._host.templates.info(one, current=await self._is_current(one)) for one in found]

    async def build(self, request: TemplateRequest) -> Operation:
        """Build one now, unless it is there."""
        image = images.named(self._host.paths, request.image)
        own = {key: image.spec[key] for key in ("vcpus", "memory_mib") if key in image.spec}
        spec = SandboxSpec.model_validate({**own, **request.model_dump(exclude_unset=True)})

        async def work(stages: Stages) -> TemplateInfo:
            if isinstance(image, images.Recipe):
                await imagebuild.build(self._host, image, stages)
            template = await self._build(spec, stages)
            return self._host.templates.info(template, current=True)

        return self._host.operations.start("template", spec.image, work)

    async def remove(self, key: str) -> None:
        await asyncio.to_thread(self._host.templates.remove, key)
        await garbage.collect(self._host)

    # ── building ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _key(self, spec: SandboxSpec) -> tuple[str, machines.MachineFacts]:
        facts = await machines.here(self._host.paths, spec)
        digest = images.find_image(self._host.paths, spec.image).info.digest
        return key_of(digest, images.artifacts(self._host.paths).key, facts), facts

    async def _is_current(self, template: Template) -> bool:
        made, facts = template.manifest, template.manifest.machine
        spec = SandboxSpec(image=made.image, vcpus=facts.vcpus, memory_mib=facts.memory_mib, network=facts.network)
        try:
            return (await self._key(spec))[0] == template.key
        except LimpetError:
            return False

    async def _build(self, spec: SandboxSpec, stages: Stages) -> Template:
        async with self._building:
            if (template := await self.find(spec)) is not None:
                return template
            record = SandboxRecord(new_id("sb"), f"+template-{new_id('t')}", State.CREATING, spec, datetime.now(UTC))
            self._host.records.insert(record)
            directory = self._host.templates.directory
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            staging = durable.staging(directory, "template")
            try:
                with self._host.layers.building():
                    template = await self._make(record, staging, stages)
                    await asyncio.to_thread(self._host.templates.whole, template)
            finally:
                durable.remove_tree(staging)
                self._host.forget(record)
            await asyncio.to_thread(self._host.templates.trim, self._host.config.template_bytes)
            await garbage.collect(self._host)
            self._host.events.emit("template.built", key=template.key, image=spec.image)
            return template

    async def _make(self, record: SandboxRecord, staging: Path, stages: Stages) -> Template:
        self._host.paths.sandbox(record.id).root.mkdir(mode=0o700)
        vm = await Start(self._host, record).run(stages)
        try:
            async with stages.run("warm"):
                await _warm(vm)
            async with stages.run("memory image"):
                keep(await agent_disk(vm), MemoryImage(staging).agent_disk)
                await vm.close()  # the host of the template goes: clones meet a guest that waits for one
                await vm.machine.qmp("stop")
                crashpoint("template.capture.before")
                await capture.capture(vm.machine, MemoryImage(staging), {}, timeout=_WARM_S)
                crashpoint("template.capture.after")
        finally:
            self._host.live.drop(record.id)
            await vm.close()
            await vm.machine.end()
            await vm.machine.close()
        async with stages.run("publish"):
            return await self._publish(self._host.records.by_id(record.id), staging)

    async def _publish(self, record: SandboxRecord, staging: Path) -> Template:
        for disk, layer in (record.disks or {}).items():
            keep(self._host.layers.path(layer), staging / f"{disk}.qcow2")
        key, facts = await self._key(record.spec)
        files = {path.name: await asyncio.to_thread(Seal.of, path) for path in sorted(staging.iterdir())}
        manifest = TemplateManifest(
            key=key, image=record.spec.image, machine=facts, created_at=datetime.now(UTC),
            digest=images.find_image(self._host.paths, record.spec.image).info.digest,
            artifacts=images.artifacts(self._host.paths).key,
            files=files,
        )  # fmt: skip
        crashpoint("template.publish.before")
        template = await asyncio.to_thread(self._host.templates.publish, staging, manifest)
        crashpoint("template.publish.after")
        return template


async def _warm(vm: LiveVM) -> None:
    """Run what first commands run, so that clones find it in memory."""
    agent = await vm.agent()
    await agent.warm()
    await _start_engine(Runtime(agent))
    script = "; ".join(f"command -v {line.split()[0]} >/dev/null && {line} >/dev/null 2>&1" for line in _WARM)
    await agent.run(["/bin/sh", "-c", f"{script}; true"], timeout=_WARM_S)
    await agent.sync()


async def _start_engine(runtime: Runtime) -> None:
    """Have a container engine that comes with the boot ready: clones go on with it. One that does not start is no
    reason for every create to boot; clones start it when it is asked for, or say why not."""
    if not (await runtime.status()).autostart:
        return
    try:
        await runtime.ensure()
    except LimpetError as error:
        _log.warning("template without an engine", reason=error.message)
