"""Why a machine did not start, or is no more: one sentence out of what it left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limpet import durable
from limpet.errors import Busy, FailedPrecondition, InsufficientSpace, LimpetError, Unavailable

Cause = Literal["oom", "disk_full", "killed", "panic", "power_off", "qemu_error", "unknown"]

_START = "--- limpet: machine started"  # a line in both logs, so that an old boot explains no new death
_TAIL_BYTES = 16 << 10
_FULL_BELOW = 16 << 20  # bytes free where a write of QEMU's may just have failed
_KERNEL_LOG = Path("/dev/kmsg")  # printk records, one per read (Documentation/ABI/testing/dev-kmsg)
_IN_VAULT = "what was written in it is in its vault: limpet restore NAME --to DIR"

# What QEMU says on stderr when it gives up → what that means. The first match counts.
_REFUSALS: tuple[tuple[str, type[LimpetError], str, str | None], ...] = (
    (r'Failed to get "?(?:write|shared "write"|consistent read)"? lock', Busy,
     "a disk of this sandbox is in use by another process", "stop what uses it, then start again"),
    (r"Could not access KVM|failed to initialize kvm", FailedPrecondition,
     "KVM cannot be used", "see limpet doctor; limpet can emulate instead"),
    (r"[Cc]annot set up guest memory|[Cc]annot allocate memory", FailedPrecondition,
     "the host has not enough memory for this sandbox", "give it less: limpet set NAME --memory SIZE"),
    (r"No space left on device", InsufficientSpace, "the host's disk is full", "free some space"),
    (r"Could not open '?(?P<path>[^':]+)'?: No such file", FailedPrecondition,
     "a disk of this sandbox is missing: {path}", _IN_VAULT),
    (r"could not load kernel|could not open kernel file|could not load initrd", FailedPrecondition,
     "the guest kernel is missing or damaged", "limpet setup --force"),
    (r"Image is not in qcow2 format|is corrupt", FailedPrecondition, "a disk of this sandbox is damaged", _IN_VAULT),
    (r"failed to create seccomp|seccomp", FailedPrecondition, "QEMU could not enter its seccomp sandbox", None),
)  # fmt: skip


@dataclass(frozen=True)
class Death:
    """Why a machine ended: the kind of cause, and a sentence for the user, without a full stop."""

    cause: Cause
    message: str

    @property
    def clean(self) -> bool:
        """Whether the guest ended by itself, in order."""
        return self.cause == "power_off"


def console_tail(path: Path, lines: int) -> list[str]:
    """The last `lines` lines of a log (at most 16 KiB), without control characters; empty when there is none."""
    text = _tail(path).decode(errors="replace")
    clean = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]", "", line) for line in text.split("\n")]
    return [line for line in clean if line.strip()][-lines:]


def explain_death(
    *, console_log: Path, qemu_log: Path, pid: int | None = None, status: int | None = None, peak: int | None = None
) -> Death:
    """Explain the end of a machine from its logs, its exit status (None: not our child) and the kernel's log.

    `peak` is the most memory it was seen to use, in bytes, told when memory was the reason."""
    console, own = _this_boot(console_tail(console_log, 500)), _this_boot(console_tail(qemu_log, 100))
    if pid is not None and (victim := _oom_record(pid)):
        return Death("oom", f"the host ran out of memory and its kernel killed QEMU ({victim}{_peak(peak)})")
    if panic := next((line for line in reversed(console) if "Kernel panic" in line), None):
        return Death("panic", f"the guest's kernel panicked: {_after(panic, 'Kernel panic - ')}")
    if any("No space left on device" in line for line in own) or _disk_full(qemu_log.parent):
        return Death("disk_full", f"the host's disk is full ({qemu_log.parent})")
    if status is not None and status < 0:
        return Death("killed", _by_signal(-status, peak, readable=_kernel_log_readable()))
    if by := next((line for line in reversed(own) if "terminating on signal" in line), None):
        return Death("killed", f"QEMU was told to end: {_after(by, 'qemu-system-x86_64: ')}")
    if status == 0 or any("Power down" in line for line in console[-5:]):
        return Death("power_off", "the guest powered itself off")
    if status:
        return Death("qemu_error", f"QEMU failed with status {status}: {own[-1] if own else 'it said nothing'}")
    return Death("unknown", "QEMU is gone, and nothing that it left behind says why")


def launch_error(error: LimpetError, status: int, qemu_log: Path, start: int) -> LimpetError:
    """The error to raise when a launch failed with `error`: what QEMU wrote since `start` usually says more.
    `status` is QEMU's; -SIGKILL means that it had to be killed, so it was silent rather than wrong."""
    said = _tail(qemu_log, start).decode(errors="replace").strip()
    for pattern, kind, message, hint in _REFUSALS:
        if match := re.search(pattern, said):
            return kind(message.format(**match.groupdict()), hint=hint)
    last = said.splitlines()[-1].removeprefix("qemu-system-x86_64: ") if said else "it said nothing"
    if status == -signal.SIGKILL:
        return type(error)(f"{error.message} ({last})", hint=error.hint)
    return Unavailable(f"QEMU ended with status {status}: {last}", hint=f"its log: {qemu_log}")


def mark_start(path: Path) -> int:
    """Begin a new boot in an append-only log (made 0600 when there is none); returns where the new part begins."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as file:
        file.write(b"\n" * bool(file.tell()) + _START.encode() + time.strftime(" %FT%TZ ---\n", time.gmtime()).encode())
        return file.tell()


def _this_boot(lines: list[str]) -> list[str]:
    starts = [number for number, line in enumerate(lines) if line.startswith(_START)]
    return lines[starts[-1] + 1 :] if starts else lines


def _disk_full(directory: Path) -> bool:
    try:
        return durable.free_bytes(directory) < _FULL_BELOW
    except OSError:
        return False


def _tail(path: Path, start: int = 0) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _TAIL_BYTES))
            return file.read(_TAIL_BYTES)
    except OSError:
        return b""


def _oom_record(pid: int) -> str | None:
    """What the kernel logged when it killed this pid for memory, for example `anon-rss:512000kB`."""
    pattern = re.compile(rf"Killed process {pid} \([^)]*\).*?(anon-rss:\d+kB)")
    found = [match.group(1) for record in _kernel_log() if (match := pattern.search(record))]
    return found[-1] if found else None


def _kernel_log() -> list[str]:
    records: list[str] = []
    with contextlib.suppress(OSError):
        fd = os.open(_KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while True:
                with contextlib.suppress(BrokenPipeError):  # EPIPE: records were overwritten while we read
                    records.append(os.read(fd, 8192).decode(errors="replace"))
        finally:
            os.close(fd)
    return records


def _kernel_log_readable() -> bool:
    try:
        os.close(os.open(_KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _by_signal(signum: int, peak: int | None, *, readable: bool) -> str:
    sentence = f"QEMU was killed by {signal.Signals(signum).name}"
    if signum == signal.SIGKILL and not readable:
        sentence += ", by somebody or by the kernel for lack of memory (its log cannot be read by this user)"
        sentence += _peak(peak)
    return sentence


def _peak(peak: int | None) -> str:
    return f", peak {peak >> 20} MiB" if peak else ""


def _after(line: str, marker: str) -> str:
    return line.partition(marker)[2].strip() or line.strip()
