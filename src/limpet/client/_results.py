"""What a command gave back: plain values, shared by both clients and cheap to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from limpet.errors import LimpetError

Lane = Literal["stdout", "stderr"]
LANES: dict[int, Lane] = {1: "stdout", 2: "stderr"}  # the first byte of a binary message


class Chunk(NamedTuple):
    """Some output, in the order in which it arrived."""

    lane: Lane
    data: bytes


class ExecFailed(LimpetError):
    """A command ended badly and `ExecResult.check` was asked to mind. `result` is all that is known of it."""

    code, http_status = "failed_precondition", 412

    def __init__(self, result: ExecResult) -> None:
        tail = result.stderr.decode(errors="replace").strip()[-2000:]
        super().__init__(f"{result.how()}: {tail}" if tail else result.how())
        self.result = result


@dataclass(frozen=True)
class ExecResult:
    """A command that ended. `exit_code` is 128 + the signal's number when a signal ended it (as in a shell);
    `lost` counts output bytes that were dropped before they could be read."""

    id: str
    stdout: bytes
    stderr: bytes
    exit_code: int
    signal: int | None = None
    timed_out: bool = False
    lost: int = 0

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @property
    def text(self) -> str:
        """Standard output as UTF-8, what is not UTF-8 replaced."""
        return self.stdout.decode(errors="replace")

    def how(self) -> str:
        """How it ended, in words."""
        if self.timed_out:
            return "the command ran into its time-out"
        if self.signal is not None:
            return f"the command was ended by signal {self.signal}"
        return f"the command ended with status {self.exit_code}"

    def check(self) -> ExecResult:
        """This result when the command succeeded; raises ExecFailed otherwise."""
        if not self.ok:
            raise ExecFailed(self)
        return self


def from_info(info: Mapping[str, Any], stdout: bytes = b"", stderr: bytes = b"", lost: int = 0) -> ExecResult:
    """The result that an ended `ExecInfo` (as JSON) describes."""
    code, signal = info.get("exit_code"), info.get("signal")
    if code is None:
        code = 128 + signal if signal is not None else 255
    return ExecResult(
        str(info.get("id", "")), stdout, stderr, code, signal, bool(info.get("timed_out")), lost
    )  # fmt: skip
