"""A typed client of the guest agent: one method per operation. Every answer is validated before it is believed.

All methods raise Unavailable when the guest cannot be reached or answers nonsense, and the error that the agent tells
(NotFound, BadRequest, …) otherwise. Paths are strings with surrogate escapes for bytes that are not UTF-8.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from limpet import errors
from limpet.guest.answers import (
    Entries,
    ExecAnswer,
    ExecsAnswer,
    Frozen,
    Identity,
    InfoAnswer,
    ModelT,
    Pong,
    Renewed,
    Thawed,
    Unpacked,
    given_up,
    valid,
)  # fmt: skip
from limpet.guest.execs import Exit, Gap, GuestExec, Output, Started
from limpet.guest.intake import whole_slots
from limpet.guest.mux import Channel
from limpet.guest.streams import CHUNK, Data, Stream, nonsense
from limpet.models import ExecInfo, FileInfo, SystemInfo
from limpet.names import new_id

_MOST_ENTRIES = 1_000_000  # of one directory
_LOG_LIMIT = 4 << 20
INTERNAL = "in"  # ids of commands that limpet runs for itself begin so; users' begin with `ex`
_CLOCK_SLACK = 0.05  # seconds
_CLOCK_TRIES = 3
_SHORT = 15.0  # seconds for an answer that needs no work


@dataclass(frozen=True)
class Completed:
    """How a command ended: its exit code (128 + n when signal n killed it) and what it wrote. `truncated`: more than
    the limit came, the rest was dropped."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False
    timed_out: bool = False


