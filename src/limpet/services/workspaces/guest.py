"""What a workspace needs of a guest: run a command, unpack a tree, read a long output. The agent client offers it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol


class Completed(Protocol):
    """How a guest command ended and what it wrote."""

    @property
    def exit_code(self) -> int: ...
    @property
    def stdout(self) -> bytes: ...
    @property
    def stderr(self) -> bytes: ...


class Guest(Protocol):
    """A running guest. Times are seconds, sizes bytes; a lost guest is errors.Unavailable."""

    async def run(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        input: bytes = b"",
        timeout: float = 60.0,
        limit: int = 1 << 20,
    ) -> Completed:
        """Run a command to its end; at most `limit` bytes of each output are kept."""
        ...

    def stream(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> AsyncIterator[bytes]:
        """Run a command and yield its standard output; its exit code does not matter."""
        ...

    async def unpack(self, path: str, chunks: AsyncIterator[bytes], *, user: str | None = None) -> object:
        """Unpack a pax tar stream into the existing directory `path`; everything then belongs to `user`."""
        ...
