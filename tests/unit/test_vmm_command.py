"""The command line of a machine, as data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from limpet.vmm.command import Descriptors, MachineSpec, command_line, mac_address, translation_cache
from limpet.vmm.network import GuestNetwork

FDS = Descriptors(kernel=10, qmp=11, channel=12, network=13)


def make_spec(root: Path) -> MachineSpec:
    return MachineSpec(
        name="web", uuid="4f5c6c5e-4a7e-4be0-8f6d-3a1f0f0b7f11", vcpus=2, memory_mib=512,
        kernel=root / "vmlinux", initramfs=root / "initramfs", agent_disk=root / "agent",
        root_disk=root / "root.qcow2", data_disk=root / "data.qcow2", intake=root / "intake.raw",
        qmp_socket=root / "qmp", channel_socket=root / "chan", console_log=root / "console.log",
        qemu_log=root / "qemu.log", lock=root / "vm.lock", accel="tcg", tsc_khz=2596128,
    )  # fmt: skip


def values(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


def parsed(argv: list[str], option: str) -> list[dict[str, object]]:
    return [json.loads(value) for value in values(argv, option) if value.startswith("{")]


def test_disks_come_in_their_order_with_serial_numbers_that_tell_them_apart() -> None:
    """VM-6: agent, root, data, intake; the guest finds them by serial."""
    argv = command_line(make_spec(Path("/v")), FDS)
    disks = [device for device in parsed(argv, "-device") if device["driver"] == "virtio-blk-device"]
    assert [disk["serial"] for disk in disks] == ["agent", "root", "data", "intake"]


def test_a_full_host_disk_pauses_the_guest_instead_of_corrupting_it() -> None:
    """VM-19: write errors stop root and data."""
    argv = command_line(make_spec(Path("/v")), FDS)
    policy = {str(device["serial"]): device.get("werror") for device in parsed(argv, "-device") if "serial" in device}
    assert policy == {"agent": None, "root": "stop", "data": "stop", "intake": None}


def test_flushes_of_the_guest_reach_the_host_disk() -> None:
    """Writeback, never unsafe: no node may ignore a flush."""
    nodes = parsed(command_line(make_spec(Path("/v")), FDS), "-blockdev")
    layers = [*nodes, *(node["file"] for node in nodes)]
    assert all(isinstance(layer, dict) and layer["cache"] == {"direct": False, "no-flush": False} for layer in layers)


@pytest.mark.parametrize("odd", ["a,b", "with space", "quo'te", 'quo"te', "ünï", "back\\slash", "per%cent", "-dash"])
def test_odd_paths_stay_one_argument_and_one_value(odd: str) -> None:
    """VM-6: a comma in a path must not become an option of QEMU's."""
    root = Path("/v") / odd
    argv = command_line(make_spec(root), FDS)
    files = [node["file"] for node in parsed(argv, "-blockdev")]
    assert [isinstance(file, dict) and file["filename"] for file in files] == [
        str(root / name) for name in ("agent", "root.qcow2", "data.qcow2", "intake.raw")
    ]
    console = next(value for value in values(argv, "-chardev") if value.startswith("file,"))
    assert f"path={str(root).replace(',', ',,')}/console.log,append=on" in console
    assert values(argv, "-initrd") == [str(root / "initramfs")]


def test_the_seccomp_sandbox_denies_spawning_and_privileges() -> None:
    """VM-6: QEMU runs confined."""
    (sandbox,) = values(command_line(make_spec(Path("/v")), FDS), "-sandbox")
    assert sandbox == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def test_emulation_keeps_the_timers_and_tells_the_guest_its_clock() -> None:
    """Boots under TCG hang without PIT and PIC and may stall without the frequency."""
    argv = command_line(make_spec(Path("/v")), FDS)
    parameters = values(argv, "-append")[0].split()
    assert "pit=on,pic=on" in values(argv, "-M")[0]
    assert {"tsc_early_khz=2596128", "norandmaps"} <= set(parameters)
    assert values(argv, "-cpu") == ["max,-erms"]


def test_kvm_gets_the_host_processor_and_full_hardening() -> None:
    """What only emulation needs must not weaken a guest under KVM."""
    argv = command_line(replace(make_spec(Path("/v")), accel="kvm"), FDS)
    parameters = values(argv, "-append")[0].split()
    assert values(argv, "-accel") == ["kvm"] and values(argv, "-cpu") == ["host"]
    assert "pit=off,pic=off" in values(argv, "-M")[0]
    assert not {"mitigations=off", "nokaslr", "norandmaps"} & set(parameters)
    assert not [word for word in parameters if word.startswith("tsc")]


def test_no_network_means_no_device_and_no_parameter() -> None:
    """GST-10: without a network there is nothing to reach."""
    argv = command_line(make_spec(Path("/v")), FDS)
    assert not values(argv, "-netdev") and "limpet.net" not in values(argv, "-append")[0]


def test_a_network_uses_the_inherited_wire_and_tells_the_guest_its_address() -> None:
    """Issue 2, item 8."""
    argv = command_line(replace(make_spec(Path("/v")), network=GuestNetwork()), FDS)
    assert values(argv, "-netdev") == ["stream,id=net,server=off,addr.type=fd,addr.str=13"]
    assert "limpet.net=10.0.2.15/24,10.0.2.2,10.0.2.3" in values(argv, "-append")[0].split()


def test_a_machine_keeps_its_hardware_address() -> None:
    """A stable, locally administered unicast address."""
    first, second = mac_address("a"), mac_address("b")
    assert first == mac_address("a") != second
    assert first.startswith("52:54:00:") and len(first) == 17


@pytest.mark.parametrize(("memory", "cache"), [(192, 32), (512, 32), (1024, 64), (4096, 256), (65536, 256)])
def test_the_translation_cache_grows_with_the_memory(memory: int, cache: int) -> None:
    """A small sandbox must stay small."""
    assert translation_cache(memory) == cache
