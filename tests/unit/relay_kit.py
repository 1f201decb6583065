"""A guest without a machine behind the daemon's listeners, and servers inside it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

from limpet.paths import SandboxPaths
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.store import SandboxRecord
from limpet.vmm.machine import Machine
from tests.contract.local_guest import LocalGuest
from tests.unit import services_kit

T = TypeVar("T")
_LIMIT = 30.0

Reply = Callable[[socket.socket], None]


class _Process:
    """What a live VM asks of its machine: here its guest is a process."""

    def __init__(self, guest: LocalGuest) -> None:
        self._guest = guest

    def alive(self) -> bool:
        return self._guest.process.poll() is None


class World:
    """One running sandbox."""

    def __init__(self, host: Host, guest: LocalGuest) -> None:
        self.host, self.guest = host, guest
        self.record: SandboxRecord = services_kit.add_sandbox(host, disks=None)
        self._at_end: list[Callable[[], Awaitable[None]]] = []

    def at_end(self, close: Callable[[], Awaitable[None]]) -> None:
        """What else `run` has to let go of."""
        self._at_end.append(close)

    def fresh_vm(self) -> LiveVM:
        files = SandboxPaths(self.guest.root, self.guest.root)
        return LiveVM(self.record.id, cast(Machine, _Process(self.guest)), files)

    def run(self, work: Callable[[LiveVM], Awaitable[T]]) -> T:
        """Do something with it, within a limit, and let go of it."""

        async def within() -> T:
            vm = self.fresh_vm()
            try:
                async with asyncio.timeout(_LIMIT):
                    return await work(vm)
            finally:
                while self._at_end:
                    await self._at_end.pop()()
                await self.host.ports.withdraw(vm.sandbox_id)
                await vm.close()

        return asyncio.run(within())


@contextlib.contextmanager
def world() -> Iterator[World]:
    root = Path(tempfile.mkdtemp(prefix="lr", dir="/tmp"))  # short: socket paths are
    (root / "guest").mkdir()
    guest = LocalGuest(root / "guest")
    try:
        with services_kit.host_in(root / "home") as host:
            yield World(host, guest)
    finally:
        guest.stop()
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def serving(listener: socket.socket, reply: Reply) -> Iterator[None]:
    """A server in the guest: every connection has a thread. Errors of a connection are its end."""

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_LIMIT)
            reply(connection)

    def all_of_them() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=[connection], daemon=True).start()

    thread = threading.Thread(target=all_of_them, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def read_all(connection: socket.socket) -> bytes:
    kept = bytearray()
    while data := connection.recv(1 << 16):
        kept += data
    return bytes(kept)


@contextlib.asynccontextmanager
async def closing(
    opening: Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]],
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client's connection, closed afterwards."""
    reader, writer = await opening
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
