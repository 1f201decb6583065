"""Keeping disks shallow: layers under a sandbox's active one that nobody else needs are folded into it (FRZ-6).

    active ──► b ──► c ──► d (of a checkpoint) ──► image        fold: active takes over b and c, and lies on d

QEMU does it while the VM runs (block-stream): what the upper layer lacks is copied, then one header write puts it onto
the lower one, so a crash at any time leaves a chain that reads the same. A disk that does not run is folded by
qemu-img in the same way. Layers of checkpoints never change: a chain that they make too deep is copied over them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from limpet import log, process
from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition, LimpetError
from limpet.services import garbage
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.vmm import layers
from limpet.vmm.command import node
from limpet.vmm.machine import Machine

DEEPEST = 8  # layers of one disk, the image not counted
_SHALLOW = 4  # what a chain that grew too deep is folded to at least
_WORTH_BYTES = 1 << 30  # layers that are only in the way are folded up to this size
_POLL = 0.05
_LIMIT_S = 600.0
_log = log.get("chains")


class Folding:
    """Folds whatever is worth it, in the background, whenever what is needed has changed."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._seen: frozenset[str] = frozenset()  # the roots when everything was last found well
        self._task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Begin, unless it is under way, or nothing has changed and no collection is owed."""
        roots = frozenset(garbage.roots(self._host))
        owed = self._host.layers.owed and not self._host.layers.in_flux
        if (owed or roots != self._seen) and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._fold_all(roots), name="folding")

    async def _fold_all(self, roots: frozenset[str]) -> None:
        needed = await asyncio.to_thread(_needed, self._host, roots)
        done = True
        for record in self._host.records.everything():
            for disk in record.disks or {}:
                try:
                    done &= await _fold(self._host, record.id, disk, needed)
                except (LimpetError, OSError, TimeoutError) as error:
                    done = False
                    _log.warning("fold.failed", sandbox=record.name, disk=disk, reason=str(error))
        await garbage.collect(self._host)
        if done:
            self._seen = roots


def _needed(host: Host, tops: Iterable[str]) -> set[Path]:
    """The layers that somebody begins with, or on which more than one other lies: not one sandbox's own to fold."""
    begun: set[Path] = set()
    above: dict[Path, set[Path]] = {}
    for top in tops:
        with contextlib.suppress(LimpetError):  # a chain that is not whole is nobody's to fold
            chain = host.layers.chain(top)
            begun.add(chain[0])
            for upper, lower in itertools.pairwise(chain):
                above.setdefault(lower, set()).add(upper)
    return begun | {path for path, uppers in above.items() if len(uppers) > 1}


async def _fold(host: Host, sandbox_id: str, disk: str, needed: set[Path]) -> bool:
    """Fold one disk if it is worth it; False when it has to be tried again. What is on top is looked up under the lock
    under which it is changed: a layer that was frozen meanwhile must not be written to. A running machine goes on
    folding without the lock; whoever wants to put a layer on top ends it first (`leave_alone`)."""
    if host.locks.holder("lifecycle", sandbox_id) is not None:
        return False
    async with host.locks.lifecycle(sandbox_id, "folding of its disks"):
        record = host.records.by_id(sandbox_id)
        chain = host.layers.chain(record.disks[disk]) if record.disks else []
        base = lowest(chain, needed) if chain else None
        if base is None:
            return True
        crashpoint("fold.before")
        vm = host.live.get(sandbox_id)
        if vm is None:
            await _offline(chain[0], base)
        else:
            await _begin(vm.machine, chain[0], base)
    if vm is not None:
        await _end(vm.machine, chain[0], base)
    crashpoint("fold.after")
    _log.info("folded", sandbox=record.name, layer=chain[0].stem, layers=len(chain))
    return True


def lowest(chain: Sequence[Path], needed: set[Path]) -> Path | None:
    """What the top of a chain should lie on, None when it is well as it is: layers right below it that nobody else
    needs are taken over if they are not large; a chain that is too deep is cut to half, whoever needs its layers."""
    own = [path for path in chain if path.suffix != ".raw"]
    run = 1
    while run < len(own) and own[run] not in needed:
        run += 1
    deep = len(own) > DEEPEST
    if deep:
        run = max(run, len(own) - _SHALLOW + 1)
    run = min(run, len(chain) - 1)  # a disk that lies on no image keeps its lowest layer
    size = sum(layers.occupied(path) for path in own[1:run])
    return chain[run] if run > 1 and (deep or size <= _WORTH_BYTES) else None


async def _begin(machine: Machine, top: Path, base: Path) -> None:
    arguments: dict[str, Any] = {
        "device": node(top), "job-id": _job(top), "base-node": await _name(machine, base),
        "backing-file": os.path.relpath(base, top.parent),
    }  # fmt: skip
    await machine.qmp("block-stream", **arguments)


async def _end(machine: Machine, top: Path, base: Path) -> None:
    async with asyncio.timeout(_LIMIT_S):
        while any(found["id"] == _job(top) for found in await machine.qmp("query-jobs")):
            await asyncio.sleep(_POLL)
    if layers.backing_file(top) != base:  # called off, or failed: QEMU forgets a job with its end
        raise FailedPrecondition(f"{top.name} was not folded")


def _job(top: Path) -> str:
    return f"fold-{top.stem}"


async def _name(machine: Machine, path: Path) -> str:
    """The block node of a disk file that a machine has open: named by us, or by QEMU when it opened what lies below.
    Only of the latter `file` is the path; for ours, whose backing was given, QEMU writes it as JSON."""
    known = await machine.qmp("query-named-block-nodes", flat=True)
    ours = [found["node-name"] for found in known if found["node-name"] == node(path)]
    real = os.path.realpath(path)
    below = [found["node-name"] for found in known
             if found["drv"] in ("qcow2", "raw") and os.path.realpath(found["file"]) == real]  # fmt: skip
    if not (names := ours or below):
        raise FailedPrecondition(f"the machine does not have {path} open")
    return str(names[0])


async def _offline(top: Path, base: Path) -> None:
    kind = "raw" if base.suffix == ".raw" else "qcow2"
    relative = os.path.relpath(base, top.parent)
    await process.run(["qemu-img", "rebase", "-q", "-f", "qcow2", "-F", kind, "-b", relative, str(top)],
                      timeout=_LIMIT_S)  # fmt: skip


async def leave_alone(vm: LiveVM) -> None:
    """End the folding that may be under way, so that layers can be put on top; it begins anew some other time."""
    for job in await vm.machine.qmp("query-jobs"):
        if job["id"].startswith("fold-"):
            with contextlib.suppress(LimpetError):
                await vm.machine.qmp("job-cancel", id=job["id"])
    async with asyncio.timeout(10):
        while any(job["id"].startswith("fold-") for job in await vm.machine.qmp("query-jobs")):
            await asyncio.sleep(0.005)
