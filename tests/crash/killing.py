"""Work that is killed in the middle, in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from limpet import crashpoint

_PATIENCE_S = 30


def killed(work: Callable[[], object], orders: Path) -> None:
    """Do it in a child, which must be killed at the point that is armed."""
    child = os.fork()
    if child == 0:
        crashpoint._orders = str(orders)
        try:
            work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + _PATIENCE_S
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    assert os.WIFSIGNALED(ended[1]), f"{orders.read_text()} was not reached"


def left_by(setup: Callable[[Path], object], run: Callable[[Path], object], point: str) -> Callable[[Path], None]:
    """A setup: what a process leaves that was killed at this point."""

    def left(directory: Path) -> None:
        setup(directory)
        (orders := directory.with_name("earlier-orders")).write_text(f"{point}=kill")
        killed(lambda: run(directory), orders)

    return left
