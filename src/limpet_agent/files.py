"""File operations. Each runs in a thread of its own, as root, and answers through a Worker; OSErrors become faults.

Paths are absolute; bytes that are not UTF-8 travel as surrogate escapes.
"""

from __future__ import annotations

import errno
import os
import stat as modes
from mmap import mmap

from limpet_agent import users
from limpet_agent.faults import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from limpet_agent.workers import Worker

    Params = dict[str, Any]

_CHUNK = 256 << 10
_BATCH = 500
_BATCH_BYTES = 40 << 10
_ZEROS = bytes(1 << 20)
_BLOCK = 4096  # what direct I/O wants offsets and lengths to be multiples of
_TYPES = {
    modes.S_IFREG: "file", modes.S_IFDIR: "directory", modes.S_IFLNK: "symlink", modes.S_IFIFO: "fifo",
    modes.S_IFSOCK: "socket", modes.S_IFBLK: "block", modes.S_IFCHR: "char",
}  # fmt: skip


def path_of(params: Params, key: str = "path") -> str:
    """The absolute path in `params`. Raises Fault(bad_request)."""
    path = params.get(key)
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise Fault("bad_request", f"{key} must be an absolute path, not {path!r}")
    return os.path.normpath("/" + path.lstrip("/"))


def number(params: Params, key: str) -> int | None:
    """An optional number of at least 0. Raises Fault(bad_request)."""
    value = params.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise Fault("bad_request", f"{key} must be a number")
    return value


def owner_of(params: Params, key: str = "user") -> users.User | None:
    """The account that `params` names, if it names one. Raises Fault(not_found)."""
    name = params.get(key)
    return users.find(str(name)) if name is not None else None


def info(path: str, follow: bool = False) -> dict[str, Any]:
    """The host's models.FileInfo."""
    found = os.stat(path) if follow else os.lstat(path)
    return describe(path, found)


def describe(path: str, found: os.stat_result) -> dict[str, Any]:
    """`info` when the status is known already."""
    kind = _TYPES.get(modes.S_IFMT(found.st_mode), "file")
    target = None
    if kind == "symlink":
        try:
            target = os.readlink(path)
        except OSError:
            pass
    return {
        "path": path, "type": kind, "size": found.st_size, "mode": modes.S_IMODE(found.st_mode), "uid": found.st_uid,
        "gid": found.st_gid, "mtime_ns": found.st_mtime_ns, "target": target,
    }  # fmt: skip


def stat(worker: Worker, params: Params) -> None:
    """fs.stat"""
    worker.send_message({"info": info(path_of(params), follow=bool(params.get("follow", True)))})


def list_directory(worker: Worker, params: Params) -> None:
    """fs.list: in batches that fit a message."""
    path = path_of(params)
    with os.scandir(path) as found:
        names = sorted(entry.name for entry in found)
    batch: list[dict[str, Any]] = []
    size = 0
    for name in names:
        try:
            entry = info(os.path.join(path, name))
        except FileNotFoundError:  # gone since
            continue
        cost = 250 + 6 * (len(entry["path"]) + len(entry["target"] or ""))
        if len(batch) >= _BATCH or size + cost > _BATCH_BYTES:
            worker.send_message({"entries": batch})
            batch, size = [], 0
        batch.append(entry)
        size += cost
    worker.send_message({"entries": batch})


def read(worker: Worker, params: Params) -> None:
    """fs.read"""
    path = path_of(params)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        found = os.fstat(fd)
        if not modes.S_ISREG(found.st_mode):
            kind = _TYPES.get(modes.S_IFMT(found.st_mode), "special file")
            raise Fault("failed_precondition", f"{path}: is a {kind}, not a file")
        worker.send_message({"info": describe(path, found)})
        os.lseek(fd, number(params, "offset") or 0, os.SEEK_SET)
        left = number(params, "length")
        while left is None or left > 0:
            data = os.read(fd, _CHUNK if left is None else min(_CHUNK, left))
            if not data:
                break
            if left is not None:
                left -= len(data)
            worker.send(data)
    finally:
        os.close(fd)


