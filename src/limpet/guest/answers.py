"""What the agent answers, validated before it is believed; and who a guest shall be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, Field, ValidationError

from limpet import errors
from limpet.guest.execs import summary
from limpet.guest.streams import Stream, nonsense
from limpet.models import ExecInfo, FileInfo

ModelT = TypeVar("ModelT", bound=BaseModel)


class Pong(BaseModel):
    """The agent's answer to a ping. `data` is "ready", "waiting" or "failed: why"."""

    version: str = Field(max_length=64)
    protocol: int
    boot_id: str = Field(max_length=64)
    time_ns: int
    agent_pid: int
    agent_starts: int
    uptime: float
    data: str = Field(max_length=4096)


@dataclass(frozen=True)
class Identity:
    """Who a guest shall be. `machine_id`: 32 hex digits; `entropy`: hex; `network`: address/prefix, gateway, dns,
    mac."""

    hostname: str
    machine_id: str
    boot_id: str
    entropy: str
    network: Mapping[str, str] | None = None


class Renewed(BaseModel):
    time_ns: int
    boot_id: str = Field(max_length=64)
    failed: list[str] = Field(max_length=32)


class Frozen(BaseModel):
    frozen: list[str] = Field(max_length=64)
    failed: list[str] = Field(max_length=64)


class Thawed(BaseModel):
    was_frozen: bool


class Unpacked(BaseModel):
    """What an unpacked archive held."""

    files: int = Field(ge=0)
    bytes: int = Field(ge=0)


class ExecAnswer(BaseModel):
    exec: ExecInfo


class ExecsAnswer(BaseModel):
    execs: list[ExecInfo]


class Entries(BaseModel):
    entries: list[FileInfo]


class InfoAnswer(BaseModel):
    info: FileInfo


class given_up:
    """Reset the stream when the block is left early, so that the guest stops working for it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def __aenter__(self) -> Stream:
        return self._stream

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            told = error if isinstance(error, errors.LimpetError) else None
            self._stream.abort(told or errors.Unavailable(f"{self._stream.op} was given up"))


def valid(model: type[ModelT], value: object, stream: Stream) -> ModelT:
    """The answer as a model; one that is none ends the stream and raises Unavailable."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        wrong = nonsense(f"{stream.op}: {summary(error)}")
        stream.abort(wrong)
        raise wrong from None
