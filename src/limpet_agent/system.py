"""What the guest knows of itself; its clock, its name."""

from __future__ import annotations

import os
import time

from limpet_agent import VERSION
from limpet_agent.faults import Fault, from_os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CLOCK_SLACK_NS = 50_000_000
_SIOCGIFADDR = 0x8915  # netdevice(7)


def read(path: str, limit: int = 64 << 10) -> str:
    """A small file's text; empty when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode(errors="replace")
    except OSError:
        return ""


def boot_id() -> str:
    """The kernel's id of this boot."""
    return read("/proc/sys/kernel/random/boot_id").strip()


def set_clock(wanted_ns: object) -> None:
    """Set the clock when it is off by more than 50 ms. Raises Fault."""
    if not isinstance(wanted_ns, int) or not 0 < wanted_ns < 1 << 63:
        raise Fault("bad_request", "time_ns must be nanoseconds since the epoch")
    if abs(time.time_ns() - wanted_ns) > _CLOCK_SLACK_NS:
        try:
            time.clock_settime_ns(time.CLOCK_REALTIME, wanted_ns)
        except OSError as error:
            raise from_os(error, "cannot set the clock") from None


def set_hostname(name: object) -> None:
    """Set the host name. Raises Fault."""
    if not isinstance(name, str) or not 0 < len(name) <= 63 or not name.replace("-", "").isalnum():
        raise Fault("bad_request", f"{name!r} is not a host name")
    try:
        with open("/proc/sys/kernel/hostname", "w") as file:
            file.write(name)
    except OSError as error:
        raise from_os(error, "cannot set the host name") from None


def info() -> dict[str, Any]:
    """The host's models.SystemInfo."""
    name = os.uname()
    memory = dict(line.split(":", 1) for line in read("/proc/meminfo").splitlines() if ":" in line)
    load = [*read("/proc/loadavg").split(), "0", "0", "0"][:3]
    return {
        "kernel": name.release, "os": _os_name(), "arch": name.machine, "hostname": name.nodename,
        "memory_total": _kib(memory.get("MemTotal")), "memory_available": _kib(memory.get("MemAvailable")),
        "cpus": os.cpu_count() or 1, "load": [float(value) for value in load], "uptime": uptime(),
        "addresses": addresses(), "boot_id": boot_id(), "agent_version": VERSION,
    }  # fmt: skip


def uptime() -> float:
    """Seconds since the kernel started, without the time it was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def addresses() -> list[str]:
    """The IPv4 and IPv6 addresses of all interfaces but loopback, with their prefix lengths where known."""
    import fcntl
    from _socket import AF_INET, AF_INET6, SOCK_DGRAM, inet_ntop
    from _socket import socket as Socket

    found = []
    probe = Socket(AF_INET, SOCK_DGRAM)
    try:
        for interface in sorted(os.listdir("/sys/class/net")):
            if interface == "lo":
                continue
            try:
                raw = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, interface.encode()[:15].ljust(40, b"\0"))
            except OSError:
                continue
            found.append(inet_ntop(AF_INET, raw[20:24]))
    except OSError:
        pass
    finally:
        probe.close()
    for line in read("/proc/net/if_inet6").splitlines():
        fields = line.split()
        if len(fields) == 6 and fields[5] != "lo":
            found.append(inet_ntop(AF_INET6, bytes.fromhex(fields[0])))
    return found


def _os_name() -> str:
    for line in read("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip("\"'")
    return "Linux"


def _kib(text: str | None) -> int:
    words = (text or "").split()
    return int(words[0]) * 1024 if words and words[0].isdigit() else 0
