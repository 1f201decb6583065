"""The socket of the Docker API before dockerd is there: who connects meanwhile waits instead of being turned away.

The agent opens it before the first command of a boot can run, and hands it to dockerd (sd_listen_fds(3)). From then on
dockerd alone has it: when it is killed, clients are refused at once. A start that fails turns away who has waited.
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM
from _socket import socket as Socket

_WAITING = 128  # clients
_GROUP = "docker"  # whose members may use the API


class Doorstep:
    """The place at `path`, until it is handed over."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket: Socket | None = None

    @property
    def fd(self) -> int:
        """The listening socket; -1 while it is not ours."""
        listener = self._socket  # looked at once: another thread may hand it over meanwhile
        return -1 if listener is None else listener.fileno()

    def open(self) -> None:
        """Let clients wait, unless somebody serves them already. Raises OSError."""
        if self._socket is not None or _answers(self.path):
            return
        _unlink(self.path)
        listener = Socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            os.makedirs(os.path.dirname(self.path), 0o755, exist_ok=True)
            listener.bind(self.path)
            os.chown(self.path, -1, _group())
            os.chmod(self.path, 0o660)
            listener.listen(_WAITING)
        except BaseException:
            listener.close()
            raise
        self._socket = listener

    def close(self, *, served: bool) -> None:
        """It is dockerd's now, or (not served) nobody's: then who has waited is turned away."""
        listener, self._socket = self._socket, None
        if listener is not None:
            listener.close()
            if not served:
                _unlink(self.path)


def _answers(path: str) -> bool:
    """Whether somebody listens; a queue that is full has somebody too."""
    probe = Socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
    try:
        probe.connect(path)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        probe.close()
    return True


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _group() -> int:
    """The group's number; our own when there is no such group."""
    try:
        with open("/etc/group", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name == _GROUP:
                    return int(rest.split(":")[1])
    except (OSError, ValueError, IndexError):
        pass
    return -1
