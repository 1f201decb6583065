"""A writer in a machine whose data disk is logged, and a look at the disks that a power loss would have left of it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from limpet import images, process
from limpet.errors import DeadlineExceeded
from limpet.guest.execs import Output
from limpet.images import initramfs, oneoff, pieces
from limpet.paths import Paths
from limpet.vmm import machine
from limpet.vmm.command import MachineSpec
from tests.crash.blocklog import logged
from tests.crash.counting import COUNT, Loss
from tests.vm.test_memory import running

_WRITE_S = 90
_BOOTS = (30, 60)  # seconds; an emulated boot can stall
_MODULES = ("virtio_mmio", "virtio_blk", *initramfs.BTRFS_MODULES)

# Each phase is a directory. A file is written under another name, synced, renamed, and its directory synced; the same
# number is appended to `lines`, which is synced, too. Then the number is told. The others leave one thing out.
_WRITER = """
import os, sys
def put(path, text, flags, sync):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    os.write(file, text.encode())
    if sync:
        os.fsync(file)
    os.close(file)
for phase, count in (word.split(":") for word in sys.argv[1:]):
    top = "/workspace/" + phase
    os.mkdir(top)
    parent, directory = os.open("/workspace", os.O_RDONLY), os.open(top, os.O_RDONLY)
    put(top + "/lines", "", 0, True)
    os.fsync(directory), os.fsync(parent)
    for n in range(1, int(count) + 1):
        put(f"{top}/t.{n}", f"payload {n}\\n", 0, phase != "unsynced")
        os.rename(f"{top}/t.{n}", f"{top}/f.{n}")
        if phase not in ("unsynced", "unnamed"):
            os.fsync(directory)
        put(top + "/lines", f"{n}\\n", os.O_APPEND, phase not in ("unsynced", "unnamed"))
        print("ACK", phase, n, flush=True)
"""

_LOOK = """#!/bin/busybox sh
die() {
	echo "limpet-look: failed: $*"
	reboot -f
	exit 1
}
mount -a -T /boot/early || die "cannot mount proc, sys and dev"
modprobe -a @modules@ || die "cannot load the modules"
number=0
while [ $number -lt @count@ ]; do
	for disk in /sys/block/vd*; do
		read -r serial <$disk/serial
		[ "$serial" = "state-$number" ] && mount -t btrfs /dev/${disk##*/} /root || continue
		echo "STATE $number"
		for file in /root/@workspace/*/f.*; do
			line=
			[ -e $file ] && read -r line <$file
			echo "FILE ${file#/root/@workspace/} $line"
		done
		for file in /root/@workspace/*/lines; do
			[ -e $file ] && while read -r line; do echo "LINE ${file#/root/@workspace/} $line"; done <$file
		done
		umount /root || die "cannot unmount state $number"
	done
	number=$((number + 1))
done
echo "limpet-look: ok"
reboot -f
"""


@dataclass(frozen=True)
class Ack:
    """What the writer told, and how far the log was when that was read: it was true before."""

    phase: str
    number: int
    position: int


@dataclass
class Found:
    """What is on a disk: the numbers of the files that are whole, and of the lines, by phase."""

    files: dict[str, set[int]] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)

    def missing(self, acks: list[Ack], phase: str) -> list[int]:
        """The acknowledged numbers that are not there."""
        files, lines = self.files.get(phase, set()), self.lines.get(phase, [])
        return [ack.number for ack in acks if ack.phase == phase and not (ack.number in files and ack.number in lines)]


async def write(spec: MachineSpec, log: Path, phases: Mapping[str, int], *, flushes: bool = True) -> list[Ack]:
    """Boot with the data disk logged, let the writer go through the phases, and kill QEMU within the last one."""
    acks: list[Ack] = []
    last = [*phases.items()][-1]
    words = [f"{phase}:{count if (phase, count) != last else 1 << 30}" for phase, count in phases.items()]
    with mock.patch.object(machine, "command_line", logged(log, flushes=flushes)):
        async with asyncio.timeout(_WRITE_S), running(spec) as (written, agent):
            command = await agent.exec(["python3", "-c", _WRITER, *words])
            rest = b""
            async for event in command.events():
                assert isinstance(event, Output) and event.lane == 1, event
                *lines, rest = (rest + event.data).split(b"\n")
                for line in lines:
                    _, phase, number = line.decode().split()
                    acks.append(Ack(phase, int(number), log.stat().st_size))
                if acks and (acks[-1].phase, acks[-1].number) >= last and acks[-1].phase == last[0]:
                    break
            written.terminate(signal.SIGKILL)
    COUNT.faults += 1
    return acks


async def look(home: Path, disks: list[Path], work: Path) -> list[Found]:
    """What a kernel finds on these disks when it mounts them after the power loss."""
    parts, tools = images.artifacts(Paths(home / "data", home / "cache", work)), _pieces(home)
    archive = initramfs._archive(tools, _MODULES)
    text = _LOOK.replace("@modules@", " ".join(_MODULES)).replace("@count@", str(len(disks)))
    archive.file("init", text.encode(), 0o755)
    (work / "look.cpio").write_bytes(archive.to_bytes())
    attached = {f"state-{number}": disk for number, disk in enumerate(disks)}
    command = oneoff._command(parts.kernel, work / "look.cpio", attached)
    for patience in _BOOTS:
        with contextlib.suppress(DeadlineExceeded):
            console = (await process.run(command, timeout=patience, check=False)).stdout.decode(errors="replace")
            if "limpet-look: ok" not in console:
                raise Loss(f"a disk cannot be mounted after a power loss: {console[-600:]}")
            return _found(console, len(disks))
    raise AssertionError("the machine that looks at the disks does not boot")


def _found(console: str, count: int) -> list[Found]:
    states: dict[int, Found] = {}
    for line in console.splitlines():
        match line.split():
            case ["STATE", number]:
                current = states[int(number)] = Found()
            case ["FILE", name, "payload", number] if name.endswith(f"/f.{number}"):
                current.files.setdefault(name.split("/")[0], set()).add(int(number))
            case ["LINE", name, number]:
                current.lines.setdefault(name.split("/")[0], []).append(int(number))
    return [states[number] for number in range(count)]


def inspect(disk: Path) -> None:
    """Raise Loss unless the qcow2 file and the Btrfs in it are whole. Leaked clusters are no damage."""
    checked = subprocess.run(["qemu-img", "check", "-q", str(disk)], capture_output=True, text=True, timeout=60)
    if checked.returncode not in (0, 3):
        raise Loss(f"{disk.name}: qemu-img check: {checked.stdout}{checked.stderr}")
    raw = disk.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(disk), str(raw)], check=True, timeout=60)
    checked = subprocess.run(["btrfs", "check", "--readonly", str(raw)], capture_output=True, text=True, timeout=60)
    raw.unlink()
    if checked.returncode != 0:
        raise Loss(f"{disk.name}: btrfs check: {checked.stdout}{checked.stderr}")


def _pieces(home: Path) -> pieces.Pieces:
    (directory,) = (home / "cache" / "pieces").glob("[!.]*")
    return pieces.load(directory)
