"""What requests carry besides the nouns of `models`: query strings and small bodies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from limpet.api.door import LaneName, LogSource


def _not_empty(path: str) -> str:
    if not path:
        raise ValueError("must not be empty")
    return path


# Not by min_length: pydantic's own checks of strings refuse surrogate escapes, and paths need not be UTF-8.
GuestPath = Annotated[str, AfterValidator(_not_empty), Field(description="absolute path in the guest")]
At = Annotated[str, Field(min_length=1, description="a generation's number, or a time (ISO 8601)")]
Mode = Annotated[int, Field(ge=0, le=0o7777, description="permission bits, as a decimal number")]


class Parameters(BaseModel):
    """An unknown key is a mistake worth telling."""

    model_config = ConfigDict(extra="forbid")


class NoParameters(Parameters):
    """Nothing."""


class ListQuery(Parameters):
    label: list[str] = Field([], description="key=value; given more than once, all must match")


class RemoveQuery(Parameters):
    force: bool = Field(False, description="also a running one")
    purge: bool = Field(False, description="for good, with its vault; not into the trash")


class EventsQuery(Parameters):
    """`after` absent: everything that is kept; `now`: only what is to come."""

    after: Annotated[int, Field(ge=0)] | Literal["now"] | None = None
    follow: bool = False


class ExecQuery(Parameters):
    start: bool = Field(False, description="boot the sandbox first when it is stopped")


class AttachQuery(Parameters):
    """Offsets in bytes; a lane without one is left out."""

    stdout: Annotated[int, Field(ge=0)] | None = None
    stderr: Annotated[int, Field(ge=0)] | None = None
    stdin: bool = False
    steal: bool = Field(False, description="take standard input from whoever has it")


class OutputQuery(Parameters):
    lane: LaneName = "stdout"
    offset: Annotated[int, Field(ge=0)] = 0


class PathQuery(Parameters):
    path: GuestPath


class WriteQuery(Parameters):
    path: GuestPath
    mode: Mode | None = None
    user: str | None = Field(None, description="who the file shall belong to")
    parents: bool = Field(False, description="make missing directories above it")


class DeleteQuery(Parameters):
    path: GuestPath
    recursive: bool = False


class UnpackQuery(Parameters):
    path: GuestPath
    user: str | None = Field(None, description="who everything shall belong to; else as in the archive")


class BaseQuery(Parameters):
    base: str | None = Field(None, description="commit to compare with; else the one of the import")


class SyncQuery(Parameters):
    pending: bool = Field(False, description="also ask the guest what is not on the host yet")


class VaultQuery(Parameters):
    """`at` absent: the newest generation."""

    path: GuestPath
    at: At | None = None


class DiffQuery(Parameters):
    """`b` absent: the newest generation."""

    a: At
    b: At | None = None


class LogsQuery(Parameters):
    source: LogSource = "console"
    tail: Annotated[int, Field(ge=0)] | None = Field(None, description="the last so many lines")


class TailQuery(Parameters):
    tail: Annotated[int, Field(ge=0)] | None = Field(None, description="the last so many lines")


class SetupBody(Parameters):
    mirror: str | None = Field(None, description="Debian mirror to fetch from")


class SignalBody(Parameters):
    signal: str = "TERM"


class MkdirBody(Parameters):
    path: GuestPath
    parents: bool = False
    mode: Mode | None = None


class RenameBody(Parameters):
    source: GuestPath
    target: GuestPath


class Control(Parameters):
    """A text message from the client of an exec web socket: exactly one of these."""

    eof: Literal[True] | None = None
    resize: tuple[Annotated[int, Field(ge=1, le=65535)], Annotated[int, Field(ge=1, le=65535)]] | None = None
    signal: Annotated[str, Field(max_length=16)] | None = None
