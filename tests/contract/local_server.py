"""The API over the played services, on a real Unix socket in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx

from limpet import PROTOCOL
from limpet.api.app import create_app
from limpet.api.door import Services
from limpet.api.server import serving
from limpet.paths import Paths
from limpet.services.config import Config
from limpet.services.events import Events
from limpet.services.operations import Operations
from limpet.store import Store
from tests.contract.local_moments import PlayedCheckpoints, PlayedImages, PlayedStorage, PlayedTemplates
from tests.contract.local_runtime import PlayedRuntimes
from tests.contract.local_services import (
    DirectoryFiles,
    LocalStats,
    LocalSystem,
    NoPorts,
    PlayedExecs,
    PlayedSandboxes,
)
from tests.contract.local_vaults import PlayedPayloads, PlayedSyncing, PlayedTrash, PlayedVaults

HEADERS = {"Limpet-Protocol": str(PROTOCOL)}


class Running:
    """A server in a thread, and what it serves."""

    def __init__(self, home: Path) -> None:
        self.paths = Paths(home / "data", home / "cache", home / "run")
        self.paths.make()
        (home / "guest").mkdir()
        self.files = DirectoryFiles(home / "guest")
        self.execs = PlayedExecs()
        self.socket = self.paths.daemon_socket
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def end(self) -> None:
        """Shut it down; `__exit__` waits for it."""
        self.loop.call_soon_threadsafe(self._end.set)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # it ended already
            self.end()
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        store = Store.open(self.paths)
        self.operations, self.events = Operations(store), Events(store)
        self.sandboxes = PlayedSandboxes(self.operations)
        self.images, self.storage = PlayedImages(self.operations), PlayedStorage(self.operations)
        self.vaults, self.payloads = PlayedVaults(self.sandboxes), PlayedPayloads(self.sandboxes)
        self.trash = PlayedTrash(self.sandboxes)
        self.runtimes = PlayedRuntimes(self.sandboxes)
        self.sandboxes.removed = self.trash.take
        nothing = cast(Any, None)
        services = Services(
            system=LocalSystem(self.paths.data), sandboxes=self.sandboxes, standing=self.sandboxes,
            forks=self.sandboxes, commits=self.sandboxes, execs=self.execs, files=self.files,
            ports=NoPorts(), workspaces=nothing, images=self.images, checkpoints=PlayedCheckpoints(self.sandboxes),
            templates=PlayedTemplates(self.operations), config=Config(store), storage=self.storage, doctor=nothing,
            stats=LocalStats(), operations=self.operations, events=self.events, vaults=self.vaults,
            syncing=PlayedSyncing(self.sandboxes), payloads=self.payloads, trash=self.trash,
            runtimes=self.runtimes,
        )  # fmt: skip
        try:
            async with serving(create_app(services), self.socket, ping=0.1):
                self._ready.set()
                await self._end.wait()
                await self.operations.close()
                self.events.close()
        finally:
            store.close()

    def emit(self, kind: str, **data: Any) -> None:
        """Emit an event from the test's thread."""

        async def do() -> None:
            self.events.emit(kind, **data)

        asyncio.run_coroutine_threadsafe(do(), self.loop).result(10)

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(transport=transport, base_url="http://limpet", headers=HEADERS, timeout=20)


@contextlib.contextmanager
def running() -> Iterator[Running]:
    """A server in a home of its own. Not pytest's tmp_path: its paths are long for a socket."""
    home = Path(tempfile.mkdtemp(prefix="limpet-api-"))
    try:
        with Running(home) as server:
            yield server
    finally:
        shutil.rmtree(home, ignore_errors=True)