class Agent:
    """The operations of a guest, over one channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    # -- the machine

    async def ping(self, *, set_clock: bool = False, timeout: float = 5.0) -> Pong:
        """Ask for a sign of life; with `set_clock` give the guest the host's time if it is off by more than 50 ms."""
        return await self.ask(Pong, "ping", timeout, time_ns=time.time_ns() if set_clock else None)

    async def check_clock(self) -> float:
        """How far the guest's clock is ahead, in seconds, as closely as half a round trip tells; one that is more
        than 50 ms off is set. An answer that took too long to tell is asked for again."""
        offset, bound = await self._offset(set_clock=False)
        found = offset
        for _ in range(_CLOCK_TRIES):
            if abs(offset) <= _CLOCK_SLACK and bound <= _CLOCK_SLACK:
                break
            offset, bound = await self._offset(set_clock=abs(offset) > _CLOCK_SLACK)
        return found

    async def _offset(self, *, set_clock: bool) -> tuple[float, float]:
        """How far the clock is ahead, and by how much that may be wrong; seconds."""
        began, asked = time.time(), time.monotonic()
        pong = await self.ping(set_clock=set_clock)
        trip = time.monotonic() - asked
        return pong.time_ns / 1e9 - (began + trip / 2), trip / 2

    async def renew(self, identity: Identity, *, timeout: float = _SHORT) -> None:
        """Make the guest somebody else: clock, entropy, names, ids, network. Raises FailedPrecondition with what could
        not be renewed."""
        began, told_ns = time.monotonic(), time.time_ns()
        answer = await self.ask(Renewed, "renew", timeout, time_ns=told_ns, **asdict(identity))
        if answer.failed:
            raise errors.FailedPrecondition(f"the guest could not be renewed: {'; '.join(answer.failed)[:1000]}")
        under_way = time.monotonic() - began - (answer.time_ns - told_ns) / 1e9  # the rest is the work after the clock
        if under_way > _CLOCK_SLACK:  # the time was at most that old when it was set
            await self.check_clock()

    async def warm(self) -> None:
        """Get the agent ready to be part of a template."""
        await self._request("warm")

    async def freeze(self, seconds: float) -> list[str]:
        """Freeze the guest's file systems on disks, at most for `seconds`: then it thaws by itself. Answers where they
        are mounted. Raises FailedPrecondition, thawed again, when one of them cannot be frozen."""
        answer = await self.ask(Frozen, "fs.freeze", seconds + _SHORT, seconds=seconds)
        if answer.failed:
            await self.thaw()
            raise errors.FailedPrecondition(f"the guest's disks could not be frozen: {'; '.join(answer.failed)[:1000]}")
        return answer.frozen

    async def thaw(self) -> bool:
        """Thaw them; whether they were frozen until now."""
        return (await self.ask(Thawed, "fs.thaw")).was_frozen

    async def system(self) -> SystemInfo:
        """What the guest knows of itself."""
        return await self.ask(SystemInfo, "system")

    async def sync(self, *, timeout: float = 30.0) -> None:
        """Write everything to the guest's disks."""
        await self._request("sync", timeout)

    async def poweroff(self) -> None:
        """Ask for a clean end; the machine goes down after the answer."""
        await self._request("poweroff")

    async def set_hostname(self, name: str) -> None:
        """Name the guest."""
        await self._request("hostname", name=name)

    async def log(self, tail: int = 1000) -> bytes:
        """The last lines of the agent's own log."""
        kept, stream = bytearray(), await self.opened("log", tail=tail)
        async with asyncio.timeout(_SHORT), given_up(stream):
            async for piece in self.pieces(stream):
                kept += piece[: _LOG_LIMIT - len(kept)]
        return bytes(kept)

    # -- commands

    async def exec(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None,
        user: str | None = None, tty: bool = False, rows: int = 24, cols: int = 80, stdin: bool = False,
        timeout: float | None = None, ident: str | None = None,
    ) -> GuestExec:  # fmt: skip
        """Start a command and follow it from its first byte. `timeout` (seconds) kills its whole process group."""
        stream, started = await self._start(
            False, argv=list(argv), env=dict(env or {}), cwd=cwd, user=user, tty=tty, rows=rows, cols=cols,
            stdin=stdin, timeout=timeout, id=ident or new_id("ex"),
        )  # fmt: skip
        return GuestExec(stream, started.id, started.pid)

    async def exec_detached(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None,
        user: str | None = None, tty: bool = False, rows: int = 24, cols: int = 80, stdin: bool = False,
        timeout: float | None = None, ident: str | None = None,
    ) -> Started:  # fmt: skip
        """Start a command and do not follow it."""
        stream, started = await self._start(
            True, argv=list(argv), env=dict(env or {}), cwd=cwd, user=user, tty=tty, rows=rows, cols=cols,
            stdin=stdin, timeout=timeout, id=ident or new_id("ex"),
        )  # fmt: skip
        await stream.end()
        return started

    async def _start(self, detach: bool, **params: Any) -> tuple[Stream, Started]:
        stream = await self.channel.open("exec.start", detach=detach, **params)
        async with given_up(stream):
            return stream, valid(Started, (await stream.message()).get("started"), stream)

    async def attach(
        self, ident: str, *, stdout: int | None = 0, stderr: int | None = 0, stdin: bool = False, steal: bool = False
    ) -> GuestExec:
        """Follow a command, from these offsets on (None: not that lane). Raises Busy when another client has its
        input and `steal` is not set."""
        stream = await self.channel.open(
            "exec.attach", id=ident, stdout=stdout, stderr=stderr, stdin=stdin, steal=steal
        )
        async with given_up(stream):
            info = valid(ExecInfo, (await stream.message()).get("attached"), stream)
        return GuestExec(stream, info.id, info.pid)

    async def execs(self) -> list[ExecInfo]:
        """Running and lately ended commands, the oldest first."""
        found: list[ExecInfo] = []
        stream = await self.opened("exec.list")
        async with given_up(stream):
            while (item := await stream.receive()) is not None:
                if isinstance(item, Data) or len(found) > 10_000:
                    raise nonsense("no list of commands")
                found += valid(ExecsAnswer, item.body, stream).execs
        return found

    async def get_exec(self, ident: str) -> ExecInfo:
        """One command. Raises NotFound."""
        return (await self.ask(ExecAnswer, "exec.get", id=ident)).exec

    async def signal(self, ident: str, name: str) -> None:
        """Signal a command's whole process group. Raises NotFound, FailedPrecondition when it has ended."""
        await self._request("exec.signal", id=ident, signal=name)

    async def wait(self, ident: str, timeout: float | None = None) -> ExecInfo:
        """How a command ended. Raises DeadlineExceeded."""
        stream = await self.opened("exec.wait", id=ident, timeout=timeout)
        stream.patience = None
        async with given_up(stream):
            return valid(ExecAnswer, await stream.message(), stream).exec

    async def write_stdin(self, ident: str, data: bytes, *, eof: bool = False) -> None:
        """Give a command input without attaching to it."""
        stream = await self.channel.open("exec.stdin", id=ident, eof=eof)
        async with given_up(stream):
            await stream.send(data)
            await stream.end()
            await stream.message()

    async def run(
        self, argv: Sequence[str], *, user: str | None = None, cwd: str | None = None,
        env: Mapping[str, str] | None = None, input: bytes = b"", timeout: float = 60.0, limit: int = 16 << 20,
    ) -> Completed:  # fmt: skip
        """Run a command to its end; at most `limit` bytes of each lane are kept. Raises DeadlineExceeded after
        `timeout` seconds, with the command's process group killed."""
        started = await self.exec(
            argv, user=user, cwd=cwd, env=env, stdin=bool(input), timeout=timeout, ident=new_id(INTERNAL)
        )
        kept: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        feeder = asyncio.create_task(_feed(started, input)) if input else None
        truncated = False
        try:
            async with asyncio.timeout(timeout + _SHORT):
                async for event in started.events():
                    if isinstance(event, Output):
                        lane = kept[event.lane]
                        truncated = truncated or len(lane) + len(event.data) > limit
                        lane += event.data[: max(limit - len(lane), 0)]
                    elif isinstance(event, Gap):
                        truncated = True
                    elif isinstance(event, Exit):
                        return _completed(event.info, kept, truncated, timeout)
            raise nonsense("a command without an end")
        except TimeoutError:
            raise errors.DeadlineExceeded(f"{argv[0]} did not finish within {timeout:g} s in the guest") from None
        finally:
            if feeder is not None:
                feeder.cancel()
            await started.detach()

    # -- files

    async def stat(self, path: str, *, follow: bool = True, user: str | None = None) -> FileInfo:
        """One path. Raises NotFound."""
        return (await self.ask(InfoAnswer, "fs.stat", path=path, follow=follow, user=user)).info

    async def list_dir(self, path: str) -> list[FileInfo]:
        """A directory's entries, sorted by name."""
        found: list[FileInfo] = []
        stream = await self.opened("fs.list", path=path)
        async with given_up(stream):
            while (item := await stream.receive()) is not None:
                if isinstance(item, Data) or len(found) > _MOST_ENTRIES:
                    raise nonsense("no list of files")
                found += valid(Entries, item.body, stream).entries
        return found

    async def read_file(self, path: str, *, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """A file's bytes, piece by piece. Raises NotFound, FailedPrecondition for a directory."""
        stream = await self.opened("fs.read", path=path, offset=offset, length=length)
        async with given_up(stream):
            valid(InfoAnswer, await stream.message(), stream)
            async for piece in self.pieces(stream):
                yield piece

    async def read_bytes(self, path: str, *, limit: int = 16 << 20) -> bytes:
        """A whole small file. Raises BadRequest when it is larger than `limit`."""
        kept = bytearray()
        async for piece in self.read_file(path, length=limit + 1):
            kept += piece
        if len(kept) > limit:
            raise errors.BadRequest(f"{path} in the guest is larger than {limit} bytes")
        return bytes(kept)

    async def write_file(
        self, path: str, data: bytes | AsyncIterable[bytes], *, mode: int | None = None, user: str | None = None,
        uid: int | None = None, gid: int | None = None, mtime_ns: int | None = None, make_parents: bool = False,
    ) -> FileInfo:  # fmt: skip
        """Write a file atomically: it is there whole, and on the disk, when this returns. Without owner or mode an
        existing file keeps its own."""
        stream = await self.channel.open(
            "fs.write", path=path, mode=mode, user=user, uid=uid, gid=gid, mtime_ns=mtime_ns, make_parents=make_parents
        )
        async with given_up(stream):
            await self._upload(stream, data)
            return valid(InfoAnswer, await stream.message(), stream).info

    async def mkdir(
        self, path: str, *, parents: bool = False, mode: int | None = None, user: str | None = None
    ) -> FileInfo:
        """Make a directory. Raises AlreadyExists unless `parents`."""
        return (await self.ask(InfoAnswer, "fs.mkdir", path=path, parents=parents, mode=mode, user=user)).info

    async def rename(self, source: str, target: str) -> None:
        """Rename a path, replacing a file at `target`."""
        await self._request("fs.rename", source=source, target=target)

    async def remove(self, path: str, *, recursive: bool = False, timeout: float = 600.0) -> None:
        """Remove a path. Raises NotFound, FailedPrecondition for a directory with content unless `recursive`."""
        await self._request("fs.remove", timeout, path=path, recursive=recursive)

    async def pack(self, path: str, *, exclude: Sequence[str] = ()) -> AsyncIterator[bytes]:
        """A path as a pax tar stream; names in it are relative to `path`. `exclude`: relative paths left out."""
        stream = await self.opened("fs.pack", path=path, exclude=list(exclude))
        async with given_up(stream):
            await stream.message()
            async for piece in self.pieces(stream):
                yield piece

    async def unpack(
        self, path: str, data: bytes | AsyncIterable[bytes], *, user: str | None = None, replace: bool = False
    ) -> Unpacked:
        """Unpack a tar stream into the directory `path`. `user` owns everything (else the archive's ids do);
        `replace`: what was at `path` makes way when all is unpacked, else the archive is merged into it."""
        stream = await self.channel.open("fs.unpack", path=path, owner=user, replace="rename" if replace else None)
        async with given_up(stream):
            await self._upload(stream, data)
            stream.patience = 600.0  # the last bytes are taken before the file system is synced
            return valid(Unpacked, await stream.message(), stream)

    # -- sockets

    async def connect_tcp(self, port: int, host: str = "127.0.0.1") -> Stream:
        """A TCP connection inside the guest: the stream's DATA both ways. Raises Unavailable when nobody listens."""
        return await self._connected(await self.channel.open("tcp.connect", host=host, port=port))

    async def connect_unix(self, path: str, first: bytes = b"") -> Stream:
        """The same to a Unix socket inside the guest. `first` is sent at once: it saves a round trip."""
        return await self._connected(await self.channel.open("unix.connect", path=path), first)

    async def _connected(self, stream: Stream, first: bytes = b"") -> Stream:
        async with given_up(stream):
            if first:
                await stream.send(first)
            if (await stream.message()).get("connected") is not True:
                raise nonsense("no connection")
        stream.patience = None
        return stream

    # -- how it is done

    async def opened(self, op: str, **params: Any) -> Stream:
        """A stream of an operation that is told nothing more."""
        stream = await self.channel.open(op, **params)
        await stream.end()
        return stream

    async def _request(self, op: str, timeout: float = _SHORT, **params: Any) -> tuple[dict[str, Any], Stream]:
        stream = await self.opened(op, **params)
        stream.patience = timeout
        async with given_up(stream):
            return await stream.message(), stream

    async def ask(self, model: type[ModelT], op: str, timeout: float = _SHORT, **params: Any) -> ModelT:
        """The answer of an operation that has one only, within `timeout` seconds."""
        answer, stream = await self._request(op, timeout, **params)
        return valid(model, answer, stream)

    async def _upload(self, stream: Stream, data: bytes | AsyncIterable[bytes]) -> None:
        if isinstance(data, bytes):
            await stream.send_bulk(data)
        else:
            async for piece in whole_slots(data):
                await stream.send_bulk(piece)
        await stream.end()

    async def pieces(self, stream: Stream) -> AsyncIterator[bytes]:
        """The bytes of a stream that carries nothing else."""
        while (item := await stream.receive()) is not None:
            if not isinstance(item, Data):
                raise nonsense(f"a message amid the bytes of {stream.op}")
            yield item.data


async def _feed(command: GuestExec, data: bytes) -> None:
    """Give input; a command that ends before it has read all is no failure."""
    view = memoryview(data)
    try:
        for start in range(0, len(view), CHUNK):
            await command.send_stdin(view[start : start + CHUNK])
        await command.close_stdin()
    except errors.LimpetError:
        return


def _completed(info: ExecInfo, kept: dict[int, bytearray], truncated: bool, timeout: float) -> Completed:
    if info.timed_out:
        raise errors.DeadlineExceeded(f"{info.argv[0]} did not finish within {timeout:g} s in the guest")
    code = info.exit_code if info.exit_code is not None else 128 + (info.signal or 0)
    return Completed(code, bytes(kept[1]), bytes(kept[2]), truncated, info.timed_out)
