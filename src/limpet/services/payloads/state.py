"""What is known of a payload from one daemon to the next: `data/payloads/<id>.json`.

It is written before a published tree gets its name (`coming`) and after (`published`): whichever of the two trees has
the name after a crash, it is recognised by its inode.
"""

from __future__ import annotations

import contextlib
import hashlib
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from limpet import durable
from limpet.services.generations import PAYLOAD
from limpet.services.payloads import marker
from limpet.services.payloads.scanning import Scan


class Published(BaseModel):
    """A tree that has, or is about to get, the name of the host directory. Generation 0: what was there when it was
    seeded. `token`, `uuid`: of the guest's snapshot that the generation was made from."""

    generation: int
    device: int
    inode: int
    digest: str  # of its scan
    time: datetime | None = None
    token: str = ""
    uuid: str = ""

    @classmethod
    def of(cls, scan: Scan, generation: int = 0) -> Published:
        return cls(generation=generation, device=scan.device, inode=scan.inode, digest=scan.digest())

    def is_at(self, path: Path) -> bool:
        """Whether the directory with this name is that tree, edited or not."""
        try:
            found = path.lstat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (self.device, self.inode)


class PayloadState(BaseModel):
    """`nonce`: of the marker, while a VM runs. `seeded`: the incarnation of the sandbox for which the guest's copy is
    known to be whole; generations before `since` may have half of it. `doomed`: the guest's copy has to go."""

    payload: str
    sandbox_id: str
    host_dir: str
    nonce: str | None = None
    seeded: int | None = None
    since: int = 0
    published: Published | None = None
    coming: Published | None = None
    trouble: Literal["held", "drifted"] | None = None
    reason: str | None = None
    doomed: bool = False

    def never_marked(self) -> bool:
        """Whether a daemon ended between noting a nonce for the first time and writing it."""
        return self.published is None and marker.read(Path(self.host_dir)) is None


class States:
    """The states of all payloads, in memory and on the disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, PayloadState] = {}

    def get(self, payload: str) -> PayloadState | None:
        """The state of a payload, None for one that has none or an unreadable one: then it is seeded anew."""
        if payload not in self._known:
            with contextlib.suppress(OSError, ValidationError):
                self._known[payload] = PayloadState.model_validate_json(self._path(payload).read_bytes())
        return self._known.get(payload)

    def save(self, state: PayloadState) -> None:
        """Durable when it returns."""
        self._known[state.payload] = state
        durable.replace_file(self._path(state.payload), state.model_dump_json(indent=1).encode())

    def forget(self, payload: str) -> None:
        self._known.pop(payload, None)
        durable.unlink(self._path(payload), missing_ok=True)

    def all(self) -> list[PayloadState]:
        """Every payload that has a state."""
        names = sorted(path.stem for path in self._directory.glob("*.json"))
        return [state for name in names if (state := self.get(name)) is not None]

    def _path(self, payload: str) -> Path:
        return self._directory / f"{payload}.json"


def short_id(payload: str) -> str:
    """Eight hexadecimal digits for an id: in the names of volumes and of directories beside the published one."""
    return hashlib.sha256(payload.encode()).hexdigest()[:8]


def volume_of(payload: str) -> str:
    """The name of a payload's volume in the guest."""
    return f"{PAYLOAD}{short_id(payload)}"


def is_payload(volume: str) -> bool:
    """Whether a guest's volume is that of some payload."""
    return volume.startswith(PAYLOAD)


def lock_name(payload: str) -> str:
    """Under which name a VM has the descriptor of a payload's marker."""
    return f"payload-{short_id(payload)}"
