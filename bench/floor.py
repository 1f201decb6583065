"""The floors. A boot: limpet's kernel by the same QEMU to a shell that prints one line; nothing of limpet runs. A
restore: QEMU goes on from a template and the agent runs one command; no daemon, no identity, no records."""

from __future__ import annotations

import signal
import subprocess
import time
import uuid
from pathlib import Path

from limpet import images, paths, process
from limpet.guest import Agent, Channel
from limpet.images.cpio import Archive
from limpet.services.templatecache import TemplateCache
from limpet.vmm import accel, command, disks
from limpet.vmm.layers import Layers
from limpet.vmm.machine import Machine

_INIT = b"#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs d /dev\necho SHELL > /dev/ttyS0\n/bin/busybox sleep 60\n"
_LIMIT = 30.0  # seconds


def bare_boot(where: paths.Paths, verdict: accel.Verdict, tsc_khz: int | None, directory: Path) -> float:
    """Seconds from starting QEMU to the shell's first line."""
    initramfs = directory / "floor.cpio"
    initramfs.write_bytes(_initramfs())
    pieces = images.artifacts(where)
    argv = [
        process.require(command.QEMU), *command.board(verdict.accel), *command.accelerator(verdict.accel),
        "-smp", "2", "-m", "512", "-kernel", str(pieces.kernel), "-initrd", str(initramfs),
        "-append", " ".join(command.kernel_parameters(verdict.accel, tsc_khz)), "-serial", "stdio",
    ]  # fmt: skip
    began = time.perf_counter()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as qemu:
        try:
            assert qemu.stdout is not None
            for line in qemu.stdout:
                if b"SHELL" in line:
                    return time.perf_counter() - began
                if time.perf_counter() - began > _LIMIT:
                    break
            raise RuntimeError("the bare boot printed no SHELL")
        finally:
            qemu.kill()


async def bare_restore(where: paths.Paths, directory: Path, *, memory_mib: int, network: str) -> float:
    """Seconds from starting QEMU on a template to the first output of a command."""
    template = next(
        found for found in TemplateCache(where.templates, Layers(where.layers)).all()
        if (found.manifest.machine.memory_mib, found.manifest.machine.network) == (memory_mib, network)
    )  # fmt: skip
    directory.mkdir()
    disks_made = {}
    for disk, layer in template.layers.items():
        disks_made[disk] = directory / f"{disk}.qcow2"
        below = str(where.layers / f"{layer}.qcow2")
        await process.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", str(disks_made[disk])]
        )
    disks.create_intake(directory / "intake")
    pieces = images.artifacts(where)
    spec = command.MachineSpec(
        name="floor", uuid=str(uuid.uuid4()), vcpus=template.manifest.machine.vcpus, memory_mib=memory_mib,
        kernel=pieces.kernel, initramfs=pieces.initramfs, agent_disk=template.memory.agent_disk,
        root_disk=disks_made["root"], data_disk=disks_made["data"], intake=directory / "intake",
        qmp_socket=directory / "qmp", channel_socket=directory / "channel", console_log=directory / "console.log",
        qemu_log=directory / "qemu.log", lock=directory / "lock", accel=template.manifest.machine.accel,
        memory=template.memory,
    )  # fmt: skip
    began = time.perf_counter()
    machine = await Machine.launch(spec)
    try:
        await machine.qmp("cont")
        channel = await Channel.connect(spec.channel_socket, intake=spec.intake, attempt=_LIMIT)
        assert (await Agent(channel).run(["echo", "hi"])).stdout == b"hi\n"
        took = time.perf_counter() - began
        await channel.close()
        return took
    finally:
        machine.terminate(signal.SIGKILL)
        await machine.wait(_LIMIT)


def _initramfs() -> bytes:
    archive = Archive()
    for directory in ("bin", "dev"):
        archive.directory(directory)
    busybox = Path(process.require("busybox")).read_bytes()
    archive.file("bin/busybox", busybox, 0o755)
    archive.symlink("bin/sh", "busybox")
    archive.file("init", _INIT, 0o755)
    return archive.to_bytes()
