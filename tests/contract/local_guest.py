"""A guest without a machine: the real supervisor and agent as ordinary processes, reached over a Unix socket."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import limpet_agent
from limpet.guest import Agent, Channel

T = TypeVar("T")
_LIMIT = 30.0


class LocalGuest:
    """The processes, and how to talk to them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = root / "chan"
        self.intake = root / "intake.raw"
        self.files = root / "files"
        self.files.mkdir()
        with self.intake.open("wb") as file:
            file.truncate(16 << 20)
        main = Path(limpet_agent.__file__).with_name("__main__.py")
        self.process = subprocess.Popen(
            [sys.executable, "-ISEB", str(main), "--listen", str(self.socket), "--state", str(root / "state"),
             "--intake", str(self.intake)], start_new_session=True,
        )  # fmt: skip

    @asynccontextmanager
    async def channel(self, *, bulk: bool = True) -> AsyncIterator[Channel]:
        """A session; closed afterwards."""
        channel = await Channel.connect(self.socket, intake=self.intake if bulk else None, timeout=10)
        try:
            yield channel
        finally:
            await channel.close()

    def do(self, work: Callable[[Agent], Awaitable[T]], *, bulk: bool = True) -> T:
        """Run `work(agent)` over a session of its own, within a limit."""

        async def run() -> T:
            async with asyncio.timeout(_LIMIT), self.channel(bulk=bulk) as channel:
                return await work(Agent(channel))

        return asyncio.run(run())

    def stop(self) -> None:
        """End every process that was started here."""
        for pid in (self.agent_pid(), self.process.pid):
            if pid:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def agent_pid(self) -> int | None:
        """The agent process, the supervisor's only child of the same program."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            if b"--listen" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        return None
