"""What a machine costs the host: processor time, memory and disk traffic of its QEMU and helpers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from limpet.errors import Unavailable
from limpet.process import ProcessRef
from limpet.vmm.qmp import Control

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class MachineStats:
    """`cpu_percent` of one processor since the measurement before (0.0 in the first), `cpu_seconds` since the start;
    memory in bytes (PSS counts a shared page in parts; the peak is QEMU's alone); bytes that the guest read, wrote,
    received and sent since the start. The network's are None: neither QEMU nor passt counts them."""

    cpu_percent: float
    cpu_seconds: float
    memory_pss: int
    memory_peak: int
    disk_read: int
    disk_written: int
    net_received: int | None = None
    net_sent: int | None = None


class Meter:
    """Measures one machine again and again."""

    def __init__(self, qemu: ProcessRef, helpers: Iterable[ProcessRef], clock: Callable[[], float] = time.monotonic):
        self._qemu, self._helpers, self._clock = qemu, tuple(helpers), clock
        self._last: tuple[float, float] | None = None  # when, and the processor seconds until then

    async def measure(self, control: Control) -> MachineStats:
        """Measure now. Raises Unavailable when the machine has ended."""
        devices = await control.execute("query-blockstats")
        traffic = [device["stats"] for device in devices]
        pids = [self._qemu.pid, *(helper.pid for helper in self._helpers if helper.alive())]
        try:
            seconds = sum(_cpu_seconds(pid) for pid in pids)
            return MachineStats(
                cpu_percent=self._percent(seconds),
                cpu_seconds=seconds,
                memory_pss=sum(_pss(pid) for pid in pids),
                memory_peak=_kib(self._qemu.pid, "status", "VmHWM"),
                disk_read=sum(stats["rd_bytes"] for stats in traffic),
                disk_written=sum(stats["wr_bytes"] for stats in traffic),
            )
        except (OSError, KeyError):
            raise Unavailable(f"process {self._qemu.pid} has ended") from None

    def _percent(self, seconds: float) -> float:
        now, last = self._clock(), self._last
        self._last = (now, seconds)
        if last is None or now <= last[0]:
            return 0.0
        return max(0.0, 100.0 * (seconds - last[1]) / (now - last[0]))


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND  # utime, stime: fields 14 and 15 of proc(5)


def _pss(pid: int) -> int:
    try:
        return _kib(pid, "smaps_rollup", "Pss")
    except PermissionError:  # started by root, passt belongs to nobody and hides its maps
        return _kib(pid, "status", "VmRSS")


def _kib(pid: int, file: str, key: str) -> int:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values[key].split()[0]) << 10
