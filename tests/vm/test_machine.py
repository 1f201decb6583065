"""One real machine: launched, adopted, measured, killed. Below the services: no daemon, no agent calls."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from limpet import images
from limpet.errors import Busy, FailedPrecondition, LimpetError, Unavailable
from limpet.paths import Paths
from limpet.vmm import accel, disks, lock, network
from limpet.vmm.command import MachineSpec
from limpet.vmm.death import console_tail, explain_death
from limpet.vmm.handles import rediscover
from limpet.vmm.layers import Layers
from limpet.vmm.machine import Machine
from limpet.vmm.network import GuestNetwork

pytestmark = pytest.mark.vm

BOOT_S = 60.0
PSS_LIMIT = 260 * 10**6  # of a 512 MiB sandbox, issue 2


def prepare(pieces: Path, directory: Path) -> MachineSpec:
    """Fresh disks and the spec of a machine on them."""
    paths = Paths(pieces / "data", pieces / "cache", directory)
    parts = images.artifacts(paths)
    layers, intake = Layers(directory), directory / "intake.raw"
    root = layers.path(asyncio.run(layers.overlay(images.find_image(paths, "base").root, "raw")))
    data = layers.path(asyncio.run(layers.copy(parts.blank_data)))
    disks.create_intake(intake)
    return MachineSpec(
        name="machine-test", uuid=str(uuid.uuid4()), vcpus=2, memory_mib=512,
        kernel=parts.kernel, initramfs=parts.initramfs, agent_disk=parts.agent_disk,
        root_disk=root, data_disk=data, intake=intake,
        qmp_socket=directory / "run" / "qmp", channel_socket=directory / "run" / "chan",
        console_log=directory / "console.log", qemu_log=directory / "qemu.log", lock=directory / "vm.lock",
        tsc_khz=asyncio.run(accel.tsc_khz(directory / "probe.json", kernel=parts.kernel)),
        network=None if network.available() else GuestNetwork(),
    )  # fmt: skip


@pytest.fixture
def spec(pieces: Path) -> Iterator[MachineSpec]:
    """A machine of its own; whatever still runs at the end of the test is killed."""
    directory = Path(tempfile.mkdtemp(prefix="limpet, vm-"))
    try:
        spec = prepare(pieces, directory)
        yield spec
        if ref := lock.holder(spec.lock):
            ref.send(signal.SIGKILL)
            asyncio.run(lock.gone(ref, 10))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def console_says(spec: MachineSpec, machine: Machine, text: str) -> None:
    async with asyncio.timeout(BOOT_S):
        while text not in "\n".join(console_tail(spec.console_log, 500)):
            assert machine.alive(), console_tail(spec.console_log, 20)
            await asyncio.sleep(0.05)


async def boots(spec: MachineSpec, machine: Machine) -> None:
    """Wait until the guest has read its disks: the kernel runs, and the initramfs has found the root disk."""
    async with asyncio.timeout(BOOT_S):
        while (await machine.stats()).disk_read < 1 << 20:
            assert machine.alive(), console_tail(spec.console_log, 20)
            await asyncio.sleep(0.05)


def test_a_machine_boots_confined_outlives_its_launcher_and_frees_its_lock_when_killed(spec: MachineSpec) -> None:
    """VM-8, VM-9, VM-21: same process after adoption, seccomp on, locked while it runs, free after kill -9."""

    async def launch() -> dict[str, object]:
        machine = await Machine.launch(spec)
        await boots(spec, machine)
        confined = Path(f"/proc/{machine.pid}/status").read_text()
        assert "Seccomp:\t2" in confined and "NoNewPrivs:\t1" in confined
        assert {path.stat().st_mode & 0o777 for path in (spec.qmp_socket, spec.channel_socket)} == {0o600}
        assert spec.qmp_socket.parent.stat().st_mode & 0o777 == 0o700
        with pytest.raises(Busy):
            await Machine.launch(spec)
        record = machine.handles()
        await machine.close()
        return record

    async def adopt(record: dict[str, object]) -> None:
        machine = await Machine.adopt(record)
        assert machine is not None and machine.handles() == record and machine.accel == "tcg"
        assert (await machine.qmp("query-status"))["running"]
        stats = await machine.stats()
        print(f"PSS of a 512 MiB machine: {stats.memory_pss / 1e6:.0f} MB, with network: {spec.network is not None}")
        assert 0 < stats.memory_pss < PSS_LIMIT and stats.cpu_seconds > 0
        assert machine.terminate(signal.SIGKILL)
        await machine.wait(10)
        assert not machine.alive() and not lock.held(spec.lock)
        assert await Machine.adopt(record) is None
        await machine.close()

    asyncio.run(adopt(asyncio.run(launch())))


def test_a_machine_is_found_again_when_its_record_is_lost(spec: MachineSpec) -> None:
    """VM-10: by its lock; and one with another uuid is refused."""

    async def scenario() -> None:
        first = await Machine.launch(spec)
        await first.close()
        found = rediscover(spec.name, spec.uuid, spec.lock, spec.qmp_socket, spec.channel_socket)
        assert found is not None
        with pytest.raises(Unavailable, match="not"):
            await Machine.adopt(replace(found, uuid=str(uuid.uuid4())).to_dict())
        machine = await Machine.adopt(found.to_dict())
        assert machine is not None and machine.pid == first.pid
        assert await machine.end() == "quit"
        await machine.close()

    asyncio.run(scenario())


def test_the_end_of_a_machine_is_reported_and_explained(spec: MachineSpec) -> None:
    """VM-1, VM-21: events until the end, the exit status, and a reason."""

    async def scenario() -> None:
        machine = await Machine.launch(spec)
        seen: list[str] = []

        async def watch() -> None:
            async for event in machine.events():
                seen.append(event.kind)

        watching = asyncio.create_task(watch())
        await machine.qmp("stop")
        await machine.qmp("cont")
        machine.terminate(signal.SIGTERM)
        status = await machine.wait(10)
        await asyncio.wait_for(watching, 5)
        assert [kind for kind in seen if not kind.startswith("NETDEV")] == ["STOP", "RESUME", "SHUTDOWN"]
        death = explain_death(console_log=spec.console_log, qemu_log=spec.qemu_log, pid=machine.pid, status=status)
        assert death.cause == "killed" and "signal 15" in death.message
        with pytest.raises(Unavailable):
            await machine.stats()
        await machine.close()

    asyncio.run(scenario())


def test_a_stopped_processor_does_not_stop_the_ladder(spec: MachineSpec) -> None:
    """VM-1: a QEMU that answers nothing is killed in the end."""

    async def scenario() -> None:
        machine = await Machine.launch(spec)
        machine.terminate(signal.SIGSTOP)
        assert await machine.end(patience=0.3) == "sigkill"
        assert not machine.alive()
        await machine.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("broken", ["root_disk", "kernel", "initramfs"])
def test_a_failed_launch_is_one_clear_error_and_leaves_nothing(spec: MachineSpec, broken: str) -> None:
    """VM-6: a missing file, named; no process, no lock."""
    bad = replace(spec, **{broken: spec.lock.parent / "missing"})  # type: ignore[arg-type]
    with pytest.raises(LimpetError) as caught:
        asyncio.run(Machine.launch(bad))
    assert type(caught.value) in (FailedPrecondition, Unavailable) and caught.value.hint != ""
    assert "missing" in caught.value.message
    assert not lock.held(spec.lock) and lock.holder(spec.lock) is None


def test_a_disk_that_another_machine_uses_is_refused(spec: MachineSpec) -> None:
    """VM-8: QEMU's own image locks are on."""

    async def scenario() -> None:
        machine = await Machine.launch(spec)
        other = replace(
            spec, uuid=str(uuid.uuid4()), lock=spec.lock.with_name("other.lock"),
            qmp_socket=spec.qmp_socket.with_name("q2"), channel_socket=spec.channel_socket.with_name("c2"),
        )  # fmt: skip
        with pytest.raises(Busy, match="in use"):
            await Machine.launch(other)
        await machine.end()
        await machine.close()

    asyncio.run(scenario())


