"""The command line of a machine, as data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from limpet.names import new_id
from limpet.vmm.command import Descriptors, MachineSpec, command_line, mac_address, node, translation_cache
from limpet.vmm.memory import RAM_BLOCK, MemoryImage
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


def test_a_machine_that_starts_from_memory_maps_it_privately_and_waits() -> None:
    """FRZ-6, FRZ-7: the image is never written; the guest stands still until it is renewed."""
    image = MemoryImage(Path("/v/a, b/ck_1"))
    argv = command_line(replace(make_spec(Path("/v")), memory=image), FDS)
    [backend] = [found for found in parsed(argv, "-object") if str(found["qom-type"]).startswith("memory-backend")]
    assert backend == {
        "qom-type": "memory-backend-file", "mem-path": "/v/a, b/ck_1/ram", "share": False, "id": RAM_BLOCK,
        "size": 512 << 20,
    }  # fmt: skip
    assert values(argv, "-incoming") == ["fd:10"] and argv.count("-S") == 1
    assert not {"-kernel", "-initrd", "-append"} & set(argv)


def test_a_machine_that_boots_has_memory_of_its_own_and_goes_at_once() -> None:
    """The kernel comes through the descriptor that a memory image's state would."""
    argv = command_line(make_spec(Path("/v")), FDS)
    [backend] = [found for found in parsed(argv, "-object") if str(found["qom-type"]).startswith("memory-backend")]
    assert backend == {"qom-type": "memory-backend-ram", "id": RAM_BLOCK, "size": 512 << 20}
    assert values(argv, "-kernel") == ["/proc/self/fd/10"] and values(argv, "-initrd") == ["/v/initramfs"]
    assert not {"-incoming", "-S"} & set(argv)


def test_devices_are_the_same_whether_a_machine_boots_or_starts_from_memory() -> None:
    """A state can only be loaded by a machine of the same shape, in the same order."""
    spec = replace(make_spec(Path("/v")), network=GuestNetwork())
    booted, restored = command_line(spec, FDS), command_line(replace(spec, memory=MemoryImage(Path("/m"))), FDS)
    for option in ("-device", "-M", "-cpu", "-smp", "-m", "-accel", "-global", "-machine"):
        assert values(booted, option) == values(restored, option)
    assert f"memory-backend={RAM_BLOCK}" in values(booted, "-machine")


def test_a_disk_is_written_through_a_node_that_is_named_after_its_layer() -> None:
    """FRZ-6: a daemon that was killed amid a switch can ask a machine which layer it writes to."""
    layer = "ly_01m7z62se684n1r5xee1nbhfxh"
    argv = command_line(replace(make_spec(Path("/v")), root_disk=Path(f"/v/layers/{layer}.qcow2")), FDS)
    nodes = [found["node-name"] for found in parsed(argv, "-blockdev")]
    assert nodes == ["agent", layer, "data", "intake"]
    [root] = [device for device in parsed(argv, "-device") if device.get("serial") == "root"]
    assert (root["id"], root["drive"]) == ("disk-root", layer)
    assert len(node(Path(f"{new_id('ly')}.qcow2"))) <= 31  # QEMU's limit (BlockDriverState.node_name)


def test_writes_that_free_space_reach_the_layers_as_holes() -> None:
    """FRZ-6: what the guest deletes and trims is given back."""
    layers = parsed(command_line(make_spec(Path("/v")), FDS), "-blockdev")
    assert all(found["discard"] == "unmap" for found in layers if found["driver"] == "qcow2")
