"""Seeding: the guest's volume gets what the host directory holds (PAY-1), after a probe has shown that what is put into
the one arrives in the other (PAY-9).

The directory must be the same before and after it was read: the guest begins with one state of it, never with a
mixture. What belongs to the host stays there: markers, sockets, devices and pipes.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
from collections.abc import AsyncIterator
from io import RawIOBase
from pathlib import Path

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition, NotFound, Unavailable
from limpet.guest import Agent
from limpet.services.payloads.marker import NAME, PROBE
from limpet.services.payloads.scanning import Scan, scan
from limpet.threads import Workers, to_its_end
from limpet_agent import tarwrite

_PIPE = 1 << 20  # bytes that are read before the guest has taken them
# Threads that wait until others take what they wrote: of those that take it they would leave none.
_PACKERS = Workers(256, "seed")


def probe_host(directory: Path) -> None:
    """Write a file with a name of its own, give it a second name and read it back. Raises FailedPrecondition saying
    what was expected and what was found."""
    path, content = directory / f"{PROBE}{secrets.token_hex(8)}", secrets.token_bytes(64)
    second = path.with_name(f"{path.name}-2")
    crashpoint("payload.probe.before")
    try:
        with durable.new_file(path) as file:
            file.write(content)
        durable.link(path, second)
        found = second.read_bytes()
    except OSError as error:
        raise FailedPrecondition(
            f"the probe {path} could not be written and linked: {error.strerror}",
            hint=f"a payload needs a file system with hard links that you can write to; try: touch {path}",
        ) from None
    finally:
        for name in (path, second):
            durable.unlink(name, missing_ok=True)
    crashpoint("payload.probe.after")
    if found != content:
        raise FailedPrecondition(f"the probe {path} was read back as something else", hint=f"df {directory}")


async def probe_guest(agent: Agent, directory: Path, mount: str) -> None:
    """Send a file of the host directory the way that the seed goes and see it arrive. Raises Unavailable."""
    name, content = f"{PROBE}{secrets.token_hex(8)}", secrets.token_hex(32).encode()
    expected, found = f"{mount}/{name}", b""
    try:
        with durable.new_file(directory / name) as file:
            file.write(content)
        await agent.unpack(mount, _tar(directory / name))
        found = await agent.read_bytes(expected, limit=4096)
        await agent.remove(expected)
    except NotFound:
        pass
    finally:
        durable.unlink(directory / name, missing_ok=True)
    if found != content:
        raise Unavailable(
            f"the probe {expected} did not arrive in the guest: {len(found)} of its {len(content)} bytes were found",
            hint=f"look at the guest's disk: limpet exec NAME -- df {mount}",
        )


async def seed(agent: Agent, directory: Path, mount: str, user: str | None, before: Scan) -> Scan:
    """Fill the empty directory `mount` of the guest, durably; the scan of what it was filled with. Raises
    FailedPrecondition when the host directory changes meanwhile."""
    excluded = [path for path, stamp in before.stamps.items() if not (stamp.is_plain or stamp.is_directory)]
    markers = [os.path.join(path, NAME.encode()) for path in (b"", *before.nested)]
    crashpoint("payload.seed.before")
    await agent.unpack(
        mount, _tar(directory, frozenset(os.fsdecode(path) for path in (*excluded, *markers))), user=user
    )
    crashpoint("payload.seed.after")
    after = await to_its_end(scan, directory)
    if after.digest() != before.digest():
        raise FailedPrecondition(
            f"{before.difference(after) or directory} changed on the host while it was being read",
            hint="stop what writes to it, and try again",
        )
    return after


async def clear(agent: Agent, mount: str) -> None:
    """Empty a directory of the guest, which stays."""
    for entry in await agent.list_dir(mount):
        await agent.remove(entry.path, recursive=True)


async def _tar(path: Path, exclude: frozenset[str] = frozenset()) -> AsyncIterator[bytes]:
    """A path as a tar stream, read in a thread and only as fast as it is taken."""
    readable, writable = os.pipe()
    fcntl.fcntl(writable, fcntl.F_SETPIPE_SZ, _PIPE)
    packing = asyncio.create_task(_PACKERS.run(_pack, path, exclude, writable))
    try:
        while piece := await to_its_end(os.read, readable, _PIPE):
            yield piece
        await packing
    finally:
        os.close(readable)  # who still writes ends with EPIPE
        await asyncio.gather(packing, return_exceptions=True)


def _pack(path: Path, exclude: frozenset[str], writable: int) -> None:
    try:
        with open(writable, "wb", buffering=0) as pipe:
            tarwrite.pack(os.fspath(path), exclude, lambda piece: _write(pipe, piece))
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, (bytes, str)) else path
        raise FailedPrecondition(f"cannot read {where}: {error.strerror}", hint=f"chmod -R u+r {path}") from None


def _write(pipe: RawIOBase, piece: bytes | memoryview) -> None:
    view = memoryview(piece)
    while view:
        view = view[pipe.write(view) :]
