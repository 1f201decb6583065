"""A new identity for a guest that goes on from somebody else's memory: nothing of the earlier one is left (GST-3).

Fast: no process is started on the way. Each step may fail without harm to the others; what failed is told.
"""

from __future__ import annotations

import fcntl
import os
import time
from struct import pack

from limpet_agent import boot, system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Params = dict[str, Any]

BOOT_ID = "/proc/sys/kernel/random/boot_id"
_FRESH_BOOT_ID = "/run/limpet/boot-id"
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207  # random(4)
_MS_BIND = 0x1000  # mount(2)
_SIOCSIFHWADDR, _SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8924, 0x8913, 0x8914  # netdevice(7)
_IFF_UP, _ARPHRD_ETHER = 1, 1


def warm() -> None:
    """Import what the steps need, and what other operations import late: clones find it in memory."""
    import array  # noqa: F401
    import ctypes

    from limpet_agent import files, freezing, mounting, relay, runtime, tarread, tarwrite, volumes  # noqa: F401

    ctypes.CDLL(None)


def run_ahead() -> int:
    """Start a program that does nothing, on another processor beside the renewal; its process id (the caller waits for
    it), 0 for none. Under emulation the first program after a restore costs 100 ms, nearly all of it translation that
    the next one shares."""
    if (os.cpu_count() or 1) < 2:
        return 0
    pid = os.fork()  # not vfork, which would have us wait
    if pid == 0:
        try:
            os.execve("/bin/true", ["true"], {})
        finally:
            os._exit(0)
    return pid


def renew(params: Params) -> Params:
    """Become who `params` says; what the host is told."""
    failed: list[str] = []

    def step(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except (OSError, ValueError, KeyError, TypeError) as error:
            failed.append(f"{name}: {error!r}")

    wanted_ns = params.get("time_ns")
    if isinstance(wanted_ns, int):
        step("clock", lambda: time.clock_settime_ns(time.CLOCK_REALTIME, wanted_ns))
    step("entropy", lambda: _mix_entropy(bytes.fromhex(params["entropy"])))
    step("hostname", lambda: boot.become(params["hostname"]))
    step("machine-id", lambda: boot.be_machine(params["machine_id"]))
    step("boot id", lambda: _new_boot_id(params["boot_id"]))
    if params.get("network"):
        step("network", lambda: _renew_network(params["network"]))
    return {"time_ns": time.time_ns(), "boot_id": system.boot_id(), "failed": failed}


def _mix_entropy(seed: bytes) -> None:
    """Credit the host's bytes and make the kernel's generator use them now: clones drew from one state so far."""
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def cover_boot_id() -> None:
    """Mount a file over the kernel's boot id, which cannot be written: programs read it to know one boot from
    another. Once in a boot: what comes later is written into the file. Raises OSError."""
    import ctypes

    if os.path.exists(_FRESH_BOOT_ID):
        return
    with open(_FRESH_BOOT_ID, "w", encoding="ascii") as file:
        file.write(system.boot_id() + "\n")
    os.chmod(_FRESH_BOOT_ID, 0o444)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(_FRESH_BOOT_ID.encode(), BOOT_ID.encode(), None, _MS_BIND, None):
        raise OSError(ctypes.get_errno(), "mount")


def _new_boot_id(text: str) -> None:
    cover_boot_id()
    fd = os.open(_FRESH_BOOT_ID, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, (text + "\n").encode(), 0)  # always 37 bytes
    finally:
        os.close(fd)


def _renew_network(wanted: Params) -> None:
    """The wire leads somewhere else now: down and up again forgets routes and neighbours, under a new address of the
    card; then everything is as after a boot."""
    from _socket import AF_INET, SOCK_DGRAM
    from _socket import socket as Socket

    control = Socket(AF_INET, SOCK_DGRAM)
    try:
        device = boot.wired(wait=False).encode()
        fcntl.ioctl(control.fileno(), _SIOCSIFFLAGS, pack("16sH22x", device, 0))
        address = bytes.fromhex(wanted["mac"].replace(":", ""))
        fcntl.ioctl(control.fileno(), _SIOCSIFHWADDR, pack("16sH6s16x", device, _ARPHRD_ETHER, address))
        boot.configure(control.fileno(), wanted["address"], wanted["gateway"], wanted["dns"])
    finally:
        control.close()