def write(worker: Worker, params: Params) -> None:
    """fs.write: a temporary file beside the target takes its place when it is whole and on the disk."""
    path = os.path.realpath(path_of(params))
    directory, name = os.path.split(path)
    user = owner_of(params)
    for key in ("mode", "uid", "gid", "mtime_ns"):
        number(params, key)  # refuse before anything is sent
    if params.get("make_parents"):
        make_directories(directory, user)
    if os.path.isdir(path):
        raise Fault("failed_precondition", f"{path}: is a directory")
    temporary = f"{directory}/.{name[:200]}.{os.urandom(4).hex()}.limpet"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            _Landing(temporary, fd).copy(worker)
            _dress(fd, path, params, user)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        _unlink(temporary)
        raise
    sync_directory(directory)
    worker.send_message({"info": info(path)})


class _Landing:
    """Where the bytes of a file land. Pieces of zeros become holes. Whole aligned pieces (from the intake disk, in
    page-aligned memory) bypass the page cache: under emulation a copy through it costs more than all the rest."""

    def __init__(self, path: str, fd: int) -> None:
        self._fd = fd
        self._size = 0
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # a file system without direct I/O
            self._direct = -1

    def copy(self, worker: Worker) -> None:
        """Take all that the host sends."""
        try:
            while (data := worker.receive()) is not None:
                if data != memoryview(_ZEROS)[: len(data)]:
                    self._put(memoryview(data))
                self._size += len(data)
            os.ftruncate(self._fd, self._size)
        finally:
            if self._direct >= 0:
                os.close(self._direct)

    def _put(self, data: memoryview) -> None:
        at = self._size
        if self._direct >= 0 and isinstance(data.obj, mmap) and not (at | len(data)) % _BLOCK:
            try:
                taken = os.pwrite(self._direct, data, at)
                data, at = data[taken:], at + taken
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        while data:
            taken = os.pwrite(self._fd, data, at)
            data, at = data[taken:], at + taken


def _dress(fd: int, path: str, params: Params, user: users.User | None) -> None:
    """Owner, mode and time: what was asked for, else what the old file had, else the directory's owner and 0644."""
    try:
        old: os.stat_result | None = os.lstat(path)
    except FileNotFoundError:
        old = None
    uid, gid, mode = number(params, "uid"), number(params, "gid"), number(params, "mode")
    if user is not None:
        uid, gid = user.uid if uid is None else uid, user.gid if gid is None else gid
    if old is not None:
        uid, gid = old.st_uid if uid is None else uid, old.st_gid if gid is None else gid
        mode = modes.S_IMODE(old.st_mode) if mode is None else mode
    elif uid is None:
        place = os.stat(os.path.dirname(path))
        uid, gid = place.st_uid, place.st_gid if gid is None else gid
    if os.geteuid() == 0:
        os.fchown(fd, -1 if uid is None else uid, -1 if gid is None else gid)
    os.fchmod(fd, 0o644 if mode is None else mode & 0o7777)
    mtime = number(params, "mtime_ns")
    if mtime is not None:
        os.utime(fd, ns=(mtime, mtime))


def make_directory(worker: Worker, params: Params) -> None:
    """fs.mkdir"""
    path, user, mode = path_of(params), owner_of(params), number(params, "mode")
    if params.get("parents"):
        make_directories(os.path.dirname(path), user)
    try:
        _mkdir(path, user, mode)
    except FileExistsError:
        if not (params.get("parents") and os.path.isdir(path)):
            raise
    worker.send_message({"info": info(path, follow=True)})


