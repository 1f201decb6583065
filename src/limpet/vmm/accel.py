"""What this host can run machines with: a real probe of KVM, and the frequency of the time-stamp counter.

`/dev/kvm` that opens is not KVM that works: nested in some clouds it creates processors on which no kernel gets
anywhere. So the probe boots limpet's own kernel to user space, and the verdict is kept until host boot, QEMU, kernel
or the access to /dev/kvm change.

Under TCG the guest reads the host's own counter (QEMU's cpu_get_host_ticks), and must be told its frequency, because
calibrating it against emulated timers stalls now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from limpet import durable, log, process
from limpet.errors import DeadlineExceeded, LimpetError
from limpet.vmm.command import QEMU, Accel, accelerator, board
from limpet.vmm.lock import try_lock

PROBE_S = 5.0
_TSC_BOOT_S = 20.0
_LOCK_WAIT_S = 60.0
_KVM = Path("/dev/kvm")
_CPUINFO = Path("/proc/cpuinfo")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_USER_SPACE = b"Run /init as init process"  # kernel_init() in the kernel's init/main.c
_REFINED = re.compile(rb"tsc: Refined TSC clocksource calibration: (\d+\.\d+) MHz")

_log = log.get("vmm")
_versions: dict[tuple[int, int], str] = {}


@dataclass(frozen=True)
class Verdict:
    """What machines run with here, and why, as a sentence for the user. `kvm_opens`: this user may open /dev/kvm."""

    accel: Accel
    isolation: Literal["hardware", "emulated"]
    reason: str
    kvm_opens: bool = False


async def probe(cache: Path, *, kernel: Path, initramfs: Path, key: str) -> Verdict:
    """The accelerator for this kernel (`key` names it), from `cache` when nothing has changed since. A fresh probe
    takes up to 5 s. Raises Unavailable without QEMU."""
    process.require(QEMU)
    if obstacle := _closed():
        return Verdict("tcg", "emulated", obstacle)
    wanted = f"{_host_key()} {key}"
    async with _exclusive(cache):
        known = _load(cache).get("verdict")
        if isinstance(known, dict) and known.get("key") == wanted:
            return Verdict(**known["is"])
        verdict = _verdict(await kvm_boot(kernel, initramfs))
        _store(cache, "verdict", {"key": wanted, "is": asdict(verdict)})
    _log.info("accelerator probed", accel=verdict.accel, reason=verdict.reason)
    return verdict


async def kvm_boot(kernel: Path, initramfs: Path) -> str | None:
    """Boot the kernel under KVM to user space; None when it gets there within 5 s, else what happened instead."""
    argv = [*_bare([*board("kvm"), *accelerator("kvm")], kernel, "panic=-1 reboot=t"), "-initrd", str(initramfs)]
    said, errors = await _watch(argv, until=re.compile(re.escape(_USER_SPACE)), timeout=PROBE_S)
    if _USER_SPACE in said:
        return None
    if errors:
        return f"QEMU failed: {errors}"
    if not said.strip():
        return f"a kernel under it printed nothing within {PROBE_S:g} s"
    return f"a kernel under it did not reach user space within {PROBE_S:g} s"


async def qemu_version() -> str:
    """The version of this host's QEMU, such as `7.2.22`: what its machines' state can be loaded by. Asked once for
    each build of the program. Raises Unavailable."""
    status = Path(process.require(QEMU)).stat()
    key = (status.st_ino, status.st_mtime_ns)
    if key not in _versions:
        said = (await process.run([QEMU, "--version"], timeout=10)).stdout.decode(errors="replace")
        match = re.search(r"version (\S+)", said)
        _versions[key] = match.group(1) if match else said.strip()[:40]
    return _versions[key]


async def tsc_khz(cache: Path, *, kernel: Path) -> int | None:
    """The frequency of the counter that a guest under TCG reads, in kHz; None when it cannot be found out.
    From `cache` when it was measured since the host's boot, else from /proc/cpuinfo where that can be trusted, else
    measured by a guest of its own, which takes 2 to 4 s."""
    if known := trusted_tsc_khz(_CPUINFO.read_text()):
        return known
    wanted = _host_key()
    async with _exclusive(cache):
        stored = _load(cache).get("tsc")
        if isinstance(stored, dict) and stored.get("key") == wanted:
            return int(stored["khz"])
        khz = await measured_tsc_khz(kernel)
        if khz is not None:
            _store(cache, "tsc", {"key": wanted, "khz": khz})
    return khz


def trusted_tsc_khz(cpuinfo: str) -> int | None:
    """The counter's frequency from /proc/cpuinfo, or None. `cpu MHz` is the counter's only where the hypervisor told
    the kernel one frequency for both (tsc_known_freq) and the kernel measures no other (no aperfmperf)."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    speed = re.search(r"^cpu MHz\s*:\s*(\d+\.\d+)$", cpuinfo, re.MULTILINE)
    words = set(flags.group(1).split()) if flags else set()
    if speed is None or "aperfmperf" in words or not words >= {"hypervisor", "constant_tsc", "tsc_known_freq"}:
        return None
    return round(float(speed.group(1)) * 1000)


