"""A client that follows a command: sends its output from an offset on, takes input, and tells the end."""

from __future__ import annotations

from limpet_agent import frames
from limpet_agent.faults import Fault
from limpet_agent.signals import number_of
from limpet_agent.streams import CHUNK, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from limpet_agent.commands import Command

_KINDS = {"stdout": frames.DATA, "stderr": frames.DATA_ERR}


class Attachment:
    """Couples a stream to a command. Its going away never hurts the command."""

    def __init__(
        self, stream: Stream, command: Command, offsets: dict[str, int], *, stdin: bool, steal: bool = False
    ) -> None:
        """`offsets`: where to begin in each lane. Raises Fault(busy) when another client has the input."""
        self.positions = offsets
        self._stream = stream
        self._command = command
        if stdin:
            self._take_stdin(steal)
        command.attachments.append(self)
        stream.on_message = self._message
        stream.on_writable = self.feed
        stream.on_gone = self._left
        stream.on_end = self._input_ended
        stream.on_data = self._input

    def begin(self, early: Iterable[tuple[int, bytes]] = ()) -> None:
        """Start to send; `early` is input that came before the command had started."""
        for charge, data in early:
            self._input(charge, data)
        if self._stream.ended:
            self._input_ended()
        self.feed()

    def feed(self) -> None:
        """Send what there is and the client has room for; after the last byte, how it ended."""
        stream, command = self._stream, self._command
        moved = True
        progressed = False
        while moved and stream.room:
            moved = False
            for name in self.positions:
                moved = self._send_from(name) or moved
            progressed = progressed or moved
        if progressed:
            command.caught_up()
        if command.finished and not moved and stream.room and self in command.attachments and self._sent_all():
            command.attachments.remove(self)
            stream.send_message({"exit": command.info()})
            stream.end()

    def _sent_all(self) -> bool:
        lanes = self._command.lanes
        return all(lanes[name].end <= position for name, position in self.positions.items() if name in lanes)

    def _send_from(self, name: str) -> bool:
        lane = self._command.lanes.get(name)
        position = self.positions[name]
        if lane is None or position >= lane.end:
            return False
        if position < lane.start:
            self._stream.send_message({"gap": {"lane": name, "from": position, "to": lane.start}})
            position = lane.start
        lane.reopen()
        data = lane.read(position, CHUNK)
        self.positions[name] = position + len(data)
        if data:
            self._stream.send(data, _KINDS[name])
        return bool(data)

    def _take_stdin(self, steal: bool) -> None:
        holder = self._command.stdin_owner
        if holder is not None:
            if not steal:
                raise Fault("busy", f"another client is attached to {self._command.id}", "steal it: attach --steal")
            holder._stream.reset(Fault("failed_precondition", "another client took over this command"))
        self._command.stdin_owner = self

    def _owns_stdin(self) -> bool:
        return self._command.stdin_owner is self

    def _input(self, charge: int, data: bytes) -> None:
        if not self._owns_stdin():
            raise Fault("failed_precondition", "this client is attached without input")
        self._command.write(data, charge, self._stream)

    def _input_ended(self) -> None:
        if self._owns_stdin():
            self._command.end_input()

    def _message(self, message: dict[str, Any]) -> None:
        size = message.get("resize")
        if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and 0 < n < 65536 for n in size):
            self._command.resize(*size)
        elif "signal" in message:
            number = number_of(message["signal"])
            if not self._command.ended:
                self._command.kill(number)
        else:
            raise Fault("bad_request", "expected {resize: [rows, cols]} or {signal: name}")

    def _left(self) -> None:
        if self._owns_stdin():
            self._command.stdin_owner = None
        if self in self._command.attachments:
            self._command.attachments.remove(self)
            self._command.caught_up()
