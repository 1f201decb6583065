"""Commands in a sandbox, over one web socket each. Knows nothing of pydantic or httpx: starting one must be quick."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from limpet.client import _wire
from limpet.client._async.transport import AsyncTransport
from limpet.client._results import LANES, Chunk, ExecResult, Lane, from_info
from limpet.errors import BadRequest, LimpetError, Unavailable, from_dict

if TYPE_CHECKING:
    from limpet.client import _aio
    from limpet.models import ExecInfo

OnNotice = Callable[[str, "str | None"], None]

_PIECE = 256 << 10  # bytes of standard input in one message
_TRIES = 3  # times that a broken connection is made again before the command counts as out of reach


class AsyncStdin:
    """The standard input of a followed command."""

    def __init__(self, exec_: AsyncExec) -> None:
        self._exec = exec_
        self.closed = False

    async def write(self, data: bytes) -> None:
        """Waits while the command does not read. Raises BrokenPipeError when the command ended."""
        if self.closed:
            raise BadRequest("the command was started without standard input", hint="pass stdin=True")
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            await self._exec.send(bytes(view[start : start + _PIECE]))

    async def close(self) -> None:
        """Tell the command that no more comes."""
        if not self.closed:
            self.closed = True
            await self._exec.send('{"eof": true}')


class AsyncExec:
    """A command that is being followed: iterate over its output, or ask for its `result()`. Leaving the context (or
    `close()`) lets go of it; the command runs on."""

    def __init__(self, transport: AsyncTransport, name: str, on_notice: OnNotice | None) -> None:
        self._transport, self.name, self._on_notice = transport, name, on_notice
        self._socket: _aio.WebSocket | None = None
        self._info: dict[str, Any] | None = None
        self._rest: dict[Lane, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._uses_stdin = self._closed = False
        self._sent_any = False
        self.id, self.pid = "", None
        self.offsets: dict[Lane, int | None] = {"stdout": 0, "stderr": 0}
        self.lost = 0
        self.stdin = AsyncStdin(self)

    async def start(self, request: str, *, stdin: bool, start: bool) -> Self:
        """Run an ExecRequest and wait until it was started."""
        self._uses_stdin, self.stdin.closed = stdin, not stdin
        path = _wire.path_of("sandboxes", self.name, "exec")
        self._socket = await self._transport.websocket(path, {"start": start})
        await self._socket.send(request)
        return await self._started()

    async def attach(self, exec_id: str, *, stdin: bool, steal: bool) -> Self:
        """Follow a command that was started before, from `offsets`; None leaves a lane out."""
        self.id, self._uses_stdin, self.stdin.closed = exec_id, stdin, not stdin
        path = _wire.path_of("sandboxes", self.name, "execs", exec_id, "attach")
        params: dict[str, int | bool | None] = {"stdin": stdin, "steal": steal}
        params["stdout"], params["stderr"] = self.offsets["stdout"], self.offsets["stderr"]
        self._socket = await self._transport.websocket(path, params)
        return await self._started()

    async def _started(self) -> Self:
        try:
            while not await self._is_start():
                pass
        except BaseException:
            await self.close()
            raise
        return self

    async def _is_start(self) -> bool:
        assert self._socket is not None
        message = await self._socket.recv()
        if message is None:
            raise Unavailable(
                "the daemon closed the connection before the command was started", hint="limpet daemon logs"
            )
        if isinstance(message, bytes):
            raise _wire.garbled("output before the start")
        data = self._understand(message)
        if "started" in data:
            self.id, self.pid = data["started"]["id"], data["started"].get("pid")
        return "started" in data

    def _understand(self, text: str) -> dict[str, Any]:
        """One message in JSON: its effect on our state, and what it says. Unknown kinds have none."""
        data: dict[str, Any] = json.loads(text)
        if "error" in data:
            raise from_dict(data["error"])
        if gap := data.get("gap"):
            lane: Lane = gap["lane"] if gap["lane"] in LANES.values() else LANES[int(gap["lane"])]
            self.lost += gap["to"] - gap["from"]
            self.offsets[lane] = gap["to"]
        elif notice := data.get("notice"):
            if self._on_notice is not None:
                self._on_notice(notice.get("message", ""), notice.get("hint"))
        elif "exit" in data:
            self._info = data["exit"]
        return data

    async def read(self) -> Chunk | None:
        """The next output; None when the command ended and all of it was read, or when `close` was called."""
        while self._info is None and not self._closed:
            assert self._socket is not None
            message = await self._socket.recv()
            if isinstance(message, bytes):
                lane = LANES[message[0]]
                self.offsets[lane] = (self.offsets[lane] or 0) + len(message) - 1
                return Chunk(lane, message[1:])
            if message is not None:
                self._understand(message)
            elif not self._closed:
                await self._reconnect()
        return None

    async def _reconnect(self) -> None:
        """The connection broke: most likely the daemon was restarted; the command does not care. Bytes of standard
        input that were on their way may be lost, so a command that was being fed is not taken up silently."""
        if not self._sent_any:
            for _ in range(_TRIES):
                with contextlib.suppress(Unavailable):
                    await self.attach(self.id, stdin=self._uses_stdin, steal=True)
                    return
        raise Unavailable(
            "the connection to the daemon broke; the command runs on", hint=f"limpet attach {self.name} {self.id}"
        )

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[Chunk]:
        while (chunk := await self.read()) is not None:
            yield chunk

    async def send(self, message: str | bytes) -> None:
        """A message as it is. Raises BrokenPipeError when nobody listens any more."""
        assert self._socket is not None
        self._sent_any = self._sent_any or isinstance(message, bytes)
        await self._socket.send(message)

    async def signal(self, name: str) -> None:
        """Signal the command's whole process group: `INT`, `TERM`, …"""
        await self.send(json.dumps({"signal": name}))

    async def resize(self, rows: int, cols: int) -> None:
        await self.send(json.dumps({"resize": [rows, cols]}))

    async def result(self) -> ExecResult:
        """Read what is left and tell how it ended. Output that was iterated over before is not in it."""
        try:
            while (chunk := await self.read()) is not None:
                self._rest[chunk.lane] += chunk.data
        finally:
            await self.close()
        if self._info is None:
            raise Unavailable("the command was let go before its end", hint=f"limpet attach {self.name} {self.id}")
        return from_info(self._info, bytes(self._rest["stdout"]), bytes(self._rest["stderr"]), self.lost)

    @property
    def info(self) -> dict[str, Any] | None:
        """The ended command as the daemon's `ExecInfo` in JSON; None before its end."""
        return self._info

    async def close(self) -> None:
        """Let go of the command."""
        self._closed = True
        if self._socket is not None:
            await self._socket.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncExecHandle:
    """A command that runs (or ran) in a sandbox, followed or not."""

    def __init__(self, transport: AsyncTransport, name: str, exec_id: str) -> None:
        self._transport, self.name, self.id = transport, name, exec_id

    def _path(self, *more: str) -> str:
        return _wire.path_of("sandboxes", self.name, "execs", self.id, *more)

    async def info(self) -> ExecInfo:
        """What is known of it now."""
        from limpet.models import ExecInfo

        return ExecInfo.model_validate(await self._transport.request("GET", self._path()))

    async def signal(self, name: str) -> None:
        """Signal its whole process group: `INT`, `TERM`, …"""
        await self._transport.request("POST", self._path("signal"), body={"signal": name})

    async def output(self, lane: Lane = "stdout", offset: int = 0) -> bytes:
        """What is kept of its output from `offset` on, up to now."""
        async with self._transport.stream(
            "GET", self._path("output"), params={"lane": lane, "offset": offset}
        ) as response:
            return await response.aread()

    async def attach(
        self, *, stdout: int | None = 0, stderr: int | None = 0, stdin: bool = False, steal: bool = False
    ) -> AsyncExec:
        """Follow it from these offsets in bytes; None leaves that lane out. Only one may hold its standard input:
        `steal` takes it."""
        followed = AsyncExec(self._transport, self.name, None)
        followed.offsets = {"stdout": stdout, "stderr": stderr}
        return await followed.attach(self.id, stdin=stdin, steal=steal)

    async def wait(self) -> ExecResult:
        """How it ended, without its output (`output` and `attach` give that). Waits as long as it runs."""
        return await (await self.attach(stdout=None, stderr=None)).result()


