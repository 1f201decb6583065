"""A command in the guest, as the host follows it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from limpet.guest.streams import Data, Message, Stream, nonsense
from limpet.models import ExecInfo


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes that the command wrote; lane 1 is standard output, 2 standard error."""

    lane: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Gap:
    """Output of a lane (`stdout`, `stderr`) between two offsets that was not kept."""

    lane: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Exit:
    """The last event: how the command ended."""

    info: ExecInfo


class _Gap(BaseModel):
    lane: str
    start: int = Field(alias="from", ge=0)
    end: int = Field(alias="to", ge=0)


class Started(BaseModel):
    """The agent's answer to exec.start."""

    id: str = Field(max_length=64)
    pid: int = Field(ge=1)


class GuestExec:
    """A command to which we are attached. Leaving without its `Exit` detaches; the command goes on."""

    def __init__(self, stream: Stream, ident: str, pid: int | None) -> None:
        self.id = ident
        self.pid = pid
        self._stream = stream
        stream.patience = None  # a command may say nothing for days; the channel looks after the guest's life

    async def events(self) -> AsyncIterator[Output | Gap | Exit]:
        """Output as it comes, from where the attachment began; the last one is `Exit`. Raises what ended the stream."""
        while (item := await self._stream.receive()) is not None:
            if isinstance(item, Data):
                yield Output(item.lane, item.data)
                continue
            event = self._event(item)
            if event is None:
                continue
            if isinstance(event, Exit):
                await self._stream.end()
                yield event
                return
            yield event
        raise self._nonsense("output without an end")

    async def send_stdin(self, data: bytes | memoryview) -> None:
        """Give the command input; waits while it does not read. Input that comes after its end is dropped."""
        await self._stream.send(data)

    async def close_stdin(self) -> None:
        """End of file for the command."""
        await self._stream.end()

    async def resize(self, rows: int, cols: int) -> None:
        """Change the terminal's size."""
        await self._stream.send_message({"resize": [rows, cols]})

    async def signal(self, name: str) -> None:
        """Send a signal to the whole process group."""
        await self._stream.send_message({"signal": name})

    async def detach(self) -> None:
        """Leave; the command goes on."""
        await self._stream.reset()

    def _event(self, message: Message) -> Gap | Exit | None:
        try:
            if "exit" in message.body:
                return Exit(ExecInfo.model_validate(message.body["exit"]))
            if "gap" in message.body:
                gap = _Gap.model_validate(message.body["gap"])
                return Gap(gap.lane, gap.start, gap.end)
        except ValidationError as error:
            raise self._nonsense(summary(error)) from None
        return None

    def _nonsense(self, what: str) -> Exception:
        error = nonsense(what)
        self._stream.abort(error)
        return error


def summary(error: ValidationError) -> str:
    """The first complaint of a validation, short and without the guest's own words."""
    first: Any = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(str(part)[:40] for part in first['loc'][:4])}: {first['msg'][:200]}"
