"""What flows through the daemon without being held: the events of a followed command, and bodies of any size."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from limpet.models import ExecInfo, FileInfo, VaultEntry

Lane = Literal[1, 2]  # as on the wire of the exec web socket
STDOUT: Lane = 1
STDERR: Lane = 2
LANE_NAMES: dict[int, str] = {STDOUT: "stdout", STDERR: "stderr"}


@dataclass(frozen=True)
class Started:
    """The command runs (or was found, when attaching)."""

    id: str
    pid: int | None


@dataclass(frozen=True)
class Output:
    """The next bytes of one lane, in order within that lane."""

    lane: Lane
    data: bytes


@dataclass(frozen=True)
class Gap:
    """Bytes `start` … `end` of a lane were dropped before anybody read them."""

    lane: Lane
    start: int
    end: int


@dataclass(frozen=True)
class Notice:
    """Something that the user should know beside the command's output."""

    message: str
    hint: str | None = None


@dataclass(frozen=True)
class Exit:
    """The command ended and all its output was delivered; nothing follows."""

    info: ExecInfo


ExecEvent = Started | Output | Gap | Notice | Exit


class ExecSession(Protocol):
    """A client attached to a command. Iterating is what pulls output from the guest: who does not iterate holds it
    back. Leaving it (`detach`) never ends the command."""

    def __aiter__(self) -> AsyncIterator[ExecEvent]: ...

    async def write_stdin(self, data: bytes) -> None:
        """Returns once the guest has room for more (back-pressure)."""

    async def close_stdin(self) -> None: ...

    async def resize(self, rows: int, cols: int) -> None: ...

    async def signal(self, signal: str) -> None: ...

    async def detach(self) -> None:
        """Give the session up; may be called at any time, more than once."""


@dataclass(frozen=True)
class FileBody:
    """A file that is being read: what it is, and its bytes. `chunks` must be closed (`aclose`) when given up."""

    info: FileInfo
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True)
class PatchBody:
    """A binary patch against the commit `base`."""

    base: str
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True)
class VaultFile:
    """A regular file of a generation. `chunks` must be closed (`aclose`) when given up."""

    generation: int
    entry: VaultEntry
    chunks: AsyncIterator[bytes]
