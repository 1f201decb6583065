"""What PID 1 does to the machine: the rest of the boot that the initramfs left, and switching it off.

Nothing here may keep the agent waiting: system calls only, and one background shell for mounts (Python has no
mount(2), and importing ctypes takes longer than forking).
"""

from __future__ import annotations

import os
import time
from struct import pack

from limpet_agent.agentlog import Log
from limpet_agent.config import Config
from limpet_agent.signals import native as signal

# Write back early: what a killed machine may lose is what was dirtied within both of these and the second after which
# the file systems commit (commit=1), together less than two (D2 in docs/durability.md).
_SYSCTLS = {
    "vm/dirty_expire_centisecs": "25",
    "vm/dirty_writeback_centisecs": "25",
}
_MOUNTS = (  # what the initramfs may have left to us
    ("/dev/pts", "devpts", "mode=620,ptmxmode=666,gid=5"),
    ("/dev/shm", "tmpfs", "mode=1777,nosuid,nodev"),
    ("/sys/fs/cgroup", "cgroup2", "nosuid,nodev,noexec"),
)
_LINKS = (  # what programs expect in /dev and the kernel does not make
    ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2"),
)  # fmt: skip
_GRACE = 1.5  # seconds that processes get between SIGTERM and SIGKILL at power-off
_SIOCADDRT, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x890B, 0x8914, 0x8916, 0x891C  # netdevice(7)
_IFF_UP, _IFF_RUNNING, _RTF_UP_GATEWAY = 1, 0x40, 3
_AF_INET = 2


def prepare(config: Config) -> None:
    """Bring the machine from where the initramfs left it to where commands can run. Raises nothing."""
    log = Log(config.log)
    for step in (_directories, _mounts, _sysctls, _protect, _identity, _network):
        try:
            step(config)
        except (OSError, ValueError) as error:
            log("boot step failed", step=step.__name__, error=repr(error))


def _directories(config: Config) -> None:
    for path in (config.state, config.run):
        os.makedirs(path, 0o755, exist_ok=True)
    for name, target in _LINKS:
        if not os.path.lexists("/dev/" + name):
            os.symlink(target, "/dev/" + name)
    os.chdir("/")
    os.umask(0o022)
    os.environ.clear()


def _mounts(config: Config) -> None:
    with open("/proc/mounts", encoding="utf-8", errors="replace") as file:
        mounted = {line.split()[1] for line in file}
    wanted = [entry for entry in _MOUNTS if entry[0] not in mounted]
    if wanted:
        tool = config.tools + "/busybox"
        script = ";".join(f"{tool} mkdir -p {path}; {tool} mount -t {kind} -o {options} {kind} {path}"
                          for path, kind, options in wanted)  # fmt: skip
        os.posix_spawn(tool, ["busybox", "sh", "-c", script], {"PATH": config.tools})


def _sysctls(_config: Config) -> None:
    for name, value in _SYSCTLS.items():
        _write("/proc/sys/" + name, value)


def _protect(_config: Config) -> None:
    _write("/proc/self/oom_score_adj", "-1000")  # inherited by the agent; commands set it back


def _identity(_config: Config) -> None:
    told = parameters()
    if told.get("limpet.hostname"):
        become(told["limpet.hostname"])
    if told.get("limpet.machine_id"):
        be_machine(told["limpet.machine_id"])


def become(name: str) -> None:
    """Be called `name`. Raises OSError."""
    _write("/proc/sys/kernel/hostname", name)
    _replace("/etc/hostname", name + "\n")  # makes /etc if need be
    _name_in_hosts(name)


def be_machine(machine_id: str) -> None:
    """Have this machine-id (machine-id(5)). What was another machine's goes with its id: ssh host keys are made anew
    where there is a server for them, beside the boot. Raises OSError."""
    before = _text("/etc/machine-id").strip()
    if before == machine_id:
        return
    _replace("/etc/machine-id", machine_id + "\n", 0o444)
    if os.path.isfile("/var/lib/dbus/machine-id") and not os.path.islink("/var/lib/dbus/machine-id"):
        _replace("/var/lib/dbus/machine-id", machine_id + "\n", 0o444)
    keys = [name for name in _entries("/etc/ssh") if name.startswith("ssh_host_") and "_key" in name]
    for name in keys:
        os.unlink("/etc/ssh/" + name)
    if os.path.exists("/usr/bin/ssh-keygen") and os.path.exists("/etc/ssh/sshd_config"):
        script = "(ssh-keygen -A; pkill -HUP -x sshd) &"  # an orphan, which PID 1 reaps
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", script], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
        os.waitpid(pid, 0)


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return ""


def _replace(path: str, text: str, mode: int = 0o644) -> None:
    """Write a small file; unchanged content is left alone. In place: a block is written whole or not at all, and under
    emulation making a file anew costs five times more. Shortened only then, never to nothing, which ext4 would take
    for a reason to write at once."""
    content = text.encode("utf-8", "surrogateescape")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        before = os.read(fd, 1 << 20)
        if before != content:
            os.pwrite(fd, content, 0)
            if len(before) > len(content):
                os.ftruncate(fd, len(content))
    finally:
        os.close(fd)


