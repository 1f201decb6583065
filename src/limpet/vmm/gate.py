"""The gate between QEMU and passt: no frame of the guest's may name this host.

passt connects wherever a frame points to, with the host's own sockets. A guest that is root can address a frame to
127.0.0.1 or 0.0.0.0, and passt (2023 versions at least) then connects to the host's loopback, whatever its options say.
So every frame of the guest's passes here first, and goes on only if it is ARP or IPv4 to an address that is not this
host's: not loopback, not `this network`, not multicast or broadcast, not an address of any interface.

Run as a script with a bare interpreter: `python -ISE gate.py FD FD` (towards QEMU, towards passt). Standard library
only. It ends when either side does. The wire format is QEMU's stream netdev: u32 length, big-endian, Ethernet frame.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Kept small, and the imports few: there is one such process for each running sandbox with a network.
_CHUNK = 256 << 10
_LARGEST_FRAME = 65535 + 18  # what passt takes: an Ethernet header, perhaps a tag, and the largest IPv4 packet
_IPV4_HEADER = 14 + 20
_ARP, _IPV4 = b"\x08\x06", b"\x08\x00"
_REFRESH_S = 2.0
_NOBODY = 65534

Network = tuple[int, int]  # address and mask


def network(address: str, length: int) -> Network:
    """The IPv4 network `address`/`length`."""
    mask = (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF
    return int.from_bytes(socket.inet_aton(address), "big") & mask, mask


# RFC 6890: "this network", loopback, multicast, reserved and broadcast.
_NEVER = (network("0.0.0.0", 8), network("127.0.0.0", 8), network("224.0.0.0", 4), network("240.0.0.0", 4))
_LOCAL_TABLE = "/proc/net/fib_trie"  # `|-- ADDRESS`, then `/LENGTH host LOCAL` for what is this host's own


class Policy:
    """Which destinations a frame may have. The host's addresses are read again every two seconds, for they change."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, table: str = _LOCAL_TABLE) -> None:
        self._clock, self._table = clock, table
        self._expires = 0.0
        self._verdicts: dict[bytes, bool] = {}
        self._local: tuple[Network, ...] = ()

    def allows(self, frame: memoryview) -> bool:
        """Whether this Ethernet frame of the guest's may leave."""
        kind = bytes(frame[12:14])
        if kind == _ARP:
            return True
        if kind != _IPV4 or len(frame) < _IPV4_HEADER or len(frame) > _LARGEST_FRAME or frame[14] >> 4 != 4:
            return False
        return self._destination(bytes(frame[30:34]))

    def _destination(self, address: bytes) -> bool:
        if self._clock() >= self._expires:
            self._expires = self._clock() + _REFRESH_S
            with open(self._table) as file:
                self._local = local_networks(file.read())
            self._verdicts.clear()
        verdict = self._verdicts.get(address)
        if verdict is None:
            wanted = int.from_bytes(address, "big")
            verdict = all(wanted & mask != base for base, mask in (*_NEVER, *self._local))
            if len(self._verdicts) < 4096:  # a port scan must not fill our memory
                self._verdicts[address] = verdict
        return verdict


def local_networks(table: str) -> tuple[Network, ...]:
    """The host's own addresses out of the kernel's routing tables as /proc/net/fib_trie prints them."""
    found, address = set(), ""
    for line in table.splitlines():
        text = line.strip()
        if text.startswith("|--"):
            address = text.split()[1]
        elif text.endswith("host LOCAL"):
            found.add(network(address, int(text.split()[0].lstrip("/"))))
    return tuple(found)


def allowed_runs(data: memoryview, policy: Policy) -> Iterator[tuple[int, int]]:
    """Stretches (start, end) of whole allowed frames in `data`, as long as possible; the last one yielded is always
    empty and marks where the unfinished frame begins."""
    start = at = 0
    while len(data) - at >= 4:
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            break
        if not policy.allows(data[at + 4 : end]):
            if at > start:
                yield start, at
            start = end
        at = end
    if at > start:
        yield start, at
    yield at, at


def guard(guest: socket.socket, world: socket.socket, policy: Policy) -> None:
    """Pass the guest's frames on, leaving out those that `policy` forbids, until either side hangs up."""
    buffer, filled = bytearray(2 * _CHUNK), 0
    view = memoryview(buffer)
    while count := guest.recv_into(view[filled:]):
        filled += count
        rest = 0
        for start, rest in allowed_runs(view[:filled], policy):
            if rest > start:
                world.sendall(view[start:rest])
        if rest == 0 and filled == len(buffer):
            return  # a frame larger than any: not QEMU's framing
        view[: filled - rest] = bytes(view[rest:filled])
        filled -= rest


def relay(world: socket.socket, guest: socket.socket) -> None:
    """Pass on what comes in, until either side hangs up."""
    view = memoryview(bytearray(_CHUNK))
    while count := world.recv_into(view):
        guest.sendall(view[:count])


def main(arguments: list[str]) -> None:
    """Run both directions; the process ends with the first that does."""
    guest, world = (socket.socket(fileno=int(fd)) for fd in arguments)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    threading.Thread(target=_until_hung_up, args=(relay, world, guest), daemon=True).start()
    _until_hung_up(guard, guest, world, Policy())


def _until_hung_up(direction: Callable[..., None], *arguments: object) -> None:
    try:
        direction(*arguments)
    except OSError:
        pass
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
