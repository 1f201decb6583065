"""What happens by the clock: time-outs of sandboxes (VM-16), the bounds of console logs, the database's copy.

A time-out belongs to one incarnation: it is looked up in the live VM, so it can never fire at a later one of the same
name. It stops safely, as `limpet stop` does, and never deletes.
"""

from __future__ import annotations

import asyncio
import math
import time

from limpet import log
from limpet.errors import LimpetError
from limpet.models import StopRequest
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.sandboxes import Sandboxes
from limpet.store import back_up
from limpet.vmm.logs import trim_log

_PERIOD = 5.0  # seconds
_CONSOLE_BYTES = 1 << 20
_DAY = 86_400.0

_log = log.get("timers")


async def run(host: Host, sandboxes: Sandboxes) -> None:
    """Look around every few seconds, for ever; copy the database once a day."""
    copied = -math.inf
    while True:
        if time.monotonic() - copied > _DAY:
            copied = time.monotonic()
            await asyncio.to_thread(back_up, host.paths)
        await asyncio.sleep(_PERIOD)
        for vm in host.live:
            for path in (vm.files.console_log, vm.files.qemu_log):
                trim_log(path, _CONSOLE_BYTES)
            try:
                await _expire(host, sandboxes, vm)
            except LimpetError as error:
                _log.warning("expire.failed", sandbox=vm.sandbox_id, reason=error.message)


def due(vm: LiveVM, ttl: float | None, idle_timeout: float | None, now: float) -> str | None:
    """Which time-out of this incarnation has run out at `now` (monotonic seconds), or None."""
    if ttl is not None and now - vm.started >= ttl:
        return "ttl"
    if idle_timeout is not None and vm.idle_seconds >= idle_timeout:
        return "idle"
    return None


async def _expire(host: Host, sandboxes: Sandboxes, vm: LiveVM) -> None:
    record = host.records.find(vm.sandbox_id)
    if record is None or (why := due(vm, record.spec.ttl, record.spec.idle_timeout, time.monotonic())) is None:
        return
    with log.operation():
        async with host.locks.lifecycle(record.id, f"{why} time-out"):
            if host.live.get(record.id) is vm:  # still the same incarnation
                host.events.emit("sandbox.expired", sandbox=record, why=why)
                await sandboxes.stop_now(record, StopRequest())