def make_directories(path: str, user: users.User | None) -> None:
    """`mkdir -p`; what is made belongs to `user`."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        try:
            _mkdir(directory, user, None)
        except FileExistsError:
            if not os.path.isdir(directory):
                raise


def _mkdir(path: str, user: users.User | None, mode: int | None) -> None:
    os.mkdir(path, 0o755)
    if mode is not None:
        os.chmod(path, mode & 0o7777)
    if os.geteuid() == 0:
        place = os.stat(os.path.dirname(path) or "/")  # without a user: whoever the directory around it belongs to
        os.chown(path, *((place.st_uid, place.st_gid) if user is None else (user.uid, user.gid)))


def rename(worker: Worker, params: Params) -> None:
    """fs.rename"""
    source, target = path_of(params, "source"), path_of(params, "target")
    os.rename(source, target)
    sync_directory(os.path.dirname(target))
    worker.send_message({"ok": True})


def remove(worker: Worker, params: Params) -> None:
    """fs.remove"""
    path = path_of(params)
    if path == "/":
        raise Fault("bad_request", "/ cannot be removed")
    if params.get("recursive"):
        remove_tree(path)
    elif modes.S_ISDIR(os.lstat(path).st_mode):
        os.rmdir(path)
    else:
        os.unlink(path)
    worker.send_message({"ok": True})


def remove_tree(path: str) -> None:
    """Remove a path and what is below it, following no symbolic links; stays on one file system."""
    found = os.lstat(path)
    if not modes.S_ISDIR(found.st_mode):
        os.unlink(path)
        return
    for root, directories, files, here in os.fwalk(path, topdown=False):
        if os.fstat(here).st_dev != found.st_dev:
            raise Fault("busy", f"{root}: another file system is mounted there")
        for name in files:
            os.unlink(name, dir_fd=here)
        for name in directories:
            if modes.S_ISLNK(os.stat(name, dir_fd=here, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=here)
            else:
                os.rmdir(name, dir_fd=here)
    os.rmdir(path)


def sync_directory(path: str) -> None:
    """Make a rename in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def sync(worker: Worker, _params: Params) -> None:
    """sync: all file systems."""
    os.sync()
    worker.send_message({"ok": True})


def pack(worker: Worker, params: Params) -> None:
    """fs.pack"""
    from limpet_agent import tarwrite

    path, exclude = path_of(params), params.get("exclude") or []
    if not isinstance(exclude, list) or not all(isinstance(one, str) for one in exclude):
        raise Fault("bad_request", "exclude must be a list of relative paths")
    worker.send_message({"info": info(path)})
    tarwrite.pack(path, frozenset(one.strip("/") for one in exclude), worker.send)


def unpack(worker: Worker, params: Params) -> None:
    """fs.unpack: into a directory; with replace="rename" what was there goes when all has come."""
    from limpet_agent import tarread

    path, owner = path_of(params), owner_of(params, "owner")
    if params.get("replace") != "rename":
        make_directories(path, owner)
        files, size = tarread.unpack(worker.receive, path, owner)
    else:
        files, size = _unpack_replacing(worker, path, owner)
    os.sync()
    worker.send_message({"files": files, "bytes": size})


def _unpack_replacing(worker: Worker, path: str, owner: users.User | None) -> tuple[int, int]:
    from limpet_agent import tarread

    mounted = os.path.ismount(path)  # a mount point cannot be renamed: exchange what is in it
    home = path if mounted else os.path.dirname(path)
    make_directories(home, None)
    staging = f"{home}/.limpet-{os.urandom(6).hex()}"
    fresh, old = staging + "-new", staging + "-old"
    try:
        _mkdir(fresh, owner, None)
        counted = tarread.unpack(worker.receive, fresh, owner)
        os.sync()
        if mounted:
            os.mkdir(old, 0o700)
            for name in os.listdir(path):
                if not name.startswith(os.path.basename(staging)):
                    os.rename(f"{path}/{name}", f"{old}/{name}")
            for name in os.listdir(fresh):
                os.rename(f"{fresh}/{name}", f"{path}/{name}")
        else:
            if os.path.lexists(path):
                os.rename(path, old)
            os.rename(fresh, path)
    finally:
        for leftover in (fresh, old):
            if os.path.lexists(leftover):
                remove_tree(leftover)
    return counted


OPERATIONS: dict[str, Callable[[Worker, Params], None]] = {
    "stat": stat, "list": list_directory, "read": read, "write": write, "mkdir": make_directory, "rename": rename,
    "remove": remove, "pack": pack, "unpack": unpack, "sync": sync,
}  # fmt: skip
