# Made by tools/unasync.py from ../_async/operations.py: edit that one.
"""Long requests: followed stage by stage, cancelled when the caller gives up."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Iterator, Callable, Mapping
from typing import Any

from limpet.client import _sio, _wire
from limpet.client._sync.transport import Transport
from limpet.errors import DeadlineExceeded, FailedPrecondition, LimpetError, Unavailable, from_dict
from limpet.models import Operation, Stage

OnStage = Callable[[Stage], None]

_TRIES = 5  # times that a broken stream is taken up again before the operation counts as out of reach


class Operations:
    """Every operation that the daemon remembers."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> builtins.list[Operation]:
        answer = self._transport.request("GET", _wire.path_of("operations"))
        return [Operation.model_validate(item) for item in answer]

    def get(self, op_id: str) -> Operation:
        answer = self._transport.request("GET", _wire.path_of("operations", op_id))
        return Operation.model_validate(answer)

    def cancel(self, op_id: str) -> None:
        """Ask for its end; what it did is undone."""
        self._transport.request("POST", _wire.path_of("operations", op_id, "cancel"))

    def prune(self, op_id: str) -> None:
        """Forget a finished operation."""
        self._transport.request("DELETE", _wire.path_of("operations", op_id))

    def follow(self, op_id: str) -> Iterator[Operation]:
        """The operation as it changes; the last one is final. A silent or broken stream is taken up again."""
        failures = 0
        while True:
            try:
                lines = self._transport.lines(
                    _wire.path_of("operations", op_id, "stream"), silence=_wire.STREAM_SILENCE
                )
                with contextlib.closing(lines):
                    for line in lines:
                        failures = 0
                        operation = Operation.model_validate(line)
                        yield operation
                        if operation.state != "running":
                            return
            except DeadlineExceeded:
                continue  # silence is no failure: a stage may take long
            except Unavailable:
                failures += 1
                if failures >= _TRIES:
                    raise
            _sio.sleep(0.1 * failures)

    def wait(self, op_id: str, on_stage: OnStage | None = None) -> Operation:
        """Follow it to its end; `on_stage` is told each change of a stage. Raises the operation's own error, and
        FailedPrecondition when it was cancelled. The caller's giving up (any exception) does not cancel it."""
        operation: Operation | None = None
        seen: builtins.list[Stage] = []
        for operation in self.follow(op_id):
            for stage in operation.stages if on_stage else ():
                if on_stage is not None and stage not in seen:
                    on_stage(stage)
            seen = operation.stages
        if operation is None or operation.state == "cancelled":
            raise FailedPrecondition("the operation was cancelled", op_id=op_id)
        if operation.state == "failed":
            raise _own_error(operation)
        return operation

    def run(
        self, method: str, path: str, *, params: _wire.Params | None = None, body: Mapping[str, Any] | None = None,
        on_stage: OnStage | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Start an operation by this request and wait for its result. When the caller gives up (Ctrl-C, cancellation,
        an exception in `on_stage`), the operation is cancelled."""
        answer = self._transport.request(method, path, params=params, body=body)
        op_id = Operation.model_validate(answer).id
        try:
            return (self.wait(op_id, on_stage)).result or {}
        except LimpetError:
            raise
        except BaseException:
            with contextlib.suppress(LimpetError):
                self.cancel(op_id)
            raise


def _own_error(operation: Operation) -> LimpetError:
    error = from_dict(operation.error or {})
    error.op_id = error.op_id or operation.id
    return error
