"""A hostile guest on the wire: whatever frame it sends, no service of this host answers.

The test is QEMU: it holds QEMU's end of the wire and speaks Ethernet. So it can send what a guest's kernel would not.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet.vmm import gate, network

GUEST, MAC = "10.0.2.15", bytes.fromhex("525400010203")
NO_NETWORK = network.available()
TCP, UDP = 6, 17


def checksum(data: bytes) -> int:
    words = struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def ipv4(protocol: int, source: str, target: str, payload: bytes) -> bytes:
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0) + ends
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def tcp_syn(source: str, target: str, port: int, source_port: int) -> bytes:
    segment = struct.pack(">HHIIBBHHH", source_port, port, 1000, 0, 0x50, 2, 65535, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack(">BBH", 0, TCP, len(segment))
    return ipv4(TCP, source, target, segment[:16] + struct.pack(">H", checksum(pseudo + segment)) + segment[18:])


def udp(source: str, target: str, port: int, data: bytes, source_port: int) -> bytes:
    return ipv4(UDP, source, target, struct.pack(">HHHH", source_port, port, 8 + len(data), 0) + data)


class Guest:
    """QEMU's end of the wire."""

    def __init__(self, wire: socket.socket) -> None:
        self.wire, self.gateway, self.ports = wire, b"\xff" * 6, iter(range(20000, 60000))

    def send(self, payload: bytes, kind: bytes = b"\x08\x00") -> None:
        frame = self.gateway + MAC + kind + payload
        self.wire.sendall(struct.pack(">I", len(frame)) + frame)

    def receive(self, timeout: float) -> bytes | None:
        if not select.select([self.wire], [], [], timeout)[0]:
            return None
        (length,) = struct.unpack(">I", self.wire.recv(4, socket.MSG_WAITALL))
        return self.wire.recv(length, socket.MSG_WAITALL)

    def resolve_gateway(self) -> bool:
        ends = [MAC, socket.inet_aton(GUEST), b"\0" * 6, socket.inet_aton("10.0.2.2")]
        self.send(struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + b"".join(ends), b"\x08\x06")
        answer = self.receive(5)
        if answer is None or answer[12:14] != b"\x08\x06":
            return False
        self.gateway = answer[22:28]
        return True

    def connects(self, target: str, port: int, source: str = GUEST, timeout: float = 0.2) -> bool:
        """Whether a TCP handshake is answered."""
        own_port = next(self.ports)
        self.send(tcp_syn(source, target, port, own_port))
        deadline = time.monotonic() + timeout
        while (frame := self.receive(max(0.0, deadline - time.monotonic()))) is not None:
            if frame[12:14] == b"\x08\x00" and frame[23] == TCP and frame[36:38] == struct.pack(">H", own_port):
                return frame[47] & 0x12 == 0x12  # SYN and ACK
        return False


@contextlib.contextmanager
def guest_wire(log: Path) -> Iterator[tuple[Guest, network.Link]]:
    with network.connected(network.GuestNetwork(), log) as link, socket.socket(fileno=link.fd) as wire:
        guest = Guest(wire)
        assert guest.resolve_gateway(), log.read_text()
        yield guest, link
        wire.detach()
    for helper in link.helpers:
        assert helper.wait(10) == 0


def own_addresses() -> list[str]:
    """The host's addresses, loopback left out."""
    with open("/proc/net/fib_trie") as file:
        found = gate.local_networks(file.read())
    full = [socket.inet_ntoa(base.to_bytes(4, "big")) for base, mask in found if mask == 0xFFFFFFFF]
    return [address for address in full if not address.startswith("127.")]


def hostile_targets() -> list[str]:
    loopback = ["127.0.0.1", "127.0.0.2", "127.255.255.254", "0.0.0.0", "0.0.0.1"]
    return [*loopback, "10.0.2.2", "10.0.2.3", "10.0.2.15", "255.255.255.255", "224.0.0.1", *own_addresses()]


@pytest.mark.skipif(NO_NETWORK is not None, reason=str(NO_NETWORK))
def test_no_frame_of_a_hostile_guest_reaches_a_service_of_the_host(tmp_path: Path) -> None:
    """Issue 2, item 8: not by gateway, loopback or the host's own addresses, not with a forged source."""
    with contextlib.ExitStack() as stack:
        guest, _ = stack.enter_context(guest_wire(tmp_path / "log"))
        servers = [stack.enter_context(socket.create_server((host, 0))) for host in ("127.0.0.1", "0.0.0.0")]
        listeners = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in servers]
        for listener, host in zip(listeners, ("127.0.0.1", "0.0.0.0"), strict=True):
            listener.bind((host, 0))
        for target in hostile_targets():
            for source in (GUEST, "127.0.0.1", "10.0.2.2", *own_addresses()):
                for listener in listeners:
                    guest.send(udp(source, target, listener.getsockname()[1], b"knock", next(guest.ports)))
                assert not [s for s in servers if guest.connects(target, s.getsockname()[1], source)], (target, source)
        assert select.select([*servers, *listeners], [], [], 0.2)[0] == []


