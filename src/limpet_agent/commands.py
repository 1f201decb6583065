"""One command in the guest: its life from fork to the last byte of output.

    starting ── error pipe closes ──▶ running ── process ends ──▶ ended ── pipes at EOF, or 200 ms ──▶ finished
        └──── error pipe speaks ────▶ refused (never listed)

A command belongs to nobody's connection: clients attach and leave. PID 1 holds duplicates of its descriptors, so that
the death of the agent closes none of them (see keeper.py).
"""

from __future__ import annotations

import os
import time
from collections import deque

from limpet_agent import capture, codec, spawn
from limpet_agent.faults import Fault
from limpet_agent.loop import IN, OUT, Loop, Timer
from limpet_agent.signals import native as signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from limpet_agent.attach import Attachment
    from limpet_agent.keeper import Keeper
    from limpet_agent.streams import Stream

_GRACE = 2.0  # seconds between SIGTERM and SIGKILL when time is up
_LINGER = 0.2  # seconds that output may still come after the end while a descendant holds the pipe
_HOLD = 8 << 20  # how far an attached reader may fall behind before the command has to wait for it
_SAVE_AFTER = 1.0
_END_OF_TEXT = b"\x04"  # what Ctrl-D sends


class Command:
    """A command that was started; `info()` is the host's ExecInfo."""

    def __init__(self, owner: Owner, ident: str, argv: list[str], user: str, cwd: str, tty: bool) -> None:
        self.id, self.argv, self.user, self.cwd, self.tty = ident, argv, user, cwd, tty
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.signal: int | None = None
        self.timed_out = False
        self.ended = self.finished = False
        self.started_at = time.time()
        self.ended_at: float | None = None
        self.deadline: float | None = None  # time.monotonic()
        self.lanes: dict[str, capture.Lane] = {}
        self.stdin = -1
        self.stdin_owner: Attachment | None = None
        self.attachments: list[Attachment] = []
        self.waiters: list[Callable[[], None]] = []
        self._owner = owner
        self._loop = owner.loop
        self._pidfd = -1
        self._held_back: set[str] = set()  # lanes that wait for a slow reader
        self._input: deque[tuple[memoryview, int, Stream | None]] = deque()
        self._input_ended = False
        self._timer: Timer | None = None

    # -- starting and ending

    def begin(self, pid: int, child: bool) -> None:
        """The process runs: watch it. `child` is False when an earlier agent started it and PID 1 will reap it."""
        self.pid = pid
        for lane in self.lanes.values():
            self._watch_lane(lane)
        if child:
            self._pidfd = os.pidfd_open(pid)
            self._loop.watch(self._pidfd, IN, lambda _events: self._reap())
        if self.deadline is not None:
            self._timer = self._loop.after(max(self.deadline - time.monotonic(), 0), self._time_up)
        self._loop.after(_SAVE_AFTER, lambda: None if self.ended else self.save())

    def kill(self, number: int) -> None:
        """Send a signal to the whole process group. Raises Fault when the command has ended."""
        if self.ended or self.pid is None:
            raise Fault("failed_precondition", f"the command {self.id} has ended")
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass
        except PermissionError as error:
            raise Fault("failed_precondition", f"cannot signal {self.id}: {error.strerror}") from None

    def _time_up(self) -> None:
        if not self.ended:
            self.timed_out = True
            self.kill(signal.SIGTERM)
            self._timer = self._loop.after(_GRACE, self._time_over)

    def _time_over(self) -> None:
        if not self.ended:
            self.kill(signal.SIGKILL)

    def _reap(self) -> None:
        if self.timed_out:
            self.kill(signal.SIGKILL)  # the rest of the group; its number is ours until the leader is reaped
        assert self.pid is not None
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self._loop.unwatch(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
            self.process_ended(status)

    def process_ended(self, status: int | None) -> None:
        """The process is gone; `status` as from waitpid(2), None when nobody knows it."""
        if self.ended:
            return
        self.ended, self.ended_at = True, time.time()
        if self._timer is not None:
            self._timer.cancel()
        if status is not None and os.WIFSIGNALED(status):
            self.signal = os.WTERMSIG(status)
        elif status is not None:
            self.exit_code = os.WEXITSTATUS(status)
        for lane in self.lanes.values():
            if self._may_pump(lane):
                self._pump(lane)
        self._loop.after(_LINGER, self._finish)
        self._check_finished()

    def _check_finished(self) -> None:
        if self.ended and all(lane.source < 0 for lane in self.lanes.values()):
            if not self.finished:
                self._finish()
            self._owner.keeper.forget(self.id, self.info())
            self._close_stdin()

    def _finish(self) -> None:
        if self.finished:
            return
        if any(lane.source >= 0 and not self._may_pump(lane) for lane in self.lanes.values()):
            self._loop.after(_LINGER, self._finish)  # a slow reader, not a descendant, keeps the pipe full
            return
        self.finished = True
        for attachment in list(self.attachments):
            attachment.feed()
        for waiter in self.waiters:
            waiter()
        self.waiters.clear()
        if any(lane.file >= 0 for lane in self.lanes.values()):
            self._loop.after(_SAVE_AFTER, self.save)
        self._owner.finished(self)

    # -- output

    def _watch_lane(self, lane: capture.Lane) -> None:
        self._held_back.discard(lane.name)
        if lane.source >= 0:
            events = IN | OUT if lane.terminal and self._input else IN
            self._loop.watch(lane.source, events, lambda events: self._ready(lane, events))

    def _ready(self, lane: capture.Lane, events: int) -> None:
        if events & OUT:  # a terminal is both ways
            self._write_input()
        if events & ~OUT and lane.source >= 0:
            if self._may_pump(lane):
                self._pump(lane, once=True)
            else:
                self._held_back.add(lane.name)
                self._loop.unwatch(lane.source)  # until the reader catches up, see `caught_up`

    def _may_pump(self, lane: capture.Lane) -> bool:
        return all(lane.end - reader.positions.get(lane.name, lane.end) < _HOLD for reader in self.attachments)

    def caught_up(self) -> None:
        """An attached reader took bytes or left: a lane that waited for it may go on."""
        for name in list(self._held_back):
            if self._may_pump(self.lanes[name]):
                self._watch_lane(self.lanes[name])

    def _pump(self, lane: capture.Lane, once: bool = False) -> None:
        had_file, before = lane.file, -1
        while lane.source >= 0 and before != lane.end:
            before = lane.end
            if not lane.pump():
                self._loop.unwatch(lane.source)  # first: PID 1's duplicate would keep the watch alive
                lane.close_source()
                if lane.terminal:
                    self._close_stdin()
            if once or not self._may_pump(lane):
                break
        if had_file < 0 <= lane.file:
            self._owner.keeper.keep(self)
        for attachment in list(self.attachments):
            attachment.feed()
        self._check_finished()

    # -- input

    def write(self, data: bytes, charge: int = 0, stream: Stream | None = None) -> None:
        """Give the command input. `stream` gets its credit back as the command reads. Raises Fault without a stdin."""
        if self.stdin < 0 and not self._input_ended and not self.ended:
            raise Fault("failed_precondition", f"the command {self.id} was started without input")
        self._input.append((memoryview(data), charge, stream))
        self._write_input()

    def end_input(self) -> None:
        """End of file, after what is still to be written."""
        self._input_ended = True
        if self.tty and self.stdin >= 0:
            self._input.append((memoryview(_END_OF_TEXT), 0, None))
        self._write_input()

    def resize(self, rows: int, cols: int) -> None:
        """Change the terminal's size; without a terminal nothing happens."""
        if self.tty and self.stdin >= 0:
            spawn.resize(self.stdin, rows, cols)

    def _write_input(self) -> None:
        while self._input:
            data, charge, stream = self._input[0]
            taken = self._feed_input(data)
            if taken < 0:
                return
            if taken < len(data):
                self._input[0] = (data[taken:], charge, stream)
                continue
            self._input.popleft()
            if stream is not None:
                stream.took(charge)
        if self.tty:
            self._watch_input(False)
        elif self._input_ended:
            self._close_stdin()
        else:
            self._watch_input(False)

    def _feed_input(self, data: memoryview) -> int:
        """Bytes written; all of them when nobody reads any more; -1: wait."""
        if self.stdin < 0:
            return len(data)
        try:
            return os.write(self.stdin, data)
        except BlockingIOError:
            self._watch_input(True)
            return -1
        except OSError:  # EPIPE: the command closed its input
            return len(data)

    def _watch_input(self, wanted: bool) -> None:
        if self.stdin < 0:
            return
        if self.tty:
            lane = self.lanes["stdout"]
            if lane.source >= 0:
                self._loop.watch(self.stdin, IN | OUT if wanted else IN, lambda events: self._ready(lane, events))
        elif wanted:
            self._loop.watch(self.stdin, OUT, lambda _events: self._write_input())
        else:
            self._loop.unwatch(self.stdin)

    def _close_stdin(self) -> None:
        if self.stdin < 0 or (self.tty and self.lanes["stdout"].source >= 0):
            return
        self._loop.unwatch(self.stdin)
        os.close(self.stdin)
        self.stdin = -1
        self._owner.keeper.drop_stdin(self.id)
        self._write_input()

    # -- telling

    def info(self) -> dict[str, Any]:
        """The host's models.ExecInfo."""
        told: dict[str, Any] = {
            "id": self.id, "argv": self.argv, "user": self.user, "cwd": self.cwd, "tty": self.tty, "pid": self.pid,
            "running": not self.finished, "exit_code": self.exit_code, "signal": self.signal,
            "timed_out": self.timed_out, "started_at": self.started_at, "ended_at": self.ended_at,
        }  # fmt: skip
        for name in ("stdout", "stderr"):
            lane = self.lanes.get(name)
            told[f"{name}_bytes"] = lane.end if lane else 0
            told[f"{name}_start"] = lane.start if lane else 0
        return told

    def save(self) -> None:
        """Leave a record for a later boot (PID 1 has one for a later agent). Losing it loses no output."""
        directory = self._owner.directory(self.id)
        try:
            os.makedirs(directory, 0o700, exist_ok=True)
            with open(directory + "/info.json", "wb") as file:
                file.write(codec.dumps({**self.info(), "boot_id": self._owner.boot_id}))
        except OSError:
            pass


class Owner:
    """What a command needs from the table that it is in (execs.Execs implements it)."""

    loop: Loop
    keeper: Keeper
    boot_id: str

    def directory(self, ident: str) -> str:
        """Where the command's capture files are."""
        raise NotImplementedError

    def finished(self, command: Command) -> None:
        """The command is over; it may be forgotten when there are many."""
        raise NotImplementedError
