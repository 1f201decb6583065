"""The stop ladder: the guest's data is made durable before anything is done to its VM (VM-1, VM-2).

    flush ──► containers, engine ──► final sync ──► poweroff ──► wait ──► QMP quit ──► SIGTERM ──► SIGKILL
      │          │                      │              └ clean              └ synced when flushed, else killed …
      │          └──────────────────────┴ fails: told in the answer; everything is on the disks, which stay
      └ cannot be confirmed: the VM is left running, unless forced

Containers end before their engine does, so that those with a restart policy come back with the sandbox (RUN-4). Every
rung is bounded; together they take at most the time-out given plus a few seconds for the last rungs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from limpet import log
from limpet.errors import DeadlineExceeded, LimpetError, Unavailable, Unimplemented
from limpet.models import StopResult
from limpet.services import engines
from limpet.services.live import REACH_TIMEOUT, LiveVM

_RUNG_SECONDS = 3.0  # for QMP quit and SIGTERM each
_RESERVED = 6.0  # of the whole time-out is kept for the rungs after flush and final sync
_LEAST_FINAL = 1.0  # seconds for the final sync of a guest that was flushed
_FOR_FINAL = 6.0  # that containers leave to it, of a time-out that is long enough
_KILLING = 3.0  # seconds for the guest to kill what has not ended

Final = Callable[[LiveVM, float], Awaitable[tuple[int | None, str | None]]]

_log = log.get("stop")

AT_RISK = (
    "writes that programs had not fsynced in about the last 2 seconds",
    "state that programs held only in memory",
)


async def stop(vm: LiveVM, name: str, *, force: bool, timeout: float, final: Final) -> StopResult:
    """Bring a VM down, gently first. Raises Unavailable or DeadlineExceeded, with the VM still running, when the
    guest's data cannot be flushed and `force` is not set. `timeout` is in seconds and bounds the whole stop. `final`
    brings the flushed data to the vault within so many seconds: the newest generation, and what prevented it."""
    began = time.monotonic()
    deadline = began + timeout
    flushed = await _flush(vm, name, force, timeout)
    cut_off = await _stop_containers(vm, name, _left(deadline)) if flushed else []
    generation, problem = await final(vm, _left(deadline) if flushed else 0.0)
    vm.ended_by_us = True
    powered_off = flushed and await _power_off(vm, deadline)
    rung: Literal["poweroff", "quit", "sigterm", "sigkill"] = "poweroff" if powered_off else await force_down(vm)
    durability: Literal["clean", "synced", "killed"] = "clean" if powered_off else "synced" if flushed else "killed"
    at_risk = [] if powered_off else ["writes made after the flush by programs that went on"] if flushed else [*AT_RISK]
    return StopResult(
        name=name, rung=rung, durability=durability, at_risk=[*cut_off, *at_risk],
        seconds=round(time.monotonic() - began, 3), generation=generation, sync=problem,
    )  # fmt: skip


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic() - _RESERVED, _LEAST_FINAL)


async def _flush(vm: LiveVM, name: str, force: bool, timeout: float) -> bool:
    """Whether the guest confirmed that everything written so far is on its disks."""
    try:
        async with asyncio.timeout(max(timeout - _RESERVED, timeout / 2)):
            agent = await vm.agent(min(REACH_TIMEOUT, timeout / 2))
            await vm.unless_stalled(agent.sync())
            return True
    except (LimpetError, TimeoutError) as error:
        reason = error.message if isinstance(error, LimpetError) else "it did not finish writing in time"
        _log.warning("flush.failed", sandbox=name, reason=reason)
        if force:
            return False
        kind = DeadlineExceeded if isinstance(error, TimeoutError) else Unavailable
        first = "free some space, and it goes on by itself; " if vm.stall and vm.stall.full else ""
        raise kind(
            f"{name} was left running: its data could not be flushed ({reason})",
            hint=f"{first}`limpet stop --force {name}` goes on; at risk are " + " and ".join(AT_RISK),
        ) from None


async def _stop_containers(vm: LiveVM, name: str, left: float) -> list[str]:
    """Stop containers and their engine, if there are any, within most of what is left. What is at risk because that
    failed: it is no reason to refuse, as power loss is what they have to stand anyway."""
    seconds = max(left - _FOR_FINAL, left / 2)
    try:
        async with asyncio.timeout(seconds + _KILLING):
            ended = await engines.stop_now(vm, seconds, keep=True)
            if ended.stopped:  # what containers wrote at their end
                await vm.unless_stalled((await vm.agent()).sync())
        why = "they did not end in time" if ended.killed else None
    except Unimplemented:  # the agent of an older limpet: it has no engine
        return []
    except (LimpetError, TimeoutError) as error:
        why = error.message if isinstance(error, LimpetError) else "the engine did not stop in time"
    if why is None:
        return []
    _log.warning("containers.cut_off", sandbox=name, reason=why)
    return [f"what containers had only in memory ({why})"]


async def _power_off(vm: LiveVM, deadline: float) -> bool:
    """Ask the guest to power itself off, and wait for QEMU to end."""
    try:
        agent = await vm.agent(1.0)
        await agent.poweroff()
    except LimpetError as error:
        _log.warning("poweroff.refused", reason=error.message)
    return await vm.ended(max(deadline - time.monotonic() - _RUNG_SECONDS, 1.0))


async def force_down(vm: LiveVM) -> Literal["quit", "sigterm", "sigkill"]:
    """The rungs that do not need the guest. QEMU flushes its own caches on all but the last."""
    vm.ended_by_us = True
    return await vm.machine.end(patience=_RUNG_SECONDS)
