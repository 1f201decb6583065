"""Memory images of real machines, compared byte by byte with the memory that they are of. Below the services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from limpet.guest import Agent, Channel
from limpet.vmm import capture, disks
from limpet.vmm.capture import Captured
from limpet.vmm.command import MachineSpec
from limpet.vmm.layers import Layers
from limpet.vmm.machine import Machine
from limpet.vmm.memory import MemoryImage
from tests.vm.test_machine import spec  # noqa: F401  # the fixture

pytestmark = pytest.mark.vm

_STEP = 1 << 20
_FIRMWARE = (0xF0000, 0x100000)  # the firmware's own memory lies over the RAM there
_BUSY = "while :; do /bin/true; echo $$ > /dev/shm/x; head -c 300k /dev/urandom > /home/user/y; done"
_LOOPS = 3


@asynccontextmanager
async def running(wanted: MachineSpec) -> AsyncIterator[tuple[Machine, Agent]]:
    """A machine whose agent answers; killed at the end."""
    machine = await Machine.launch(wanted)
    try:
        if wanted.memory is not None:
            await machine.qmp("cont")
        channel = await Channel.connect(wanted.channel_socket, intake=wanted.intake, timeout=60, attempt=60)
        agent = Agent(channel)
        while (await agent.ping(timeout=60)).data == "waiting":
            await asyncio.sleep(0.05)
        yield machine, agent
        await channel.close()
    finally:
        machine.terminate(9)
        await machine.wait(10)


async def taken(machine: Machine, directory: Path) -> tuple[MemoryImage, Path, Captured]:
    """A memory image, and beside it the whole memory as QEMU writes it out in the same pause."""
    directory.mkdir()
    dump, until = directory / "dump", capture._until

    async def and_dump(machine: Machine, wanted: set[str], splitting: asyncio.Task[object]) -> None:
        await until(machine, wanted, splitting)  # type: ignore[arg-type]
        if "completed" in wanted:
            size = (await machine.qmp("query-memory-size-summary"))["base-memory"]
            await machine.qmp("pmemsave", timeout=60, val=0, size=size, filename=str(dump))

    with mock.patch.object(capture, "_until", and_dump):
        found = await capture.capture(machine, MemoryImage(directory), {}, timeout=60)
    return MemoryImage(directory), dump, found


def differences(image: Path, dump: Path) -> list[int]:
    """The addresses of the MiBs that differ."""
    found = []
    assert image.stat().st_size == dump.stat().st_size
    with image.open("rb") as one, dump.open("rb") as other:
        for address in range(0, image.stat().st_size, _STEP):
            a, b = bytearray(one.read(_STEP)), bytearray(other.read(_STEP))
            if address == 0:
                a[slice(*_FIRMWARE)] = b[slice(*_FIRMWARE)]
            if a != b:
                found.append(address)
    return found


async def from_image(first: MachineSpec, image: MemoryImage, name: str) -> MachineSpec:
    """The spec of a machine that goes on from an image of the first one, on disks of its own."""
    directory = first.root_disk.parent
    layers, intake = Layers(directory), directory / f"{name}-intake.raw"
    root, data = [layers.path(await layers.overlay(disk)) for disk in (first.root_disk, first.data_disk)]
    disks.create_intake(intake)
    return replace(
        first, memory=image, root_disk=root, data_disk=data, intake=intake, lock=directory / f"{name}.lock",
        qmp_socket=directory / "run" / f"{name}-qmp", channel_socket=directory / "run" / f"{name}-chan",
    )  # fmt: skip


def test_the_image_of_a_busy_machine_is_its_memory_at_one_instant(spec: MachineSpec) -> None:  # noqa: F811
    """FRZ-6: also of one that went on from an image itself; QEMU's record of written pages cannot be relied on under
    TCG when it is looked at while the processors run (decision 0008)."""
    asyncio.run(_busy(replace(spec, network=None)))


async def _busy(first: MachineSpec) -> None:
    directory = first.root_disk.parent
    async with running(first) as (machine, agent):
        await agent.run(["sh", "-c", "python3 -c 1; sync"])
        await agent.channel.close()
        await machine.qmp("stop")
        image = MemoryImage(directory / "still")
        image.directory.mkdir()
        await capture.capture(machine, image, {}, timeout=60)
        assert await machine.run_state() != "running", "one that stood still goes on standing still"
    async with running(await from_image(first, image, "busy")) as (machine, agent):
        await agent.exec_detached(["sh", "-c", _BUSY])
        for number in range(_LOOPS):
            await asyncio.sleep(0.3)
            taken_image, dump, found = await taken(machine, directory / f"loop{number}")
            assert differences(taken_image.ram, dump) == []
            assert await machine.run_state() == "running" and 0 < found.pause < 5
            dump.unlink()
        assert (await agent.run(["echo", "still here"])).stdout == b"still here\n"
