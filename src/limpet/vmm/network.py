"""A network for the guest without root: passt turns its Ethernet frames into ordinary sockets of this user.

    guest ── virtio-net ── QEMU ══ gate ══ passt ── ordinary sockets ── world          ══ is a socket pair

What the guest reaches: whatever other machines this host reaches over IPv4, through NAT.
What it does not reach: this host, by any address. Three things close that door, tested with a hostile guest:
  --no-map-gw      the gateway's address is no name for the host (in QEMU's own user network it is one)
  the gate         no frame to the host's loopback or to an address of its interfaces gets to passt: see gate.py
  -t none -u none  nothing is forwarded in; published ports travel over the channel instead
IPv4 only: a second address family would have to be closed in the same way, and nothing here needs it.

gate and passt are processes of their own that outlive the daemon and end with QEMU, when their sockets do. Started by
root both drop to `nobody`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from limpet import process
from limpet.errors import FailedPrecondition
from limpet.vmm import gate

_ROUTES = Path("/proc/net/route")  # proc(5); addresses in host byte order, so 0 is 0 either way
_NO_ROUTE_HINT = "connect the host to a network, or create the sandbox with --network none"


@dataclass(frozen=True)
class GuestNetwork:
    """The guest's side, the same in every sandbox: each has a network of its own. `mtu` in bytes is the largest that
    passt takes (65520), because larger frames mean fewer of them."""

    address: str = "10.0.2.15"
    prefix: int = 24
    gateway: str = "10.0.2.2"
    dns: str = "10.0.2.3"
    mtu: int = 65520

    def kernel_parameter(self) -> str:
        """What the guest's boot reads: `limpet.net=address/prefix,gateway,dns`."""
        return f"limpet.net={self.address}/{self.prefix},{self.gateway},{self.dns}"


@dataclass(frozen=True)
class Link:
    """The helper processes, and the descriptor that is QEMU's end of the wire."""

    helpers: tuple[process.Child, ...]
    fd: int


def available() -> str | None:
    """Why user-mode networking cannot work here, as one sentence; None when it can."""
    if process.find("passt") is None:
        return "passt is not installed"
    return None if outward_interface() else "this host has no IPv4 default route"


def outward_interface() -> str | None:
    """The interface of the IPv4 default route with the lowest metric, or None."""
    routes = [line.split() for line in _ROUTES.read_text().splitlines()[1:]] if _ROUTES.exists() else []
    default = [(int(route[6]), route[0]) for route in routes if route[1] == route[7] == "00000000"]
    return min(default)[1] if default else None


def passt_command(network: GuestNetwork, fd: int) -> list[str]:
    """The argv of passt for one guest; `fd` is its end of the socket pair."""
    return [
        "passt", "--foreground", "--quiet", "--stderr", "--fd", str(fd), "--ipv4-only",
        "--address", network.address, "--netmask", str(network.prefix), "--gateway", network.gateway,
        "--dns-forward", network.dns, "--no-map-gw",
        "--tcp-ports", "none", "--udp-ports", "none", "--no-dhcp",
    ]  # fmt: skip


def gate_command(guest: int, world: int) -> list[str]:
    """The argv of the gate between two descriptors. The interpreter reads no site packages: it starts faster so."""
    return [sys.executable, "-ISE", gate.__file__, str(guest), str(world)]


@contextlib.contextmanager
def connected(network: GuestNetwork, log: Path) -> Iterator[Link]:
    """Start passt and the gate (their messages go to `log`) and give QEMU's end of the wire. It is closed at the end
    of the block: by then QEMU has inherited it, and if not, the helpers see the wire's end and go.
    Raises Unavailable without passt, FailedPrecondition without a default route."""
    process.require("passt")
    if outward_interface() is None:
        raise FailedPrecondition("this host has no IPv4 default route", hint=_NO_ROUTE_HINT)
    qemu, gate_in = socket.socketpair()
    with qemu:
        with gate_in:
            helpers = _start_helpers(network, gate_in, log)
        yield Link(helpers, qemu.fileno())


def _start_helpers(network: GuestNetwork, guest: socket.socket, log: Path) -> tuple[process.Child, ...]:
    gate_out, world = socket.socketpair()
    with gate_out, world:
        passt = process.spawn_detached(passt_command(network, world.fileno()), log=log, pass_fds=[world.fileno()])
        ends = (guest.fileno(), gate_out.fileno())
        return passt, process.spawn_detached(gate_command(*ends), log=log, pass_fds=ends)
