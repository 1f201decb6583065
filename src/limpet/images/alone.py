"""One process at a time makes what sandboxes are made of; others wait, and find it done."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator

from limpet.images.stages import Progress
from limpet.models import Stage
from limpet.paths import Paths

_POLL = 0.2  # seconds


@contextlib.asynccontextmanager
async def alone(paths: Paths, progress: Progress) -> AsyncIterator[None]:
    """Hold the setup lock; while another one has it, say so and wait. The kernel releases it with the process."""
    fd = os.open(paths.setup_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        waited = False
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    progress(Stage(name="lock", state="running", detail="another setup is at work; waiting for it"))
                waited = True
                await asyncio.sleep(_POLL)
        if waited:
            progress(Stage(name="lock", state="done"))
        yield
    finally:
        os.close(fd)
