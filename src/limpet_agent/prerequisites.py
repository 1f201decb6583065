"""What a container runtime needs of its machine, in order: programs, file systems, forwarding, modules, its data.

What is there is left as it is; what cannot be had is named.
"""

from __future__ import annotations

import os

from limpet_agent import libc, mounting, system
from limpet_agent.faults import Fault, from_os
from limpet_agent.spawn import PATH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from limpet_agent.config import Config

PROGRAMS = ("dockerd", "containerd", "containerd-shim-runc-v2", "runc", "iptables")
VOLUMES = {"docker": "/var/lib/docker", "containerd": "/var/lib/containerd"}
_MOUNTS = (  # as boot.py mounts them; an image may have taken one away
    ("/sys/fs/cgroup", "cgroup2", "nosuid,nodev,noexec"),
    ("/dev/pts", "devpts", "mode=620,ptmxmode=666,gid=5"),
    ("/dev/shm", "tmpfs", "mode=1777,nosuid,nodev"),
)
_FLAGS = {"nosuid": 2, "nodev": 4, "noexec": 8}  # mount(2)
_MODULES = (
    "overlay", "bridge", "br_netfilter", "veth", "nf_tables", "nft_compat", "nft_chain_nat", "nf_conntrack",
    "xt_conntrack", "xt_addrtype", "xt_MASQUERADE", "xt_nat",
)  # fmt: skip
_FORWARDING = "/proc/sys/net/ipv4/ip_forward"
_QUOTED = 500


def obstacle(config: Config) -> Fault | None:
    """What will keep the runtime from being started, as far as a look tells: programs, the data disk."""
    missing = [name for name in PROGRAMS if not _have(name)]
    if missing:
        return Fault(
            "failed_precondition", f"the image of this sandbox has no {', '.join(missing)}",
            "limpet create --image docker",
        )  # fmt: skip
    if not os.path.ismount(config.data):
        return Fault(
            "failed_precondition", "without its data disk the sandbox has no place for images and containers",
            "limpet logs NAME says why it was not mounted",
        )  # fmt: skip
    return None


def prepare(config: Config) -> None:
    """Make the machine ready. Raises Fault(failed_precondition), naming what is missing."""
    found = obstacle(config)
    if found is not None:
        raise found
    for path, kind, options in _MOUNTS:
        _mount(path, kind, options)
    if _kinds().get("/run") != "tmpfs":
        raise Fault("failed_precondition", "/run is not a tmpfs: sockets in it would outlive a boot")
    _forward()
    _load(config)
    for name, place in VOLUMES.items():
        try:
            mounting.attach(config.data, name, place)
        except OSError as error:
            raise from_os(error, f"{place} cannot be mounted from the data disk") from None


def _have(name: str) -> bool:
    return any(os.access(f"{directory}/{name}", os.X_OK) for directory in PATH.split(":"))


def _kinds() -> dict[str, str]:
    """The file system at each mount point, the one on top."""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
        return {words[1]: words[2] for words in map(str.split, file)}


def _mount(path: str, kind: str, options: str) -> None:
    there = _kinds().get(path)
    if there == kind:
        return
    if there is not None:
        raise Fault("failed_precondition", f"{path} is a {there}, not a {kind}")
    words = options.split(",")
    flags = sum(_FLAGS.get(word, 0) for word in words)
    rest = ",".join(word for word in words if word not in _FLAGS)
    try:
        os.makedirs(path, exist_ok=True)
        libc.mount(kind.encode(), path.encode(), kind.encode(), flags, rest.encode() or None)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise Fault("failed_precondition", f"no {kind} can be mounted at {path}: {reason}") from None


def _forward() -> None:
    """Packets go from containers to the network and back."""
    if system.read(_FORWARDING).strip() == "1":
        return
    try:
        with open(_FORWARDING, "w", encoding="ascii") as file:
            file.write("1")
    except OSError as error:
        raise from_os(error, "IP forwarding cannot be switched on") from None


def _load(config: Config) -> None:
    missing = [name for name in _MODULES if not os.path.isdir("/sys/module/" + name)]
    if not missing:
        return
    said = _modprobe(config.tools + "/busybox", missing)
    missing = [name for name in missing if not os.path.isdir("/sys/module/" + name)]
    if said is not None and missing:
        raise Fault("failed_precondition", f"the kernel cannot load {', '.join(missing)}: {said[:_QUOTED]}")


def _modprobe(tool: str, names: list[str]) -> str | None:
    """Load modules; what modprobe said, None when all went well. (A module may be built in and not show.)"""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.posix_spawn(
            tool, ["modprobe", "-a", *names], {"PATH": PATH}, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 2)]
        )
    finally:
        os.close(writer)
    with open(reader, "rb") as file:
        said = file.read(64 << 10).decode(errors="replace")
    status = os.waitpid(pid, 0)[1]
    return " ".join(said.split()) or "modprobe failed" if status else None
