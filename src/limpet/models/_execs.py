"""Commands in a guest, and its files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from limpet.models._base import AnyPath, EnvMap, Model, Request, check_env


class ExecRequest(Request):
    """A command to run in the guest. `user` defaults to the image's, `cwd` to the workspace or the user's home.
    `timeout` in seconds kills the whole process group. `detach`: start it and do not follow."""

    argv: Annotated[list[str], Field(min_length=1)]
    env: EnvMap = {}
    cwd: str | None = None
    user: str | None = None
    tty: bool = False
    rows: Annotated[int, Field(ge=1, le=65535)] = 24
    cols: Annotated[int, Field(ge=1, le=65535)] = 80
    stdin: bool = False
    timeout: Annotated[float, Field(gt=0)] | None = None
    detach: bool = False

    _env = field_validator("env")(check_env)


class ExecInfo(Model):
    """A command in the guest, running or ended. `*_bytes` count all output ever, `*_start` is the oldest byte kept."""

    id: str
    argv: list[str]
    user: str
    cwd: str
    tty: bool
    pid: int | None = None
    running: bool
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    started_at: float  # seconds since the epoch, guest clock
    ended_at: float | None = None
    stdout_bytes: int = 0
    stdout_start: int = 0
    stderr_bytes: int = 0
    stderr_start: int = 0


class FileInfo(Model):
    """One path in the guest. Paths that are not UTF-8 use surrogate escapes."""

    path: AnyPath
    type: Literal["file", "directory", "symlink", "fifo", "socket", "block", "char"]
    size: int
    mode: int  # permission bits, with setuid, setgid and sticky
    uid: int
    gid: int
    mtime_ns: int
    target: AnyPath | None = None  # of a symlink


class Unpacked(Model):
    """What a tar archive brought into the guest."""

    files: int
    bytes: int