def test_the_accelerator_verdict_is_tried_and_kept(pieces: Path, tmp_path: Path) -> None:
    """VM-20: a kernel was really booted (or /dev/kvm does not open); the second answer comes from the cache."""
    parts = images.artifacts(Paths(pieces / "data", pieces / "cache", tmp_path))
    cache = tmp_path / "probe.json"

    async def ask() -> accel.Verdict:
        return await accel.probe(cache, kernel=parts.kernel, initramfs=parts.initramfs, key=parts.key)

    verdict = asyncio.run(ask())
    assert verdict.isolation == ("hardware" if verdict.accel == "kvm" else "emulated") and verdict.reason
    assert asyncio.run(ask()) == verdict
    assert cache.exists() == verdict.kvm_opens


def test_a_guest_measures_the_counter_that_it_will_be_told(pieces: Path, tmp_path: Path) -> None:
    """DESIGN §2: the measured frequency agrees with the one that the hypervisor tells, where it does."""
    kernel = images.artifacts(Paths(pieces / "data", pieces / "cache", tmp_path)).kernel
    measured = asyncio.run(accel.measured_tsc_khz(kernel))
    assert measured is not None
    if trusted := accel.trusted_tsc_khz(Path("/proc/cpuinfo").read_text()):
        assert abs(measured - trusted) < trusted / 1000
