"""Volumes: the subvolumes of the data disk that the host keeps generations of.

    /run/limpet/data/            the file system's top
      @home, @workspace          made with the disk, mounted at the boot
      @payload-0a1b2c3d          made by the host and mounted where it says, see mounting.py
      .snapshots/home.TOKEN      read-only: what was sent, and what the next difference is taken from

A volume's name is its subvolume's without the `@`. Nothing is remembered here: what is true is what the file system
says, so an agent that died, a restored memory and a crashed host all find what there is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from _thread import allocate_lock, start_new_thread

from limpet_agent import btrfs
from limpet_agent.faults import Fault, from_os
from limpet_agent.watching import Watching

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from limpet_agent.loop import Loop
    from limpet_agent.streams import Stream
    from limpet_agent.workers import Worker

    Params = dict[str, Any]

_OWN = ("home", "workspace")
_PAYLOAD = "payload-"
_HEX = "0123456789abcdef"
_TOKEN = "abcdefghijklmnopqrstuvwxyz0123456789-"
_CHUNK = 256 << 10
_PIPE = 1 << 20  # bytes: the kernel writes on while the host takes what came before
_SMALL, _LET_GATHER = 64 << 10, 0.002  # bytes, seconds: the kernel writes a command at a time
_POLL = 1.0  # seconds: a look costs 1 ms under emulation
_SLOWEST_POLL = 60.0
_MOST = 256  # snapshots of a volume that are told of, or deleted, at a time: as many as fit a message


def name_of(params: Params, key: str = "name") -> str:
    """The volume that `params` names. Raises Fault(bad_request)."""
    return checked(params.get(key))


def checked(name: object) -> str:
    """A volume's name. Raises Fault(bad_request)."""
    if isinstance(name, str):
        digits = name.removeprefix(_PAYLOAD)
        if name in _OWN or (name.startswith(_PAYLOAD) and len(digits) == 8 and not digits.strip(_HEX)):
            return name
    raise Fault("bad_request", f"{name!r} is not a volume", f"{', '.join(_OWN)} or {_PAYLOAD} and 8 hex digits")


def token_of(value: object) -> str:
    """A snapshot's token. Raises Fault(bad_request)."""
    if not isinstance(value, str) or not _is_token(value):
        raise Fault("bad_request", f"{value!r} is not a token of a snapshot")
    return value


def _is_token(text: str) -> bool:
    return 0 < len(text) <= 64 and not text.strip(_TOKEN)


