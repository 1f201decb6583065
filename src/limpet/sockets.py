"""Unix sockets that only their owner (and root) can use: listening on one, and who is at its other end."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

_BACKLOG = 256
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


def listen(path: Path) -> socket.socket:
    """A listening socket (0600, non-blocking) that appears under its name only when its mode is right. Whatever socket
    file is there already is replaced: make sure that nobody serves it."""
    temporary = path.with_name(f".{os.getpid()}")  # shorter than any name: the limit on paths counts for it too
    temporary.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(temporary))
        temporary.chmod(0o600)
        listener.listen(_BACKLOG)
        temporary.rename(path)
    except BaseException:
        listener.close()
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    listener.setblocking(False)
    return listener


def peer(connection: socket.socket) -> int:
    """The user whose process is at the other end."""
    _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)
