"""Timing: medians of repeated runs, and what a process costs the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median(work: Callable[[], object], runs: int) -> float:
    """The median time of `runs` calls, in seconds."""
    return statistics.median(seconds(work) for _ in range(runs))


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    return _kib(Path(f"/proc/{pid}/status"), "VmRSS:")


def pss(pid: int) -> int:
    """Proportional bytes of a process: shared pages count in parts."""
    return _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")


def cpu_seconds(pid: int) -> float:
    """Processor time used so far, at 100 ticks a second (proc(5), USER_HZ)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _kib(path: Path, key: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10