@contextlib.contextmanager
def other_machine() -> Iterator[str]:
    """The address of a machine beside this host: a network namespace with a wire to it. Needs root."""
    name, link = f"limpet-{os.getpid()}", f"lt{os.getpid()}"
    inside = ("ip", "netns", "exec", name)
    commands: list[tuple[str, ...]] = [
        ("ip", "link", "add", link, "type", "veth", "peer", "name", f"{link}p", "netns", name),
        ("ip", "addr", "add", "198.51.100.1/24", "dev", link), ("ip", "link", "set", link, "up"),
        (*inside, "ip", "addr", "add", "198.51.100.2/24", "dev", f"{link}p"),
        (*inside, "ip", "link", "set", f"{link}p", "up"),
    ]  # fmt: skip
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.skipif(NO_NETWORK is not None, reason=str(NO_NETWORK))
@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a second machine out of a network namespace")
def test_a_guest_reaches_another_machine_and_is_seen_as_this_host(tmp_path: Path) -> None:
    """Issue 2, item 8: out through NAT. The same SYN to the host's own end of that wire goes nowhere."""
    program = "import socket; s = socket.create_server(('0.0.0.0', 8080)); print(flush=True); print(s.accept()[1][0])"
    with other_machine() as name:
        server = ("ip", "netns", "exec", name, sys.executable, "-c", program)
        with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as peer, guest_wire(tmp_path / "log") as wired:
            assert peer.stdout is not None and peer.stdout.readline() == "\n"
            guest = wired[0]
            with socket.create_server(("0.0.0.0", 8080)):
                assert not guest.connects("198.51.100.1", 8080)
            assert guest.connects("198.51.100.2", 8080, timeout=5)
            assert peer.stdout.readline() == "198.51.100.1\n"


@pytest.mark.skipif(NO_NETWORK is not None, reason=str(NO_NETWORK))
def test_frames_that_are_neither_arp_nor_ipv4_go_nowhere(tmp_path: Path) -> None:
    """Issue 2, item 8: a tagged or an IPv6 frame cannot carry an address past the gate."""
    with guest_wire(tmp_path / "log") as (guest, _), socket.create_server(("127.0.0.1", 0)) as server:
        syn = tcp_syn(GUEST, "127.0.0.1", server.getsockname()[1], 30000)
        for kind, payload in ((b"\x81\x00", b"\0\1\x08\0" + syn), (b"\x86\xdd", syn), (b"\x08\x00", syn[:16])):
            guest.send(payload, kind)
        assert guest.resolve_gateway()  # the gate has seen all of that, and goes on
        assert select.select([server], [], [], 0.2)[0] == []


@pytest.mark.skipif(NO_NETWORK is not None, reason=str(NO_NETWORK))
def test_the_helpers_end_with_the_machine(tmp_path: Path) -> None:
    """VM-8: nothing of a machine is left when QEMU is gone, and neither helper runs as root."""
    with guest_wire(tmp_path / "log") as (_, link):
        for helper in link.helpers:
            status = Path(f"/proc/{helper.pid}/status").read_text()
            assert "\nUid:\t0" not in status
    assert [helper.returncode for helper in link.helpers] == [0, 0]


def test_the_hosts_own_addresses_are_read_from_the_routing_table() -> None:
    """/proc/net/fib_trie: only `host LOCAL` entries are the host's own."""
    table = (
        "Main:\n     |-- 0.0.0.0\n        /0 universe UNICAST\n"
        "           |-- 192.0.2.0\n              /24 link UNICAST\n"
        "           |-- 192.0.2.2\n              /32 link UNICAST\n              /32 host LOCAL\n"
        "        |-- 192.0.2.255\n           /32 link BROADCAST\n"
    )
    assert gate.local_networks(table) == (gate.network("192.0.2.2", 32),)


def test_an_address_that_the_host_gets_later_is_forbidden_too(tmp_path: Path) -> None:
    """Issue 2, item 8: the policy looks again every two seconds."""
    table, now = tmp_path / "fib_trie", [0.0]
    table.write_text("")
    policy = gate.Policy(clock=lambda: now[0], table=str(table))
    frame = memoryview(b"\xff" * 12 + b"\x08\x00" + udp(GUEST, "198.51.100.7", 53, b"", 1))
    assert policy.allows(frame)
    table.write_text("  |-- 198.51.100.7\n     /32 host LOCAL\n")
    now[0] = 2.0
    assert not policy.allows(frame)


def test_whole_frames_pass_in_long_runs_and_forbidden_ones_are_cut_out() -> None:
    """The gate forwards as much at once as it can, and keeps an unfinished frame for later."""
    good = b"\xff" * 12 + b"\x08\x00" + udp(GUEST, "198.51.100.7", 53, b"data", 1)
    bad = b"\xff" * 12 + b"\x08\x00" + udp(GUEST, "127.0.0.1", 53, b"data", 1)
    wire = b"".join(struct.pack(">I", len(frame)) + frame for frame in (good, good, bad, good, bad))
    size = len(good) + 4
    runs = list(gate.allowed_runs(memoryview(wire + wire[:9]), gate.Policy()))
    assert runs == [(0, 2 * size), (3 * size, 4 * size), (5 * size, 5 * size)]
