"""One instant of a running machine: its memory into an image, its disks onto new overlays, in the same pause.

    pause ─ begin ─ go on ──► all memory, once, while it runs ──► pause ─ what changed, overlays, devices ─ go on
    └── some milliseconds                                         └── some ten milliseconds

Who gave the overlays has already made it durable that they are the disks: an empty overlay reads as what it lies on,
so a crash at any point here finds the disks as they were. The machine goes on afterwards, also when this fails.

Why not more rounds, as a migration usually has: QEMU's record of written pages is only reliable under TCG between two
looks at it that are taken while the processors stand still. A processor keeps the right to write to a page unnoticed
that it once got; a look at the bitmap revokes these rights only when it finds a page newly dirty (in 7.2,
cpu_physical_memory_sync_dirty_bitmap()). Images taken with more looks lacked some pages' last changes: a guest's kernel
that went on from them found its slabs damaged. So the first look is taken in the first pause, the second in the last.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limpet import process
from limpet.crashpoint import crashpoint
from limpet.errors import DeadlineExceeded, FailedPrecondition, LimpetError
from limpet.vmm import memory
from limpet.vmm.command import node
from limpet.vmm.machine import Machine
from limpet.vmm.memory import RAM_BLOCK, MemoryImage

_POLL = 0.002  # seconds
_PIPE_BYTES = 1 << 20
_UNBOUNDED = 1 << 40  # bytes/s
_NEVER_MS = 1  # QEMU looks at the bitmap again when what is left takes no longer than this: practically at the end
_LAST_BYTES = 24 << 20  # what is left of the first round when the machine is stopped for the last part
_ATTEMPTS = 3
_STUCK = {"paused", "postmigrate", "finish-migrate", "prelaunch"}


@dataclass(frozen=True)
class Captured:
    """What a capture took. `pause` is how long the machine stood still in all, in seconds."""

    pause: float


async def switch(machine: Machine, overlays: Mapping[str, Path]) -> Captured:
    """Put the disks (`root`, `data`) onto overlays at one instant; memory is left alone. Raises FailedPrecondition
    when QEMU refuses, with the disks as they were."""
    async with _added(machine, overlays) as actions:
        crashpoint("switch.disks.before")
        began = time.perf_counter()
        await machine.qmp("transaction", timeout=30, actions=actions)
        crashpoint("switch.disks.after")
        return Captured(time.perf_counter() - began)


async def capture(machine: Machine, image: MemoryImage, overlays: Mapping[str, Path], *, timeout: float) -> Captured:
    """Write the machine's memory to `image` and put its disks onto overlays, at one instant; a machine that ran goes
    on, one that stood still stays so. Raises DeadlineExceeded after `timeout` seconds, FailedPrecondition when QEMU
    refuses; the disks are then as they were, unless all is done but the last part of the memory."""
    running = await machine.run_state() == "running"
    try:
        async with asyncio.timeout(timeout), _added(machine, overlays) as actions:
            for attempt in range(1, _ATTEMPTS + 1):
                live = running and attempt < _ATTEMPTS  # the last one does not race with anything
                try:
                    return await _once(machine, image, actions, running=running, live=live)
                except _LookedTooEarly:
                    await go_on(machine, running)
            raise AssertionError("a machine that stands still cannot be looked at too early")
    except BaseException as error:
        await asyncio.shield(go_on(machine, running))
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(f"the memory could not be written within {timeout:g} s") from None
        raise


class _LookedTooEarly(Exception):
    """QEMU looked at the bitmap while the processors ran: this image cannot be trusted."""


async def _once(
    machine: Machine, image: MemoryImage, actions: list[dict[str, object]], *, running: bool, live: bool
) -> Captured:
    """One attempt. `live`: the machine runs while its memory is copied."""
    async with _splitting(image) as (sink, splitting):
        crashpoint("capture.begin.before")
        first = await _begin(machine, sink, running, live)
        crashpoint("capture.begin.after")
        if live:
            await _almost_done(machine, splitting)
        began = time.perf_counter()
        if live:
            await machine.qmp("stop")
            if await _looks(machine) > 1:
                raise _LookedTooEarly
        await _until(machine, {"pre-switchover"}, splitting)
        crashpoint("capture.disks.before")
        if actions:
            await machine.qmp("transaction", timeout=30, actions=actions)
        crashpoint("capture.disks.after")
        await machine.qmp("migrate-continue", state="pre-switchover")
        await _until(machine, {"completed"}, splitting)
        crashpoint("capture.memory.after")
        if running:
            await machine.qmp("cont", timeout=30)
        pause = time.perf_counter() - began
        done = await splitting
        if done.returncode:
            raise FailedPrecondition(f"the memory could not be written: {done.stderr.decode(errors='replace')}")
        return Captured(first + pause)


async def go_on(machine: Machine, running: bool = True) -> None:
    """Leave no migration behind, whoever began it; a machine that is to run runs. Raises nothing: one that cannot be
    helped shows by its silence."""
    with contextlib.suppress(LimpetError):
        if (await machine.qmp("query-migrate")).get("status") in ("active", "setup", "pre-switchover", "device"):
            await machine.qmp("migrate_cancel")
            with contextlib.suppress(DeadlineExceeded):
                await _ended(machine)
        if running and await machine.run_state() in _STUCK:
            await machine.qmp("cont", timeout=30)


async def _ended(machine: Machine) -> None:
    for _ in range(1000):
        if (await machine.qmp("query-migrate")).get("status") in ("cancelled", "completed", "failed"):
            return
        await asyncio.sleep(_POLL)


async def _begin(machine: Machine, sink: int, running: bool, live: bool) -> float:
    """Start the migration into the pipe; how long a running machine stood still for it (seconds)."""
    wanted = {"pause-before-switchover": True, "x-ignore-shared": False}
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    await machine.qmp("migrate-set-capabilities", capabilities=capabilities)
    await machine.qmp("migrate-set-parameters", **{"downtime-limit": _NEVER_MS, "max-bandwidth": _UNBOUNDED})
    try:
        await machine.give("memory", sink)
    finally:
        os.close(sink)  # QEMU has its own: the stream ends when it is done
    began = time.perf_counter()
    if running:
        await machine.qmp("stop")
    await machine.qmp("migrate", uri="fd:memory")
    if live:
        while not await _looks(machine):
            await asyncio.sleep(_POLL / 2)
        await machine.qmp("cont")
    return time.perf_counter() - began


async def _looks(machine: Machine) -> int:
    """How often QEMU has looked at the bitmap of written pages."""
    return int((await machine.qmp("query-migrate")).get("ram", {}).get("dirty-sync-count", 0))


async def _almost_done(machine: Machine, splitting: asyncio.Task[process.Completed]) -> None:
    """Wait until little is left of the first round."""
    while True:
        found = await machine.qmp("query-migrate")
        _require_going(found, splitting)
        if found["status"] != "active" or found["ram"]["remaining"] <= _LAST_BYTES:
            return
        await asyncio.sleep(_POLL)


async def _until(machine: Machine, wanted: set[str], splitting: asyncio.Task[process.Completed]) -> None:
    """Wait for a state of the migration. Raises FailedPrecondition when it fails or nobody takes its bytes."""
    while (found := await machine.qmp("query-migrate"))["status"] not in wanted:
        _require_going(found, splitting)
        await asyncio.sleep(_POLL)


def _require_going(found: dict[str, Any], splitting: asyncio.Task[process.Completed]) -> None:
    if found["status"] in ("failed", "cancelled", "cancelling") or (splitting.done() and _failed(splitting)):
        said = splitting.result().stderr.decode(errors="replace").strip() if splitting.done() else ""
        why = said or found.get("error-desc") or found["status"]
        raise FailedPrecondition(f"the memory could not be written: {why}")


def _failed(splitting: asyncio.Task[process.Completed]) -> bool:
    return splitting.result().returncode != 0


@contextlib.asynccontextmanager
async def _splitting(image: MemoryImage) -> AsyncIterator[tuple[int, asyncio.Task[process.Completed]]]:
    """The process that takes the stream apart: the pipe to it, and its end."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        stream, sink = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, stream)
        fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        fds = [stream]
        for path in (image.ram, image.state):
            fds.append(os.open(path, flags, 0o600))
            stack.callback(os.close, fds[-1])
        argv = [sys.executable, "-ISE", memory.__file__, *map(str, fds), RAM_BLOCK]
        splitting = asyncio.create_task(process.run(argv, check=False, pass_fds=fds))
        try:
            yield sink, splitting
        finally:
            splitting.cancel()
            await asyncio.gather(splitting, return_exceptions=True)


