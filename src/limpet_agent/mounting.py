"""Volumes for payloads: a subvolume of the data disk at a place that the host names.

The mount is a bind of the subvolume's directory. It outlives the agent, and a memory image has it; after a boot the
host asks for it again.
"""

from __future__ import annotations

import errno
import os

from limpet_agent import btrfs, files, libc
from limpet_agent.faults import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from limpet_agent.volumes import Volumes
    from limpet_agent.workers import Worker

    Params = dict[str, Any]

_MS_BIND = 0x1000  # mount(2)
_UMOUNT_NOFOLLOW = 8  # umount2(2)
_MOST_NAMED = 5


def mounts(top: str) -> list[tuple[str, str]]:
    """What of the file system at `top` is mounted, and where: (path in the file system, mount point), the oldest
    first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        rows = [line.split(" ")[2:5] for line in file]
    devices = [device for device, _root, place in rows if _plain(place) == top]
    return [(_plain(root), _plain(place)) for device, root, place in rows if device in devices[-1:]]


def _plain(text: str) -> str:
    """A name as mountinfo has it: space, tab, newline and backslash as octal escapes."""
    if "\\" not in text:
        return text
    first, *rest = text.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def create(volumes: Volumes, worker: Worker, params: Params) -> None:
    """vol.create: again is no error"""
    name, place = _payload(params), files.path_of(params, "mount")
    uid, gid = files.number(params, "uid") or 0, files.number(params, "gid") or 0
    volumes.require_disk()
    worker.send_message({"created": attach(volumes.top, name, place, uid, gid)})


def attach(top: str, name: str, place: str, uid: int = 0, gid: int = 0) -> bool:
    """See that the subvolume `@name` of the file system at `top` is there, mounted at `place`; whether it is new.
    Raises Fault(failed_precondition) when something else is there, OSError."""
    place = os.path.realpath(place)
    root = f"/@{name}"
    found = [path for what, path in mounts(top) if what == root]
    if found and found != [place]:
        raise Fault("failed_precondition", f"{name} is mounted at {found[0]} already")
    if not found:
        _require_free(place)
    created = not os.path.isdir(top + root)
    if created:
        _make(top, root[1:], uid, gid)
    if not found:
        files.make_directories(place, None)
        libc.mount((top + root).encode(), os.fsencode(place), flags=_MS_BIND)
    return created


def _payload(params: Params) -> str:
    from limpet_agent.volumes import name_of

    name = name_of(params)
    if "-" not in name:
        raise Fault("bad_request", f"{name} is not the volume of a payload")
    return name


def _require_free(place: str) -> None:
    """Raises Fault when something is at `place` that a mount would hide."""
    try:
        full = os.path.ismount(place) or bool(os.listdir(place))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise Fault("failed_precondition", f"{place} is not a directory") from None
    if full:
        raise Fault("failed_precondition", f"{place} is not empty", "choose a directory that is not there yet")


def _make(top: str, name: str, uid: int, gid: int) -> None:
    directory = btrfs.open_directory(top)
    try:
        btrfs.create(directory, name)
    finally:
        os.close(directory)
    os.chown(f"{top}/{name}", uid, gid)


def remove(volumes: Volumes, worker: Worker, params: Params) -> None:
    """vol.remove: again is no error"""
    name = _payload(params)
    volumes.require_disk()
    root = f"/@{name}"
    for what, place in reversed(mounts(volumes.top)):
        if what == root or what.startswith(root + "/"):
            _unmount(place)
    volumes.drop_snapshots(name, set())
    removed = os.path.isdir(volumes.top + root)
    if removed:
        _destroy(volumes.top, root[1:])
    worker.send_message({"removed": removed})


def _unmount(place: str) -> None:
    device = os.stat(place).st_dev
    try:
        libc.unmount(os.fsencode(place), _UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        users = _users(device)
        told = ", ".join(users[:_MOST_NAMED]) + (" …" if len(users) > _MOST_NAMED else "")
        raise Fault("failed_precondition", f"{place} is in use by {told or 'a mount below it'}") from None


def _users(device: int) -> list[str]:
    """The processes that have something open on a device or stand in it, as `name (pid)`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root", f"/proc/{pid}/exe"]
        try:
            links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                name = file.read().strip()
        except OSError:  # it has ended
            continue
        if any(_lies_on(link, device) for link in links):
            found.append(f"{name} ({pid})")
    return found


def _lies_on(link: str, device: int) -> bool:
    try:
        return os.stat(link).st_dev == device
    except OSError:
        return False


def _destroy(top: str, name: str) -> None:
    directory = btrfs.open_directory(top)
    try:
        btrfs.destroy(directory, name)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise Fault("failed_precondition", f"there are other subvolumes in {name}") from None
        raise
    finally:
        os.close(directory)
