"""The command line of one virtual machine, as data: what goes in is a MachineSpec, what comes out is an argv.

The machine is QEMU's microvm board with virtio-mmio devices only. Where several spellings exist, the JSON one is used
(`-blockdev`, `-device`, `-object`), because paths with commas or spaces need no quoting there.

    disk      vda agent   squashfs, read-only, shared by all machines
              vdb root    qcow2 overlay over an image
              vdc data    qcow2 with the Btrfs data disk
              vdd intake  raw scratch for bulk data from the host
    serial    ttyS0 → console log;   virtio-serial port `limpet.agent` → channel socket
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limpet.vmm.memory import RAM_BLOCK, MemoryImage
from limpet.vmm.network import GuestNetwork

Accel = Literal["kvm", "tcg"]
Arguments = list[str]

QEMU = "qemu-system-x86_64"
AGENT_PORT = "limpet.agent"

# Guest CPU under TCG. ERMS makes the kernel copy with `rep movsb`, which TCG interprets byte by byte.
_TCG_CPU = "max,-erms"

_SECCOMP = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class MachineSpec:
    """Everything QEMU needs to run one machine. Paths are absolute; `uuid` is what `adopt` recognises it by.

    `tsc_khz` is the frequency of the guest's time-stamp counter; without it a boot under TCG may stall in calibration.
    `tb_mib` bounds TCG's cache of translated code, None: in proportion to the memory. `network` None: the guest has
    no network device. `append` goes to the kernel's command line as it is. `memory`: start from this memory image
    instead of booting the kernel; the machine then stands still until it is told to continue."""

    name: str
    uuid: str
    vcpus: int
    memory_mib: int
    kernel: Path
    initramfs: Path
    agent_disk: Path
    root_disk: Path
    data_disk: Path
    intake: Path
    qmp_socket: Path
    channel_socket: Path
    console_log: Path
    qemu_log: Path
    lock: Path
    accel: Accel = "tcg"
    tsc_khz: int | None = None
    tb_mib: int | None = None
    network: GuestNetwork | None = None
    append: tuple[str, ...] = ()
    memory: MemoryImage | None = None


@dataclass(frozen=True)
class Descriptors:
    """Open files that QEMU inherits by number: the kernel, or the state of a memory image in its place; two listening
    sockets; its end of the network."""

    kernel: int
    qmp: int
    channel: int
    network: int | None = None


def command_line(spec: MachineSpec, inherited: Descriptors) -> Arguments:
    """The whole argv. Pure: nothing is looked up, opened or created."""
    return [
        QEMU,
        *_identity(spec),
        *board(spec.accel),
        *accelerator(spec.accel, spec.tb_mib or translation_cache(spec.memory_mib)),
        *_size(spec),
        *_start(spec, inherited.kernel),
        *_disks(spec),
        *_console(spec.console_log),
        *_control(inherited.qmp),
        *_channel(inherited.channel),
        *_json("-object", {"qom-type": "rng-builtin", "id": "entropy"}),
        *_json("-device", {"driver": "virtio-rng-device", "rng": "entropy"}),
        *_network(spec, inherited.network),
        "-sandbox", _SECCOMP,
    ]  # fmt: skip


def board(accel: Accel) -> Arguments:
    """The microvm board. Without KVM the guest needs PIT and PIC: a boot under TCG hangs when they are off."""
    timers = "pit=off,pic=off" if accel == "kvm" else "pit=on,pic=on"
    return [
        "-M", f"microvm,x-option-roms=off,rtc=on,isa-serial=on,{timers}",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-global", "virtio-mmio.force-legacy=false",
    ]  # fmt: skip


def translation_cache(memory_mib: int) -> int:
    """How large TCG's cache of translated code should be, in MiB. It fills up and stays: at 32 a 512 MiB guest costs
    what it may, at 16 git and Python get three times slower, because the cache is emptied when it is full."""
    return max(32, min(memory_mib // 16, 256))


def accelerator(accel: Accel, tb_mib: int = 32) -> Arguments:
    """Accelerator and CPU model; `tb_mib` bounds TCG's translation cache."""
    if accel == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", f"tcg,thread=multi,tb-size={tb_mib}", "-cpu", _TCG_CPU]


def kernel_parameters(accel: Accel, tsc_khz: int | None) -> tuple[str, ...]:
    """Parameters that every boot of this accelerator gets."""
    common = ("console=ttyS0", "quiet", "panic=-1", "reboot=t", "cryptomgr.notests", "8250.nr_uarts=1",
              "random.trust_cpu=on")  # fmt: skip
    if accel == "kvm":
        return common
    # TCG is no security boundary, so mitigations only cost time there. TCG finds translated code by virtual address:
    # with address randomisation every exec would translate its program anew (22 ms instead of 3 for /bin/true).
    emulated = ("mitigations=off", "nokaslr", "norandmaps", "no_timer_check", "tsc=reliable")
    return (*common, *emulated, *([f"tsc_early_khz={tsc_khz}"] if tsc_khz else []))


