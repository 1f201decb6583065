"""One-off virtual machines: a script of ours works on disks that only a kernel can mount, says on the console how it
went (`limpet-NAME: ok`, or `limpet-NAME: failed: …`), and ends. An ordinary user cannot mount a file system on the
host, and nobody should mount a guest's there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from limpet import process
from limpet.errors import DeadlineExceeded, Unavailable

Disks = Mapping[str, Path]  # serial number in the guest → qcow2 file

_ATTEMPTS = (30.0, 60.0, 120.0)  # seconds; an emulated boot can stall in timer calibration, a slow host needs long
_CMDLINE = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off nokaslr norandmaps cryptomgr.notests"
_TAIL = 8  # lines of the console in an error message


async def run(name: str, what: str, *, kernel: Path, initramfs: Path, disks: Callable[[], Awaitable[Disks]]) -> None:
    """Boot `kernel` with `initramfs`, whose script calls itself `name`, and wait for its success. `disks` makes the
    disks anew for each attempt. Raises Unavailable with the console's last lines: "`what` did not finish"."""
    console = b""
    for timeout in _ATTEMPTS:
        command = _command(kernel, initramfs, await disks())
        try:
            console = (await process.run(command, timeout=timeout, check=False)).stdout
        except DeadlineExceeded:
            continue
        if f"limpet-{name}: ok".encode() in console:
            return
        if f"limpet-{name}: failed".encode() in console:
            break  # what the script found wrong will not be right the next time
    tail = "\n  ".join(console.decode(errors="replace").splitlines()[-_TAIL:])
    raise Unavailable(f"{what} did not finish" + (f":\n  {tail}" if tail else ""), hint="run `limpet doctor`")


def _command(kernel: Path, initramfs: Path, disks: Disks) -> list[str]:
    frequency = _tsc_khz()
    cmdline = _CMDLINE + (f" tsc_early_khz={frequency}" if frequency else "")
    command = [
        "qemu-system-x86_64", "-M", "microvm,x-option-roms=off,rtc=on,isa-serial=on", "-accel", "tcg",
        "-cpu", "max,-erms", "-m", "512", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-serial", "stdio", "-global", "virtio-mmio.force-legacy=false",
        "-kernel", str(kernel), "-initrd", str(initramfs), "-append", cmdline,
    ]  # fmt: skip
    for serial, path in disks.items():
        # unsafe: a crash throws the whole file away; what is kept of it is synced before it is published
        options = f"if=none,id={serial},format=qcow2,cache=unsafe,discard=unmap,detect-zeroes=unmap"
        command += ["-drive", f"{options},file={str(path).replace(',', ',,')}"]
        command += ["-device", f"virtio-blk-device,drive={serial},serial={serial}"]
    return command


def _tsc_khz() -> int | None:
    """The host's clock rate where it tells: spares the guest the calibration that can stall under emulation."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return int(float(line.partition(":")[2]) * 1000)
    return None