@contextlib.asynccontextmanager
async def _added(machine: Machine, overlays: Mapping[str, Path]) -> AsyncIterator[list[dict[str, object]]]:
    """Open the overlays in QEMU; the actions that put the disks onto them. When the block fails and they are not in
    use, they are closed again."""
    current = await nodes(machine)
    added: list[str] = []
    try:
        actions: list[dict[str, object]] = []
        for disk, path in overlays.items():
            name = node(path)
            await machine.qmp("blockdev-add", timeout=30, **_overlay(name, path))
            added.append(name)
            actions.append({"type": "blockdev-snapshot", "data": {"node": current[disk], "overlay": name}})
        yield actions
    except BaseException:
        for name in added:
            with contextlib.suppress(LimpetError):  # in use: the switch was made
                await machine.qmp("blockdev-del", timeout=30, **{"node-name": name})
        raise


def _overlay(name: str, path: Path) -> dict[str, Any]:
    cache = {"direct": False, "no-flush": False}
    file = {"driver": "file", "filename": str(path), "discard": "unmap", "cache": cache}
    return {"driver": "qcow2", "node-name": name, "discard": "unmap", "cache": cache, "file": file, "backing": None}


async def close_unused(machine: Machine) -> None:
    """Close the layers that an earlier daemon opened in QEMU and did not come to use."""
    for found in await machine.qmp("query-named-block-nodes", flat=True):
        if found["drv"] == "qcow2":
            with contextlib.suppress(LimpetError):  # in use
                await machine.qmp("blockdev-del", **{"node-name": found["node-name"]})


async def nodes(machine: Machine) -> dict[str, str]:
    """Which block node each disk (by its serial: root, data …) writes to now."""
    found: dict[str, str] = {}
    for block in await machine.qmp("query-block"):
        disk = str(block.get("qdev", "")).partition("disk-")[2].partition("/")[0]
        if disk and block.get("inserted"):
            found[disk] = str(block["inserted"]["node-name"])
    return found
