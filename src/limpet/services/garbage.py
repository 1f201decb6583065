"""What nothing needs any more: layers that no sandbox, checkpoint or template reaches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition
from limpet.services.host import Host
from limpet.services.records import known_as
from limpet.vmm.layers import occupied


def roots(host: Host) -> Iterator[str]:
    """The layers from which everything that is needed can be reached."""
    for record in host.records.everything():
        yield from (record.disks or {}).values()
    yield from host.catalogue.roots()
    yield from host.templates.roots()


def found(host: Host, tops: list[str]) -> list[Path]:
    """The layers that nothing reaches; may be called in a thread. None while a checkpoint cannot be read: nobody knows
    what it needs. Doctor names it, and it can be removed."""
    return [] if host.catalogue.damaged else host.layers.garbage(tops)


async def collect(host: Host) -> int:
    """Delete the layers that nothing reaches; the bytes that this freed. Does nothing when something is built
    meanwhile: then it is owed, and done within seconds after that (`chains.Folding`)."""
    builds = host.layers.builds
    doomed = await asyncio.to_thread(found, host, list(roots(host)))
    # when something was built, what was looked at is not how things are now
    host.layers.owed = host.layers.in_flux or host.layers.builds != builds
    if host.layers.owed:
        return 0
    return sum(_delete(path) for path in doomed)


def _delete(path: Path) -> int:
    freed = occupied(path)
    crashpoint("layer.delete.before")
    path.unlink(missing_ok=True)
    crashpoint("layer.delete.after")
    return freed


def require_unused(host: Host, checkpoint_id: str) -> None:
    """Raises FailedPrecondition when a suspended sandbox's memory is in this checkpoint."""
    for record in host.records.everything():
        if record.memory == checkpoint_id:
            name = known_as(record)
            hint = f"limpet trash empty {name}" if record.trash else f"limpet resume {name}"
            raise FailedPrecondition(f"{name} is suspended to {checkpoint_id}", hint=hint)
