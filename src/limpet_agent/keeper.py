"""How running commands survive the agent: it hands PID 1 a duplicate of every descriptor that they depend on.

One SOCK_SEQPACKET pair between agent and PID 1; each message is one JSON object, with descriptors (SCM_RIGHTS) in the
order of its "fds" names. Agent → PID 1: {"keep": id, "about": {…}, "fds": […]}, {"drop_stdin": id},
{"forget": id, "info": {…} | null}, {"frozen": seconds | null}, {"poweroff": true}.
PID 1 → agent: {"ended": pid, "status": n} for commands that an earlier agent started.
"""

from __future__ import annotations

import os
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, SCM_RIGHTS, SOL_SOCKET
from _socket import socket as Socket

from limpet_agent import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from limpet_agent.commands import Command

_MESSAGE = 128 << 10
_MOST_FDS = 8
_INT = 4


def send(socket: Socket, message: dict[str, Any], fds: list[int] | None = None) -> bool:
    """Send one message; False when the other side is gone or its queue is full."""
    ancillary = [(SOL_SOCKET, SCM_RIGHTS, b"".join(fd.to_bytes(_INT, "little") for fd in fds))] if fds else []
    try:
        socket.sendmsg([codec.dumps(message)], ancillary)
    except OSError:
        return False
    return True


def receive(socket: Socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and its descriptors (close-on-exec), or None when the other side is gone.
    May raise BlockingIOError."""
    try:
        data, ancillary, _flags, _peer = socket.recvmsg(_MESSAGE, CMSG_SPACE(_INT * _MOST_FDS), MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    fds = [
        int.from_bytes(raw[at : at + _INT], "little")
        for level, kind, raw in ancillary
        if level == SOL_SOCKET and kind == SCM_RIGHTS
        for at in range(0, len(raw) - len(raw) % _INT, _INT)
    ]
    return (codec.loads(data), fds) if data else None


class Held:
    """PID 1's record of one command: what the agent said of it, its descriptors by name, how it ended."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about
        self.fds: dict[str, int] = {}
        self.status: int | None = None

    def close(self, name: str | None = None) -> None:
        """Close one descriptor, or all."""
        for key in [name] if name is not None else list(self.fds):
            if key in self.fds:
                os.close(self.fds.pop(key))


class Keeper:
    """The agent's side: says what PID 1 is to hold."""

    def __init__(self, socket: Socket, log: Callable[..., None]) -> None:
        self._socket = socket
        self._log = log
        self._known: dict[str, set[str]] = {}

    def keep(self, command: Command) -> None:
        """Hand over the descriptors of a command that PID 1 does not have yet."""
        present: dict[str, int] = {}
        if command.stdin >= 0:
            present["stdin"] = command.stdin
        for name, lane in command.lanes.items():
            if lane.source >= 0 and not lane.terminal:
                present[name] = lane.source
            if lane.file >= 0:
                present[name + ".file"] = lane.file
        known = self._known.setdefault(command.id, set())
        fresh = {name: fd for name, fd in present.items() if name not in known}
        known |= set(fresh)
        about = {
            "argv": command.argv, "user": command.user, "cwd": command.cwd, "tty": command.tty, "pid": command.pid,
            "started_at": command.started_at, "deadline": command.deadline, "lanes": list(command.lanes),
        }  # fmt: skip
        if sum(len(word) for word in command.argv) > _MESSAGE // 8:
            about["argv"] = command.argv[:1]
        if not send(self._socket, {"keep": command.id, "about": about, "fds": list(fresh)}, list(fresh.values())):
            self._log("command is not kept by PID 1", command=command.id)

    def forget(self, ident: str, info: dict[str, Any] | None = None) -> None:
        """PID 1 may close what it holds of a command; `info` is what a later agent is to know of it."""
        if self._known.pop(ident, None) is not None:
            send(self._socket, {"forget": ident, "info": info})

    def drop_stdin(self, ident: str) -> None:
        """PID 1 must close its duplicate of the command's input, else it would see no end of file."""
        if "stdin" in self._known.get(ident, ()):
            self._known[ident].discard("stdin")
            send(self._socket, {"drop_stdin": ident})

    def adopted(self, ident: str, held: Held) -> None:
        """A command taken over from an earlier agent: PID 1 has these already."""
        self._known[ident] = set(held.fds)

    def frozen(self, seconds: float | None) -> None:
        """Tell PID 1 that file systems stand still for at most so long, or (None) no more."""
        send(self._socket, {"frozen": seconds})

    def poweroff(self) -> None:
        """Ask PID 1 to end everything."""
        send(self._socket, {"poweroff": True})