async def measured_tsc_khz(kernel: Path) -> int | None:
    """Let a guest measure its counter against an HPET: a board with one, no disk, a root device it waits for."""
    machine = ["-M", "q35", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", *accelerator("tcg")]
    argv = _bare(machine, kernel, "panic=-1 rootwait root=/dev/none")
    said, _ = await _watch(argv, until=_REFINED, timeout=_TSC_BOOT_S)
    found = _REFINED.search(said)
    return round(float(found.group(1)) * 1000) if found else None


def _verdict(failure: str | None) -> Verdict:
    if failure is None:
        return Verdict("kvm", "hardware", "a kernel boots under KVM", kvm_opens=True)
    return Verdict("tcg", "emulated", f"/dev/kvm opens, but {failure}", kvm_opens=True)


def _closed() -> str | None:
    """Why /dev/kvm cannot be opened by this user, or None."""
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return "there is no /dev/kvm: no hardware virtualisation, or its kernel module is not loaded"
    except PermissionError:
        return "/dev/kvm may not be opened by this user: add yourself to its group (sudo usermod -aG kvm $USER)"
    except OSError as error:
        return f"/dev/kvm does not open: {error.strerror}"
    return None


def _bare(machine: list[str], kernel: Path, parameters: str) -> list[str]:
    return [
        QEMU, *machine, "-m", "256M", "-kernel", str(kernel), "-append", f"console=ttyS0 {parameters}",
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
    ]  # fmt: skip


async def _watch(argv: list[str], *, until: re.Pattern[bytes], timeout: float) -> tuple[bytes, str]:
    """Run QEMU until its console matches, it ends, or `timeout` seconds are over; then it is killed.
    Returns the console, and the first line of QEMU's own complaints."""
    said, errors = b"", b""
    async with process.piped(argv) as qemu:
        assert qemu.stdout is not None and qemu.stderr is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not until.search(said) and (more := await qemu.stdout.read(65536)):
                    said += more
                if not until.search(said):
                    errors = await qemu.stderr.read(4096)
    first = errors.decode(errors="replace").strip().partition("\n")[0]
    return said, first.removeprefix(f"{QEMU}: ").removeprefix("error: ")


def _host_key() -> str:
    """Changes with the host's boot and with the QEMU binary."""
    binary = Path(process.require(QEMU)).stat()
    return f"{_BOOT_ID.read_text().strip()} {binary.st_ino}:{binary.st_size}:{binary.st_mtime_ns}"


@contextlib.asynccontextmanager
async def _exclusive(cache: Path) -> AsyncIterator[None]:
    """One prober at a time, among all processes: a flock on the directory of `cache`."""
    fd = os.open(cache.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while not try_lock(fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise DeadlineExceeded("another process has been probing the accelerator for a minute")
            await asyncio.sleep(0.05)
        yield
    finally:
        os.close(fd)


def _load(cache: Path) -> dict[str, Any]:
    try:
        found = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _store(cache: Path, name: str, value: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, LimpetError):  # a verdict that cannot be kept is still right
        durable.replace_file(cache, json.dumps({**_load(cache), name: value}, indent=1).encode())
