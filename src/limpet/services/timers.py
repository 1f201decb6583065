"""What happens by the clock: time-outs of sandboxes (VM-16), the bounds of console logs, the database's copy, guests'
clocks, chains of layers, vaults, the trash.

A time-out belongs to one incarnation: it is looked up in the live VM, so it can never fire at a later one of the same
name. It stops safely, as `limpet stop` does, or suspends, and never deletes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time

from limpet import log
from limpet.errors import LimpetError
from limpet.models import SandboxSpec, State, StopRequest
from limpet.services import chains
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.records import hidden
from limpet.services.sandboxes import Sandboxes
from limpet.services.standing import Standing
from limpet.services.syncing import Syncing
from limpet.services.trash import Trash
from limpet.services.vaults import Vaults
from limpet.store import back_up
from limpet.vmm.logs import trim_log

_PERIOD = 5.0  # seconds
_CONSOLE_BYTES = 1 << 20
_DAY = 86_400.0
_CLOCK_PERIOD = 60.0  # seconds between two looks at a guest's clock
_JUMP = 0.05  # seconds by which the host's clocks may part without being looked at
_TOLD_OFFSET = 0.1
_AGENT_S = 2.0

_log = log.get("timers")


async def run(host: Host, sandboxes: Sandboxes, standing: Standing, syncing: Syncing, vaults: Vaults) -> None:
    """Look around every few seconds, for ever; copy the database once a day."""
    copied = -math.inf
    clocks, folding, trash = Clocks(), chains.Folding(host), Trash(host)
    await asyncio.gather(*(_go_on(host, vm) for vm in host.live))
    while True:
        if time.monotonic() - copied > _DAY:
            copied = time.monotonic()
            await asyncio.to_thread(back_up, host.paths)
        await asyncio.sleep(_PERIOD)
        for vm in host.live:
            for path in (vm.files.console_log, vm.files.qemu_log):
                trim_log(path, _CONSOLE_BYTES)
            try:
                await _expire(host, sandboxes, standing, vm)
            except LimpetError as error:
                _log.warning("expire.failed", sandbox=vm.sandbox_id, reason=error.message)
        if clocks.due():
            await asyncio.gather(*(_set_clock(host, vm) for vm in host.live))
        folding.look()
        syncing.look()
        vaults.look()
        await trash.look()


class Clocks:
    """When guests' clocks have to be looked at: once in a while, and at once when the host slept or its clock was set.
    A guest's own clock stands still while its host sleeps."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._offsets = self._now()

    def due(self) -> bool:
        """Whether it is time."""
        jumped = any(abs(a - b) > _JUMP for a, b in zip(self._now(), self._offsets, strict=True))
        if not jumped and time.monotonic() - self._looked < _CLOCK_PERIOD:
            return False
        self._looked, self._offsets = time.monotonic(), self._now()
        return True

    def _now(self) -> tuple[float, float]:
        """How far the calendar's and the boot clock are ahead of the monotonic one, which stops in sleep."""
        monotonic = time.clock_gettime(time.CLOCK_MONOTONIC)
        return time.time() - monotonic, time.clock_gettime(time.CLOCK_BOOTTIME) - monotonic


async def _go_on(host: Host, vm: LiveVM) -> None:
    """An earlier daemon may have ended while a guest stood still, or while its file systems were frozen."""
    with contextlib.suppress(LimpetError):
        await (await vm.agent(_AGENT_S)).thaw()
    await _set_clock(host, vm)


async def _set_clock(host: Host, vm: LiveVM) -> None:
    record = host.records.find(vm.sandbox_id)
    if record is None or record.state is not State.RUNNING:
        return
    with contextlib.suppress(LimpetError):
        offset = await (await vm.agent(_AGENT_S)).check_clock()
        if abs(offset) > _TOLD_OFFSET:
            host.events.emit("clock.corrected", sandbox=record, seconds=round(offset, 3))


def due(vm: LiveVM, spec: SandboxSpec, now: float) -> str | None:
    """Which time-out of this incarnation has run out at `now` (monotonic seconds), or None."""
    if spec.ttl is not None and now - vm.started >= spec.ttl:
        return "ttl"
    if spec.idle_timeout is not None and vm.idle_seconds >= spec.idle_timeout:
        return "idle"
    if spec.idle_suspend is not None and vm.idle_seconds >= spec.idle_suspend:
        return "idle suspend"
    return None


async def _expire(host: Host, sandboxes: Sandboxes, standing: Standing, vm: LiveVM) -> None:
    record = host.records.find(vm.sandbox_id)
    if record is None or hidden(record) or (why := due(vm, record.spec, time.monotonic())) is None:
        return
    if vm.stall is not None:  # it could not bring its data to the disk
        return
    with log.operation():
        async with host.locks.lifecycle(record.id, f"{why} time-out"):
            if host.live.get(record.id) is not vm:
                return  # it belonged to another incarnation
            record = host.records.by_id(record.id)
            if due(vm, record.spec, time.monotonic()) == why:  # still not used, nor given more time
                host.events.emit("sandbox.expired", sandbox=record, why=why)
                if why == "idle suspend":
                    await standing.suspend_now(record, Stages.unseen())
                else:
                    await sandboxes.stop_now(record, StopRequest())
