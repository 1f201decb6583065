"""The marker of a payload's host directory: who publishes there (PAY-4), and what is locked (PAY-3).

`.limpet-payload` is written when a VM is launched, with a nonce that nobody else has. Before anything is written or
removed there the nonce is compared with the one that was noted; the file goes from one published tree to the next as a
hard link, so that it stays one inode with one lock. It is never seeded and never published.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from limpet.errors import FailedPrecondition

NAME = ".limpet-payload"
PROBE = ".limpet-probe-"  # how the names of preflight probes begin
_LARGEST = 64 << 10  # bytes


@dataclass(frozen=True)
class Marker:
    """Whose the directory is. `since` is ISO 8601, `path` where the directory was when it was written."""

    nonce: str
    payload: str
    sandbox: str
    sandbox_id: str
    home: str
    host: str
    since: str
    path: str

    @classmethod
    def new(cls, payload: str, sandbox: str, sandbox_id: str, home: Path, path: Path) -> Marker:
        """One with a nonce of its own, of this host and this moment."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(
            secrets.token_hex(16), payload, sandbox, sandbox_id, str(home), os.uname().nodename, now, str(path)
        )  # fmt: skip

    @classmethod
    def of(cls, directory: Path, nonce: str) -> Marker:
        """The one that is there, which has this nonce. Raises FailedPrecondition."""
        require(directory, nonce)
        found = read(directory)
        assert found is not None  # just required
        return found

    def to_bytes(self) -> bytes:
        return json.dumps({"limpet": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, content: bytes) -> Marker | None:
        """What `to_bytes` gave, or None."""
        try:
            found = json.loads(content)
            if found["limpet"] != 1 or not all(isinstance(found[field.name], str) for field in fields(cls)):
                return None
            return cls(**{field.name: found[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError):
            return None

    def whose(self) -> str:
        """The owner in words."""
        return f"sandbox {self.sandbox} of {self.home} on {self.host}, since {self.since}"


def is_ours(name: bytes) -> bool:
    """Whether a file of this name is limpet's own, which is neither seeded nor published."""
    return name == NAME.encode() or name.startswith(PROBE.encode())


def read(directory: Path) -> Marker | None:
    """The marker of a directory; None when there is none. Raises FailedPrecondition for what is no marker."""
    path = directory / NAME
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise foreign(path, error.strerror or str(error)) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise foreign(path, "it is not a regular file")
        content = os.read(fd, _LARGEST)
    finally:
        os.close(fd)
    found = Marker.parse(content)
    if found is None and content:
        raise foreign(path, "it says nothing that limpet wrote")
    return found


def require(directory: Path, nonce: str) -> None:
    """Raise FailedPrecondition unless the directory has the marker with this nonce: it is another one otherwise."""
    found = read(directory)
    if found is None:
        there = "it has no marker" if directory.is_dir() else "it is not there"
        raise FailedPrecondition(
            f"{directory} is not the directory that was seeded: {there} ({NAME})",
            hint="put the directory back, or let it go with `limpet payload rm`",
        )
    if found.nonce != nonce:
        raise FailedPrecondition(
            f"{directory} is not the directory that was seeded: its marker is of {found.whose()}",
            hint="put the directory back, or let it go with `limpet payload rm`",
        )


def foreign(path: Path, why: str) -> FailedPrecondition:
    """The error for a file of the marker's name that is not a marker of ours."""
    return FailedPrecondition(
        f"{path} is no marker that this limpet can take over: {why}",
        hint=f"if no sandbox uses that directory, remove {path} and try again",
    )
