"""What carries the channel: the virtio-serial port, or a Unix socket when the agent runs as an ordinary process.

A link is non-blocking and watched edge-triggered: a virtio port without a host reports "hang-up" for ever, which a
level-triggered watch would spin on; an edge comes when the host connects or sends (drivers/char/virtio_console.c
wakes the port's wait queue for both).
"""

from __future__ import annotations

import os
import time

from limpet_agent.loop import EDGE, HUP, IN, OUT, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable

    Buffers = list[bytes | memoryview]

PORT_NAME = "limpet.agent"
_READ = 64 << 10
_READS_PER_TURN = 64  # then others get a turn
_RETRY = 1.0  # seconds between looks at a port whose edge we might have missed
_OLD_NEWS = 1.0  # seconds by which what the port says of its host may be behind the host's bytes


class Link:
    """A byte pipe to the host. Calls `received(data)`, `writable()` and `lost()`; `write` says how much it took."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._fd = -1
        self.received: Callable[[bytes], None] = lambda _data: None
        self.writable: Callable[[], None] = lambda: None
        self.lost: Callable[[], None] = lambda: None

    def fileno(self) -> int:
        """The descriptor that is watched; -1 when no host is connected."""
        return self._fd

    def begun(self) -> None:
        """A host has greeted us."""

    def write(self, buffers: Buffers) -> int:
        """Bytes taken; 0 when the host does not read just now (or is not there)."""
        if self._fd < 0:
            return 0
        try:
            return os.writev(self._fd, buffers)
        except BlockingIOError:
            return 0
        except OSError:  # EPIPE, ENODEV: the next read tells
            return 0

    def _event(self, events: int) -> None:
        if events & OUT:
            self.writable()
        self._read()

    def _read(self) -> None:
        for _ in range(_READS_PER_TURN):
            if self._fd < 0:
                return
            try:
                data = os.read(self._fd, _READ)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._gone()
                return
            self._arrived(data)
        self._loop.soon(self._read)

    def _arrived(self, data: bytes) -> None:
        self.received(data)

    def _gone(self) -> None:
        self.lost()


class PortLink(Link):
    """The virtio-serial port: always open, with or without a host at the other end."""

    def __init__(self, loop: Loop, device: str) -> None:
        super().__init__(loop)
        self._up = False
        self._begun = -_OLD_NEWS
        self._fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def start(self) -> None:
        """Begin to watch; callbacks must be set."""
        self._loop.watch(self._fd, IN | OUT | HUP | EDGE, self._event)
        self._look_again()

    def begun(self) -> None:
        self._begun = time.monotonic()

    def _arrived(self, data: bytes) -> None:
        self._up = True
        self.received(data)

    def _gone(self) -> None:
        """Who comes and goes travels apart from the bytes: soon after a greeting it may be the last host that left."""
        if self._up and time.monotonic() - self._begun < _OLD_NEWS:
            self._loop.after(_OLD_NEWS, self._read)
        elif self._up:
            self._up = False
            self.lost()

    def _look_again(self) -> None:
        if not self._up:
            self._read()
        self._loop.after(_RETRY, self._look_again)


class SocketLink(Link):
    """A listening Unix socket; one host at a time, as with QEMU's character device."""

    def __init__(self, loop: Loop, listener: Socket) -> None:
        super().__init__(loop)
        self._listener = listener
        self._connection: Socket | None = None

    def start(self) -> None:
        """Begin to accept; callbacks must be set."""
        self._loop.watch(self._listener.fileno(), IN, self._accept)

    def _accept(self, _events: int) -> None:
        from _socket import socket as Socket

        try:
            fd, _peer = self._listener._accept()  # type: ignore[attr-defined]  # what socket.accept is made of
        except BlockingIOError:
            return
        self._connection = Socket(fileno=fd)
        os.set_blocking(fd, False)
        self._fd = fd
        self._loop.unwatch(self._listener.fileno())
        self._loop.watch(fd, IN | OUT | HUP | EDGE, self._event)

    def _gone(self) -> None:
        if self._connection is None:
            return
        self._loop.unwatch(self._fd)
        self._fd = -1
        self._connection.close()
        self._connection = None
        self.lost()
        self.start()


def find_port() -> str | None:
    """The device of the virtio port named `limpet.agent`."""
    root = "/sys/class/virtio-ports"
    try:
        names = os.listdir(root)
    except OSError:
        return None
    for name in names:
        if _text(f"{root}/{name}/name") == PORT_NAME:
            return f"/dev/{name}"
    return None


def find_disk(serial: str) -> str | None:
    """The virtio block device with this serial number."""
    for name in sorted(os.listdir("/sys/block")):
        if name.startswith("vd") and _text(f"/sys/block/{name}/serial") == serial:
            return f"/dev/{name}"
    return None


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return ""