class Volumes:
    """The operations `vol.…`. `top` is where the whole file system is mounted."""

    def __init__(self, loop: Loop, top: str, log: Callable[..., None]) -> None:
        self.top = top
        self.snapshots = top + "/.snapshots"
        self._watching = Watching(loop, top, log)
        self.operations: dict[str, Callable[[Worker, Params], None]] = {
            "state": self.state, "snapshot": self.snapshot, "send": self.send, "forget": self.forget,
            "create": self.create, "remove": self.remove,
        }  # fmt: skip

    def watch(self, stream: Stream, params: Params) -> None:
        """vol.watch: one answer, as soon as one volume has changed. For the loop's thread."""
        since, poll = params.get("since"), params.get("poll", _POLL)
        if not isinstance(since, dict) or not since or not all(isinstance(each, int) for each in since.values()):
            raise Fault("bad_request", "since must say for each volume after which transaction")
        if not isinstance(poll, (int, float)) or not 0 < poll <= _SLOWEST_POLL:
            raise Fault("bad_request", f"poll must be between 0 and {_SLOWEST_POLL:g} seconds")
        known = {checked(name): ctransid for name, ctransid in since.items()}
        for name in known:
            self.require(name)
        self._watching.begin(stream, known, poll)

    def state(self, worker: Worker, _params: Params) -> None:
        """vol.state: one message for each volume"""
        from limpet_agent import mounting

        self.require_disk()
        mounts = mounting.mounts(self.top)
        for entry in btrfs.subvolumes(self.top):
            name = entry[1:]
            if entry[:1] == "@" and _is(name):
                mount = next((path for root, path in mounts if root == f"/{entry}"), None)
                facts = _facts(f"{self.top}/{entry}")
                worker.send_message({"name": name, "mount": mount, "snapshots": self._kept(name), **facts})

    def _kept(self, name: str) -> list[dict[str, Any]]:
        """A volume's snapshots, the newest first."""
        found = []
        for entry in self._snapshots(name):
            try:
                found.append({"token": entry.partition(".")[2], **_facts(f"{self.snapshots}/{entry}")})
            except FileNotFoundError:  # gone since
                continue
        return sorted(found, key=lambda each: each["ctransid"], reverse=True)[:_MOST]

    def snapshot(self, worker: Worker, params: Params) -> None:
        """vol.snapshot: all of them, or none"""
        names, token = params.get("volumes"), token_of(params.get("token"))
        if not isinstance(names, list) or not names:
            raise Fault("bad_request", "volumes must be a list of names")
        names = list(dict.fromkeys([checked(name) for name in names]))
        for name in names:
            self.require(name)
        self._watching.listen()
        os.makedirs(self.snapshots, 0o700, exist_ok=True)
        self._snapshot_all([(f"{self.top}/@{name}", f"{name}.{token}") for name in names])
        made = [{"name": name, "token": token, **_facts(f"{self.snapshots}/{name}.{token}")} for name in names]
        worker.send_message({"snapshots": made})

    def _snapshot_all(self, wanted: list[tuple[str, str]]) -> None:
        sources: list[tuple[int, str]] = []
        done = []
        directory = btrfs.open_directory(self.snapshots)
        try:
            for path, name in wanted:
                sources.append((btrfs.open_directory(path), name))
            for source, name in sources:  # nothing else in here: they shall be of one instant, nearly
                btrfs.snapshot(source, directory, name)
                done.append(name)
        except OSError as error:
            for name in done:
                btrfs.destroy(directory, name)
            raise from_os(error, f"the snapshot {wanted[len(done)][1]}") from None
        finally:
            for source, _name in sources:
                os.close(source)
            os.close(directory)

    def send(self, worker: Worker, params: Params) -> None:
        """vol.send: the send stream, as raw bytes"""
        name, token = name_of(params), token_of(params.get("token"))
        parent = None if params.get("parent") is None else token_of(params["parent"])
        flags = 0 if params.get("data", True) else btrfs.NO_FILE_DATA
        base = 0 if parent is None else self._look(name, parent).ident
        self._look(name, token)
        source = btrfs.open_directory(f"{self.snapshots}/{name}.{token}")
        try:
            _Sending(source, base, flags).run(worker)
        finally:
            os.close(source)

    def forget(self, worker: Worker, params: Params) -> None:
        """vol.forget: a snapshot that is being sent stays for the next time"""
        name, keep = name_of(params), params.get("keep")
        if not isinstance(keep, list):
            raise Fault("bad_request", "keep must be a list of tokens")
        kept = {f"{name}.{token_of(token)}" for token in keep}
        worker.send_message({"removed": self.drop_snapshots(name, kept)})

    def drop_snapshots(self, name: str, keep: set[str]) -> list[str]:
        """Delete a volume's snapshots but those called so, some hundred at a time; the tokens of those that went.
        Raises OSError."""
        self.require_disk()
        gone = [entry for entry in self._snapshots(name) if entry not in keep][:_MOST]
        if not gone:
            return []
        removed = []
        directory = btrfs.open_directory(self.snapshots)
        try:
            for entry in gone:
                try:
                    btrfs.destroy(directory, entry)
                    removed.append(entry.partition(".")[2])
                except OSError as error:
                    if error.errno != errno.EPERM:
                        raise
        finally:
            os.close(directory)
        return removed

    def create(self, worker: Worker, params: Params) -> None:
        """vol.create"""
        from limpet_agent import mounting

        mounting.create(self, worker, params)

    def remove(self, worker: Worker, params: Params) -> None:
        """vol.remove"""
        from limpet_agent import mounting

        mounting.remove(self, worker, params)

    def require(self, name: str) -> None:
        """Raises Fault(not_found) unless there is such a volume."""
        self.require_disk()
        if not os.path.isdir(f"{self.top}/@{name}"):
            raise Fault("not_found", f"there is no volume '{name}'")

    def require_disk(self) -> None:
        """Raises Fault when there is no data disk."""
        if not os.path.ismount(self.top):
            raise Fault("failed_precondition", "this guest has no data disk")

    def _snapshots(self, name: str) -> list[str]:
        """What is called like one of a volume's snapshots; anything else is not ours."""
        try:
            found = btrfs.subvolumes(self.snapshots)
        except FileNotFoundError:
            return []
        return [entry for entry in found if entry.startswith(name + ".") and _is_token(entry[len(name) + 1 :])]

    def _look(self, name: str, token: str) -> btrfs.Subvolume:
        try:
            return btrfs.look(f"{self.snapshots}/{name}.{token}")
        except FileNotFoundError:
            raise Fault("not_found", f"there is no snapshot '{token}' of '{name}'") from None


class _Sending:
    """The kernel writes into a pipe in one thread, another reads and has the host's pace."""

    def __init__(self, source: int, parent: int, flags: int) -> None:
        self._source, self._parent, self._flags = source, parent, flags
        self._error: OSError | None = None
        self._over = allocate_lock()

    def run(self, worker: Worker) -> None:
        """Send all of it. Raises Fault, Gone; the kernel has ended then too."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE)
        self._over.acquire()
        start_new_thread(self._write, (writer,))
        try:
            while data := os.read(reader, _CHUNK):
                worker.send(data)
                if len(data) < _SMALL:
                    time.sleep(_LET_GATHER)
        finally:
            os.close(reader)  # to the kernel, when there is more to write: a broken pipe
            self._over.acquire()
        if self._error is not None:
            raise from_os(self._error, "the snapshot cannot be sent")

    def _write(self, pipe: int) -> None:
        try:
            btrfs.send(self._source, self._parent, pipe, self._flags)
        except OSError as error:
            self._error = error
        finally:
            os.close(pipe)
            self._over.release()


def _is(name: str) -> bool:
    try:
        return checked(name) == name
    except Fault:
        return False


def _facts(path: str) -> dict[str, Any]:
    found = btrfs.look(path)
    return {"uuid": found.uuid, "ctransid": found.ctransid}
