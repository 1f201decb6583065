"""mmdebstrap: Debian packages to a tar, as root or as an ordinary user, with progress."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from limpet import process
from limpet.errors import DeadlineExceeded, Unavailable

SUITE = "bookworm"  # Debian 12

Report = Callable[[float, str], None]  # fraction of the step that is done, what is going on

_TIMEOUT = 1800.0  # seconds; a slow mirror is not a broken one
_MILESTONES = (  # what mmdebstrap says when it enters a phase, and how far it is then
    ("running apt-get update", 0.02, "package lists"),
    ("downloading packages", 0.10, "downloading packages"),
    ("extracting archives", 0.30, "unpacking packages"),
    ("installing essential", 0.40, "installing the essential packages"),
    ("installing remaining", 0.55, "installing packages"),
    ("running --customize-hook", 0.80, "configuring"),
    ("cleaning package lists", 0.85, "cleaning up"),
    ("creating tarball", 0.90, "writing the tree"),
)


def in_namespace(script: str, *arguments: str) -> list[str]:
    """The command that runs a shell script as root over its own mounts: real root when we are, else a user namespace
    with a whole range of ids, so that files keep their owners. The arguments are $1, $2 …"""
    user = [] if os.geteuid() == 0 else ["--map-root-user", "--map-auto"]
    return ["unshare", *user, "--mount", "--propagation", "private", "sh", "-euc", script, "limpet", *arguments]


async def mmdebstrap(
    target: Path, *, variant: str, include: Sequence[str], report: Report, mirror: str | None, extra: Sequence[str] = ()
) -> None:
    """Write a tar of the suite's packages to `target`.

    Raises Unavailable with the last lines of output when the packages cannot be had, DeadlineExceeded after half
    an hour."""
    mode = "root" if os.geteuid() == 0 else "unshare"
    argv = ["mmdebstrap", f"--mode={mode}", f"--variant={variant}", f"--include={','.join(include)}", *extra]
    argv += [SUITE, str(target), *([mirror] if mirror else [])]
    tail: deque[str] = deque(maxlen=12)
    # apt warns about, and may fail in, a working directory that the namespace's user cannot read
    async with process.piped(argv, cwd=Path("/")) as running:
        assert running.stderr is not None
        try:
            async with asyncio.timeout(_TIMEOUT):
                async for raw in running.stderr:
                    line = raw.decode(errors="replace").strip()
                    if line:
                        tail.append(line)
                    for words, fraction, detail in _MILESTONES:
                        if words in line:
                            report(fraction, detail)
                status = await running.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"fetching Debian packages took longer than {_TIMEOUT:g} s") from None
    if status != 0:
        raise Unavailable(
            f"mmdebstrap failed with status {status}:\n  " + "\n  ".join(tail),
            hint="check the network (and the proxy or --mirror); `limpet setup` goes on where it stopped",
        )