def mac_address(uuid: str) -> str:
    """A locally administered address that stays the same for one machine."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in zlib.crc32(uuid.encode()).to_bytes(4, "big")[1:])


def _identity(spec: MachineSpec) -> Arguments:
    # The kernel shows 15 characters of a process name (prctl(2), PR_SET_NAME).
    return ["-name", f"guest={_plain(spec.name)},process={_plain(('limpet-' + spec.name)[:15])}", "-uuid", spec.uuid]


def _size(spec: MachineSpec) -> Arguments:
    size = {"id": RAM_BLOCK, "size": spec.memory_mib << 20}
    backend: dict[str, object] = {"qom-type": "memory-backend-ram", **size}
    if spec.memory:  # private: what the guest writes stays in this process, the file is never written
        backend = {"qom-type": "memory-backend-file", "mem-path": str(spec.memory.ram), "share": False, **size}
    return ["-smp", str(spec.vcpus), "-m", f"{spec.memory_mib}M", *_json("-object", backend),
            "-machine", f"memory-backend={RAM_BLOCK}"]  # fmt: skip


def _start(spec: MachineSpec, fd: int) -> Arguments:
    if spec.memory:
        return ["-incoming", f"fd:{fd}", "-S"]
    parameters = [*kernel_parameters(spec.accel, spec.tsc_khz), *spec.append]
    if spec.network:
        parameters.append(spec.network.kernel_parameter())
    return ["-kernel", f"/proc/self/fd/{fd}", "-initrd", str(spec.initramfs), "-append", " ".join(parameters)]


def _disks(spec: MachineSpec) -> Arguments:
    durable = {"werror": "stop", "rerror": "report"}  # a full host disk pauses the guest instead of corrupting it
    return [
        *_disk("agent", {"driver": "raw", "read-only": True}, _file(spec.agent_disk, {"read-only": True})),
        *_disk("root", {"driver": "qcow2", "discard": "unmap"}, _file(spec.root_disk), durable, node(spec.root_disk)),
        *_disk("data", {"driver": "qcow2", "discard": "unmap"}, _file(spec.data_disk), durable, node(spec.data_disk)),
        # limpet writes to the intake disk while QEMU has it open.
        *_disk("intake", {"driver": "raw"}, _file(spec.intake, {"locking": "off"})),
    ]


def node(disk: Path) -> str:
    """The name of the block node that writes to a disk file: which layer that is can be asked of a running machine."""
    return disk.stem


def _disk(
    name: str,
    driver: Mapping[str, object],
    file: Mapping[str, object],
    device: Mapping[str, object] | None = None,
    node_name: str | None = None,
) -> Arguments:
    # Writes go through the host's page cache and the guest's flushes through fsync: cache=writeback, never unsafe.
    cache, node_name = {"direct": False, "no-flush": False}, node_name or name
    return [
        *_json("-blockdev", {"node-name": node_name, "cache": cache, **driver, "file": {"cache": cache, **file}}),
        *_json("-device", {"driver": "virtio-blk-device", "id": f"disk-{name}", "drive": node_name, "serial": name,
                           **(device or {})}),
    ]  # fmt: skip


def _file(path: Path, options: Mapping[str, object] | None = None) -> dict[str, object]:
    return {"driver": "file", "filename": str(path), "discard": "unmap", **(options or {})}


def _console(path: Path) -> Arguments:
    # append=on: the log can be shortened while QEMU writes, it goes on at the new end.
    return ["-chardev", f"file,id=console,path={_plain(str(path))},append=on", "-serial", "chardev:console"]


def _control(fd: int) -> Arguments:
    return ["-chardev", f"socket,id=control,fd={fd},server=on,wait=off", "-mon", "chardev=control,mode=control"]


def _channel(fd: int) -> Arguments:
    return [
        "-chardev", f"socket,id=channel,fd={fd},server=on,wait=off",
        *_json("-device", {"driver": "virtio-serial-device"}),
        *_json("-device", {"driver": "virtserialport", "chardev": "channel", "name": AGENT_PORT}),
    ]  # fmt: skip


def _network(spec: MachineSpec, fd: int | None) -> Arguments:
    if spec.network is None or fd is None:
        return []
    mac, mtu = mac_address(spec.uuid), spec.network.mtu
    return [
        "-netdev", f"stream,id=net,server=off,addr.type=fd,addr.str={fd}",
        *_json("-device", {"driver": "virtio-net-device", "netdev": "net", "mac": mac, "host_mtu": mtu}),
    ]  # fmt: skip


def _json(option: str, value: Mapping[str, object] | Sequence[object]) -> Arguments:
    return [option, json.dumps(value, separators=(",", ":"))]


def _plain(value: str) -> str:
    """A value inside a comma-separated option: QEMU reads `,,` as one comma."""
    return value.replace(",", ",,")
