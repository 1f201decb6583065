"""The container engine: containerd, then dockerd, and how they are started."""

from __future__ import annotations

import os

from limpet_agent import codec, probing, system
from limpet_agent.faults import Fault
from limpet_agent.services import Service

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from limpet_agent.config import Config
    from limpet_agent.doorstep import Doorstep

_CONTAINERD = "containerd/containerd.sock"  # below /run
_SETTINGS = "/etc/docker/daemon.json"
_PID_FILE = "/var/run/docker.pid"
_CONTAINERS = "/sys/fs/cgroup/docker"  # below it all containers are
_MOST_PORTS = 256  # of one container: a message holds that many
_PATIENCE = {"containerd": 30.0, "dockerd": 60.0}  # seconds until it answers

# Kubernetes' interface (CRI) is nobody's here: it costs memory, and complains of networks that it lacks.
_CONTAINERD_SETTINGS = """version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri"]
"""
# overlay2 on Btrfs: a plain tree, so that snapshots, checkpoints and commits of @docker are whole, which with a
# subvolume for each layer they would not be. No live-restore: at its end dockerd ends the containers, in order.
_FLAGS = {  # by the key in daemon.json: dockerd takes no setting from both
    "hosts": "--host=fd://",
    "containerd": "--containerd=/run/" + _CONTAINERD,
    "storage-driver": "--storage-driver=overlay2",
    "userland-proxy": "--userland-proxy=false",
}


def services(config: Config, doorstep: Doorstep) -> list[Service]:
    """In the order in which they are started."""
    run, state = config.run + "/runtime", config.state + "/runtime"
    address = f"{config.sockets}/{_CONTAINERD}"

    def containerd() -> list[str]:
        settings = run + "/containerd.toml"
        with open(settings, "w", encoding="ascii") as file:
            file.write(_CONTAINERD_SETTINGS)
        return ["containerd", "--config", settings, "--address", address]

    return [
        Service("containerd", address, probing.check_grpc, containerd, run, state, _PATIENCE["containerd"]),
        Service("dockerd", doorstep.path, probing.ping_docker, dockerd, run, state, _PATIENCE["dockerd"], doorstep),
    ]


def dockerd() -> list[str]:
    """How to start it, with what the user's own settings leave open."""
    _drop_stale_pid_file(_PID_FILE)
    theirs = settings(_SETTINGS)
    return ["dockerd", *(flag for key, flag in _FLAGS.items() if key not in theirs)]


def settings(path: str) -> dict[str, Any]:
    """The user's settings; none when there are none. What is wrong with the file dockerd says better."""
    try:
        return codec.loads(system.read(path, 1 << 20).encode())
    except Fault:
        return {}


def _drop_stale_pid_file(path: str) -> None:
    """After a kill it names a process that is gone, or by now another one: dockerd would take that for itself."""
    pid = system.read(path).strip()
    if pid.isdigit() and system.read(f"/proc/{pid}/comm").strip() != "dockerd":
        os.unlink(path)


def kill_containers() -> bool:
    """End what an engine left running: it was killed, or told to keep its containers alive. Whether there was any."""
    if "populated 1" not in system.read(_CONTAINERS + "/cgroup.events"):
        return False
    with open(_CONTAINERS + "/cgroup.kill", "w", encoding="ascii") as file:
        file.write("1")
    return True


def version(socket: str) -> str | None:
    """The version of a dockerd that answers."""
    try:
        found = probing.docker(socket, "/version", probing.PATIENCE)
    except Fault:
        return None
    version = found.get("Version") if isinstance(found, dict) else None
    return version[:64] if isinstance(version, str) else None


def containers(socket: str) -> list[dict[str, Any]]:
    """All containers, running ones first, as the host wants them. Raises Fault."""
    found = probing.docker(socket, "/containers/json?all=1")
    listed = [_container(each) for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    return sorted(listed, key=lambda each: each["state"] != "running")


def _container(found: dict[str, Any]) -> dict[str, Any]:
    names = found.get("Names") or [""]
    ports = [
        {"ip": port.get("IP", ""), "public": port["PublicPort"], "private": port["PrivatePort"],
         "protocol": port.get("Type", "tcp")}
        for port in found.get("Ports") or [] if port.get("PublicPort")
    ]  # fmt: skip
    return {
        "id": found["Id"], "name": names[0].lstrip("/")[:256], "image": str(found.get("Image", ""))[:256],
        "state": str(found.get("State", "")), "ports": ports[:_MOST_PORTS],
    }  # fmt: skip
