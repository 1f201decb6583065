"""Where a host directory really is: under which names it can be reached, what it is mounted on, whether it can be a
payload at all.

A directory is known by (device, path within the file system), which /proc/self/mountinfo (proc(5)) tells for every
mount: two bind mounts of one directory, or of a parent and a child, are seen to overlap although no path says so.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from limpet.errors import BadRequest, FailedPrecondition
from limpet.paths import Paths

_ESCAPED = re.compile(rb"\\([0-7]{3})")
_PASSING = {"tmpfs", "ramfs"}  # nothing survives a reboot there
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph"}
_SYSTEM = (
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr",
)  # fmt: skip
_WHOLE = ("/", "/home", "/workspace", "/root", "/var", "/tmp", "/opt", "/srv", "/mnt", "/media")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo: `root` of the file system on `device` is seen at `point`."""

    device: str
    root: bytes
    point: bytes
    kind: str


def mounts() -> list[Mount]:
    """The mounts that this process sees, in order: a later one covers an earlier one at the same point."""
    return parse_mounts(Path("/proc/self/mountinfo").read_bytes())


def parse_mounts(text: bytes) -> list[Mount]:
    found = []
    for line in text.splitlines():
        before, _, after = line.partition(b" - ")
        words, kind = before.split(b" "), after.split(b" ")[0]
        found.append(Mount(words[2].decode(), _plain(words[3]), _plain(words[4]), kind.decode()))
    return found


def mount_of(path: Path, table: Iterable[Mount]) -> Mount:
    """The mount that a resolved path is on."""
    name = os.fsencode(path)
    within = [mount for mount in table if _below(name, mount.point)]
    longest = max(len(mount.point) for mount in within)
    return [mount for mount in within if len(mount.point) == longest][-1]


def aliases(path: Path, table: list[Mount] | None = None) -> list[Path]:
    """All names under which a resolved path can be reached through this system's mounts, itself among them."""
    table = mounts() if table is None else table
    mount = mount_of(path, table)
    inner = _join(mount.root, os.fsencode(path)[len(mount.point.rstrip(b"/")) :])
    found = {path}
    for other in table:
        if other.device == mount.device and _below(inner, other.root):
            found.add(Path(os.fsdecode(_join(other.point, inner[len(other.root.rstrip(b"/")) :]))))
    return sorted(found)


def ancestors(path: Path) -> list[Path]:
    """Every directory that contains a resolved path, under all names that it has."""
    found = {parent for alias in aliases(path) for parent in alias.parents}
    return sorted(found, key=lambda parent: -len(parent.parts))


def overlap(a: Path, b: Path) -> bool:
    """Whether two resolved paths are the same directory or one contains the other, by whatever names."""
    if a == b or a in b.parents or b in a.parents:
        return True
    return any(_same(a, other) for other in (b, *ancestors(b))) or any(_same(b, other) for other in ancestors(a))


def check_host(text: str, paths: Paths) -> Path:
    """The resolved host directory of a payload. Raises BadRequest or FailedPrecondition for one that cannot be."""
    if not text.startswith("/"):
        raise BadRequest(f"{text!r} is not an absolute path", hint="give the host directory from / on")
    try:
        path = Path(text).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be reached ({error})"
        raise BadRequest(f"{text} {reason}", hint=f"mkdir -p {text}") from None
    if not path.is_dir():
        raise BadRequest(f"{text} is not a directory", hint="a payload is a directory; give the one that it lies in")
    _check_kind(path, paths)
    _check_mounts(path)
    _check_rights(path)
    return path


def warning(path: Path) -> str | None:
    """Why what is published there may not survive, or None."""
    kind = mount_of(path, mounts()).kind
    if kind in _PASSING:
        return f"{path} is on {kind}: a reboot of the host loses it (the generations in the vault stay)"
    if kind in _REMOTE:
        return f"{path} is on {kind}: whether it is durable, and whether others write there, limpet cannot tell"
    return None


def check_guest(text: str) -> str:
    """The normalised guest directory of a payload. Raises BadRequest."""
    if not text.startswith("/") or "\0" in text or ".." in text.split("/"):
        raise BadRequest(f"{text!r} is not an absolute path in the guest", hint="for example /workspace/data")
    path = posixpath.normpath(text).replace("//", "/")
    if path in _WHOLE or any(path == system or path.startswith(system + "/") for system in _SYSTEM):
        raise BadRequest(f"{path} in the guest cannot be a payload", hint="for example /workspace/data")
    return path


def guest_overlap(a: str, b: str) -> bool:
    """Whether two guest directories are the same or one contains the other."""
    return a == b or a.startswith(b + "/") or b.startswith(a + "/")


def _check_kind(path: Path, paths: Paths) -> None:
    home = Path("~").expanduser().resolve()
    if path == Path("/") or path == home:
        raise BadRequest(f"{path} cannot be a payload: everything you have is in it", hint="give a directory in it")
    for root in (paths.data, paths.cache, paths.run):
        if overlap(path, root.resolve()):
            raise BadRequest(
                f"{path} overlaps with {root}, where limpet keeps its own files", hint="give another directory"
            )


def _check_mounts(path: Path) -> None:
    name = os.fsencode(path)
    for mount in mounts():
        if mount.point == name:
            raise BadRequest(
                f"{path} is a mount point: it cannot be replaced in one step", hint="give a directory within it"
            )
        if _below(mount.point, name):
            raise BadRequest(
                f"{os.fsdecode(mount.point)} is mounted inside {path}", hint="unmount it, or give another directory"
            )


def _check_rights(path: Path) -> None:
    if os.geteuid() not in (0, path.stat().st_uid):
        raise FailedPrecondition(f"{path} belongs to another user", hint="give a directory of your own")
    for directory in (path, path.parent):
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            why = "" if directory == path else f" (new versions of {path.name} are made beside it)"
            raise FailedPrecondition(f"{directory} is not writable{why}", hint=f"chmod u+rwx {directory}")


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def _below(path: bytes, directory: bytes) -> bool:
    """Whether `path` is `directory` or in it."""
    return directory == b"/" or path == directory or path.startswith(directory + b"/")


def _join(directory: bytes, rest: bytes) -> bytes:
    joined = directory.rstrip(b"/") + b"/" + rest.lstrip(b"/")
    return joined.rstrip(b"/") or b"/"


def _plain(word: bytes) -> bytes:
    return _ESCAPED.sub(lambda octal: bytes([int(octal[1], 8)]), word)
