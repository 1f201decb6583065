"""Long requests: followed stage by stage, cancelled when the caller gives up."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from limpet.client import _aio, _wire
from limpet.client._async.transport import AsyncTransport
from limpet.errors import DeadlineExceeded, FailedPrecondition, LimpetError, Unavailable, from_dict
from limpet.models import Operation, Stage

OnStage = Callable[[Stage], None]

_TRIES = 5  # times that a broken stream is taken up again before the operation counts as out of reach


class AsyncOperations:
    """Every operation that the daemon remembers."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def list(self) -> builtins.list[Operation]:
        answer = await self._transport.request("GET", _wire.path_of("operations"))
        return [Operation.model_validate(item) for item in answer]

    async def get(self, op_id: str) -> Operation:
        answer = await self._transport.request("GET", _wire.path_of("operations", op_id))
        return Operation.model_validate(answer)

    async def cancel(self, op_id: str) -> None:
        """Ask for its end; what it did is undone."""
        await self._transport.request("POST", _wire.path_of("operations", op_id, "cancel"))

    async def prune(self, op_id: str) -> None:
        """Forget a finished operation."""
        await self._transport.request("DELETE", _wire.path_of("operations", op_id))

    async def follow(self, op_id: str) -> AsyncIterator[Operation]:
        """The operation as it changes; the last one is final. A silent or broken stream is taken up again."""
        failures = 0
        while True:
            try:
                lines = self._transport.lines(
                    _wire.path_of("operations", op_id, "stream"), silence=_wire.STREAM_SILENCE
                )
                async with contextlib.aclosing(lines):
                    async for line in lines:
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
            await _aio.sleep(0.1 * failures)

    async def wait(self, op_id: str, on_stage: OnStage | None = None) -> Operation:
        """Follow it to its end; `on_stage` is told each change of a stage. Raises the operation's own error, and
        FailedPrecondition when it was cancelled. The caller's giving up (any exception) does not cancel it."""
        operation: Operation | None = None
        seen: builtins.list[Stage] = []
        async for operation in self.follow(op_id):
            for stage in operation.stages if on_stage else ():
                if on_stage is not None and stage not in seen:
                    on_stage(stage)
            seen = operation.stages
        if operation is None or operation.state == "cancelled":
            raise FailedPrecondition("the operation was cancelled", op_id=op_id)
        if operation.state == "failed":
            raise _own_error(operation)
        return operation

    async def run(
        self, method: str, path: str, *, params: _wire.Params | None = None, body: Mapping[str, Any] | None = None,
        on_stage: OnStage | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Start an operation by this request and wait for its result. When the caller gives up (Ctrl-C, cancellation,
        an exception in `on_stage`), the operation is cancelled."""
        answer = await self._transport.request(method, path, params=params, body=body)
        op_id = Operation.model_validate(answer).id
        try:
            return (await self.wait(op_id, on_stage)).result or {}
        except LimpetError:
            raise
        except BaseException:
            with contextlib.suppress(LimpetError):
                await self.cancel(op_id)
            raise


def _own_error(operation: Operation) -> LimpetError:
    error = from_dict(operation.error or {})
    error.op_id = error.op_id or operation.id
    return error