def _name_in_hosts(name: str, path: str = "/etc/hosts") -> None:
    """The machine's own name resolves without a name server, as Debian has it: 127.0.1.1. Other lines stay."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        lines = ["127.0.0.1 localhost", "::1 localhost"]
    wanted = [line for line in lines if line.split()[:1] != ["127.0.1.1"]] + [f"127.0.1.1 {name}"]
    _replace(path, "\n".join(wanted) + "\n")


def _network(_config: Config) -> None:
    from _socket import AF_INET, SOCK_DGRAM
    from _socket import socket as Socket

    control = Socket(AF_INET, SOCK_DGRAM)
    try:
        _interface_up(control.fileno(), "lo")
        wanted = parameters().get("limpet.net", "").split(",")
        if len(wanted) == 3:
            configure(control.fileno(), *wanted)
    finally:
        control.close()


def configure(control: int, cidr: str, gateway: str, dns: str) -> None:
    """Give the wired interface its address, the way out and the name server, and switch it on. Raises OSError."""
    import fcntl

    address, _, bits = cidr.partition("/")
    mask = (0xFFFFFFFF << (32 - int(bits or 24)) & 0xFFFFFFFF).to_bytes(4, "big")
    device = wired()
    fcntl.ioctl(control, _SIOCSIFADDR, pack("16s16s8x", device.encode(), _socket_address(_quad(address))))
    fcntl.ioctl(control, _SIOCSIFNETMASK, pack("16s16s8x", device.encode(), _socket_address(mask)))
    _interface_up(control, device)
    # struct rtentry (linux/route.h): pad, destination, gateway, netmask, flags; the rest zero
    nowhere = _socket_address(bytes(4))
    route = pack("8x16s16s16sH62x", nowhere, _socket_address(_quad(gateway)), nowhere, _RTF_UP_GATEWAY)
    fcntl.ioctl(control, _SIOCADDRT, route)
    if os.path.islink("/etc/resolv.conf"):
        os.unlink("/etc/resolv.conf")
    _write("/etc/resolv.conf", f"nameserver {dns}\n", os.O_CREAT | os.O_TRUNC)


def wired(*, wait: bool = True) -> str:
    """The first interface that is not loopback; it appears a moment after its module. Raises OSError."""
    for _ in range(200 if wait else 1):
        names = sorted(set(os.listdir("/sys/class/net")) - {"lo"})
        if names:
            return names[0]
        time.sleep(0.01)
    raise OSError("no network interface")


def _interface_up(control: int, device: str) -> None:
    import fcntl

    fcntl.ioctl(control, _SIOCSIFFLAGS, pack("16sH22x", device.encode(), _IFF_UP | _IFF_RUNNING))


def _socket_address(address: bytes) -> bytes:
    return pack("=H2x4s8x", _AF_INET, address)


def _quad(text: str) -> bytes:
    return bytes(int(part) for part in text.split("."))


def parameters() -> dict[str, str]:
    """The kernel command line's key=value words."""
    with open("/proc/cmdline", encoding="utf-8", errors="replace") as file:
        return dict(word.split("=", 1) for word in file.read().split() if "=" in word)


def _write(path: str, text: str, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def poweroff(config: Config, groups: list[int], agent: int) -> None:
    """End all processes, get everything onto the disks, switch off. Never returns. Bounded by
    `_GRACE` and the disks."""
    Log(config.log)("power off")
    if config.local:
        _end_groups(groups, agent)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGCONT):  # interactive shells end on SIGHUP only
        _signal_all(number)
    deadline = time.monotonic() + _GRACE
    while _children_left() and time.monotonic() < deadline:
        time.sleep(0.005)
    _signal_all(signal.SIGKILL)
    os.sync()
    _remount_read_only()
    try:
        os.execve(config.tools + "/busybox", ["busybox", "poweroff", "-n", "-f"], {})
    except OSError:
        _write("/proc/sysrq-trigger", "o")
    while True:
        time.sleep(1)


def _end_groups(groups: list[int], agent: int) -> None:
    """The ordinary process's way to go."""
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except OSError:
            pass
    if agent:
        os.kill(agent, signal.SIGKILL)
    os._exit(0)


def _signal_all(number: int) -> None:
    try:
        os.kill(-1, number)
    except ProcessLookupError:
        pass


def _children_left() -> bool:
    """Whether any process is left; every orphan is a child of PID 1."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _remount_read_only() -> None:
    """Emergency remount (sysrq 'u'): leaves clean file systems; it runs in the background, so wait for it a little."""
    try:
        _write("/proc/sysrq-trigger", "u")
        for _ in range(100):
            with open("/proc/mounts", encoding="utf-8", errors="replace") as file:
                rows = [line.split() for line in file]
            if not any(row[2] in ("ext4", "btrfs") and "rw" in row[3].split(",") for row in rows):
                return
            time.sleep(0.005)
    except OSError:
        pass
