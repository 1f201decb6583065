"""Who a command runs as: /etc/passwd and /etc/group, read by ourselves.

The agent runs on its own C library; the name service modules of the image (any image) are not built for it.
"""

from __future__ import annotations

import os

from limpet_agent import codec
from limpet_agent.faults import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_IMAGE = "/etc/limpet/image.json"


class User:
    """An account: `groups` are all its gids, the primary one first."""

    __slots__ = ("gid", "groups", "home", "name", "shell", "uid")

    def __init__(self, name: str, uid: int, gid: int, home: str, shell: str) -> None:
        self.name, self.uid, self.gid, self.home, self.shell = name, uid, gid, home, shell
        self.groups = [gid]


class _File:
    """The fields of a colon-separated file, read again when it changes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._rows: list[list[str]] = []

    def stamp(self) -> tuple[int, int, int]:
        """What changes with the file."""
        try:
            found = os.stat(self._path)
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_size, found.st_ino

    def rows(self, fields: int) -> list[list[str]]:
        stamp = self.stamp()
        try:
            if stamp != self._stamp:
                with open(self._path, encoding="utf-8", errors="surrogateescape") as file:
                    rows = [line.rstrip("\n").split(":") for line in file]
                self._rows = [row for row in rows if len(row) >= fields]
                self._stamp = stamp
        except OSError:
            return []
        return self._rows


_passwd = _File("/etc/passwd")
_group = _File("/etc/group")
_found: dict[str, tuple[object, User]] = {}
_image: dict[str, Any] | None = None


def image() -> dict[str, Any]:
    """What the image says of itself: {"user", "uid", "home"}; empty when it says nothing."""
    global _image
    if _image is None:
        try:
            with open(_IMAGE, "rb") as file:
                _image = codec.loads(file.read(64 << 10))
        except (OSError, Fault):
            _image = {}
    return _image


def default_user() -> str:
    """The image's user, or root. When the agent is not root, whoever it is."""
    if os.geteuid() != 0:
        return str(os.geteuid())
    name = image().get("user")
    return name if isinstance(name, str) and name else "root"


def find(name: str) -> User:
    """The account called `name`, or with that uid. Raises Fault(not_found)."""
    stamps = (_passwd.stamp(), _group.stamp())
    known = _found.get(name)
    if known is None or known[0] != stamps:
        known = _found[name] = (stamps, _look_up(name))
    return known[1]


def _look_up(name: str) -> User:
    for row in _passwd.rows(7):
        if (row[0] == name or row[2] == name) and row[2].isdigit() and row[3].isdigit():
            user = User(row[0], int(row[2]), int(row[3]), row[5] or "/", row[6] or "/bin/sh")
            user.groups += _groups_of(user)
            return user
    if name == "root":  # an image without /etc/passwd
        return User("root", 0, 0, "/root", "/bin/sh")
    if name.isdigit() and int(name) < 1 << 31:
        return User(name, int(name), int(name), "/", "/bin/sh")
    raise Fault("not_found", f"no such user '{name}' in the guest", "see /etc/passwd in the sandbox")


def _groups_of(user: User) -> list[int]:
    rows = _group.rows(4)
    return [
        int(row[2]) for row in rows if row[2].isdigit() and int(row[2]) != user.gid and user.name in row[3].split(",")
    ]
