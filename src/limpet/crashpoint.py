"""Crash points: places where tests end the daemon, or make it fail, to prove that nothing is lost there.

    crashpoint("checkpoint.publish.before")

does nothing unless LIMPET_CRASHPOINTS names a file. While that file says `checkpoint.publish.before=ACTION`, the next
to come by takes the file away and

    kill    ends the process with SIGKILL
    stop    stops it with SIGSTOP: whoever watches can do harm elsewhere, then let it go on
    raise   raises Internal

Every effect on the world outside the daemon has a point on each side, named `<operation>.<effect>.before` and `.after`.
The names are literals: a test collects them from the sources and fails for one that no test reaches.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from limpet.errors import Internal

_orders = os.environ.get("LIMPET_CRASHPOINTS")


def crashpoint(name: str) -> None:
    """Crash here when this point is armed."""
    if _orders is not None:
        _obey(Path(_orders), name)


def _obey(orders: Path, name: str) -> None:
    try:
        armed, _, action = orders.read_text().strip().partition("=")
        if armed != name:
            return
        orders.unlink()
    except FileNotFoundError:
        return
    if action == "raise":
        raise Internal(f"crash point {name}", hint="unset LIMPET_CRASHPOINTS")
    os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)