Mode = Literal["wait", "follow", "detach"]


async def run(
    transport: AsyncTransport,
    name: str,
    command: str | Sequence[str],
    mode: Mode,
    *,
    stdin: bytes | bool = False,
    start: bool = False,
    on_notice: OnNotice | None = None,
    **options: Any,
) -> AsyncExec | AsyncExecHandle | ExecResult:
    """Start a command and do with it what `mode` says. `options` are further fields of ExecRequest."""
    feed = bytes(stdin) if isinstance(stdin, (bytes, bytearray)) else None
    wants_stdin = feed is not None or stdin is True
    if mode != "follow" and stdin is True:
        raise BadRequest("stdin=True needs stream=True", hint="pass the bytes themselves")
    request = _wire.exec_request(command, {"stdin": wants_stdin, "detach": mode == "detach", **options})
    followed = await AsyncExec(transport, name, on_notice).start(request, stdin=wants_stdin, start=start)
    if mode == "detach":
        await followed.close()
        return AsyncExecHandle(transport, name, followed.id)
    if feed is None:
        return followed if mode == "follow" else await followed.result()
    return await _fed(followed, feed, mode)


async def _fed(followed: AsyncExec, feed: bytes, mode: Mode) -> AsyncExec | ExecResult:
    """Feed a command beside reading it: one that answers while it is fed would else wait for us and we for it."""
    from limpet.client import _aio

    feeding = _aio.Background(_feed, followed.stdin, feed)
    if mode == "follow":
        return followed
    try:
        return await followed.result()
    finally:
        await feeding.close()


async def _feed(stdin: AsyncStdin, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, LimpetError):  # a command need not read all of its input
        await stdin.write(data)
        await stdin.close()
