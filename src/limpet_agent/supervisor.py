"""PID 1 of the guest. It must not fail: little code, no threads, nothing that can block.

It imports everything the agent needs and forks the agent (no second interpreter, no second import), reaps what
nobody else reaps, holds duplicates of running commands' descriptors, and forks a new agent when one dies. As an
ordinary process (tests) it does the same for the descendants that it is made the reaper of.
"""

from __future__ import annotations

import os
import select
import sys
import time
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_SEQPACKET, SOCK_STREAM, socketpair
from _socket import socket as Socket

from limpet_agent import boot, config, execs, keeper, system
from limpet_agent.agent import Agent
from limpet_agent.agentlog import Log
from limpet_agent.faults import Fault
from limpet_agent.signals import native as signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_RESTART_PAUSES = (0.0, 0.0, 0.02, 0.05, 0.1, 0.5, 2.0)  # seconds before the n-th start in a row
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)  # by PID 1
_STEADY = 10.0  # an agent that lived this long was well


class Supervisor:
    """Owns the agent process and what must outlive it."""

    def __init__(self, settings: config.Config) -> None:
        self._config = settings
        self._log = Log(settings.log)
        self._held: dict[str, keeper.Held] = {}
        self._ended: dict[str, dict[str, Any]] = {}  # what is known of commands that are over, the oldest first
        self._listener = _listen(settings.listen) if settings.listen else None
        self._wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._socket: Socket | None = None
        self._agent = 0
        self._born = 0.0
        self._failures = 0
        self._starts = 0
        self._start_at: float | None = 0.0
        self._thaw_at: float | None = None
        self._boot_id = system.boot_id()  # the kernel's own, read before it may be covered by a renewed one

    def run(self) -> None:
        """Supervise until the machine is powered off (or, as an ordinary process, asked to stop)."""
        while True:
            if self._start_at is not None and self._start_at <= time.monotonic():
                self._start_agent()
            try:
                if self._thaw_at is not None and self._thaw_at <= time.monotonic():
                    self._thaw()
                self._turn()
            except (OSError, Fault) as error:
                self._log("supervisor", error=repr(error))

    def _turn(self) -> None:
        due = [moment for moment in (self._start_at, self._thaw_at) if moment is not None]
        patience = max(min(due) - time.monotonic(), 0) * 1000 if due else None
        for fd, _events in self._poll.poll(patience):
            if fd == self._wake:
                _drain(fd)
            else:
                self._listen_to_agent()
        self._reap()

    # -- the agent

    def _start_agent(self) -> None:
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK)
        self._start_at = None
        self._starts += 1
        self._born = time.monotonic()
        self._agent = os.fork()
        if self._agent == 0:
            ours.close()
            self._be_agent(theirs)
        theirs.close()
        self._socket = ours
        self._poll.register(ours.fileno(), select.POLLIN)

    def _be_agent(self, socket: Socket) -> None:
        """In the child; never returns."""
        try:
            signal.set_wakeup_fd(-1)
            for number in (*_IGNORED, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            Agent(self._config, socket, self._listener, self._held, self._ended, self._starts, self._boot_id).run()
        except BaseException as error:
            self._log("agent failed", error=repr(error))
        finally:
            os._exit(1)

    def _agent_died(self, status: int) -> None:
        self._log("agent died", status=status)
        if self._socket is not None:
            self._drain_agent()
            self._poll.unregister(self._socket.fileno())
            self._socket.close()
            self._socket = None
        if self._thaw_at is not None:
            self._thaw()
        self._agent = 0
        self._failures = 0 if time.monotonic() - self._born > _STEADY else self._failures + 1
        pause = _RESTART_PAUSES[min(self._failures, len(_RESTART_PAUSES) - 1)]
        self._start_at = time.monotonic() + pause

    def _drain_agent(self) -> None:
        """Hear its last words: it may just have handed over a command."""
        try:
            while self._socket is not None and (received := keeper.receive(self._socket)) is not None:
                self._obey(*received)
        except (BlockingIOError, Fault):
            pass

    def _listen_to_agent(self) -> None:
        if self._socket is None:
            return
        try:
            received = keeper.receive(self._socket)
        except BlockingIOError:
            return
        if received is None:  # its end is being closed: SIGCHLD is about to come
            self._poll.unregister(self._socket.fileno())
            self._poll.register(self._socket.fileno(), 0)
            self._reap()
        else:
            self._obey(*received)

    def _obey(self, message: dict[str, Any], fds: list[int]) -> None:
        if "keep" in message:
            held = self._held.setdefault(message["keep"], keeper.Held(message["about"]))
            held.about = message["about"]
            held.fds.update(zip(message["fds"], fds, strict=False))
        elif "forget" in message:
            held_or_none = self._held.pop(message["forget"], None)
            if held_or_none is not None:
                held_or_none.close()
            self._remember(message["forget"], message["info"])
        elif "drop_stdin" in message and message["drop_stdin"] in self._held:
            self._held[message["drop_stdin"]].close("stdin")
        elif "frozen" in message:
            seconds = message["frozen"]
            self._thaw_at = None if seconds is None else time.monotonic() + seconds
        elif "poweroff" in message:
            boot.poweroff(self._config, [held.about["pid"] for held in self._held.values()], self._agent)

    def _thaw(self) -> None:
        """The agent froze file systems and did not thaw them."""
        from limpet_agent import freezing

        self._thaw_at = None
        freezing.thaw(freezing.file_systems())
        self._log("thawed without the agent")

    def _remember(self, ident: str, info: dict[str, Any] | None) -> None:
        if info is None:
            self._ended.pop(ident, None)
            return
        self._ended[ident] = info
        while len(self._ended) > execs.KEEP_ENDED:
            del self._ended[next(iter(self._ended))]

    # -- other people's children

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid == self._agent:
                self._agent_died(status)
            else:
                self._orphan_ended(pid, status)

    def _orphan_ended(self, pid: int, status: int) -> None:
        for held in self._held.values():
            if held.about["pid"] == pid and held.status is None:
                held.status = status
                if self._socket is not None:
                    keeper.send(self._socket, {"ended": pid, "status": status})


def _listen(path: str) -> Socket:
    listener = Socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(4)
    return listener


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        pass


def _adopt_orphans() -> None:
    """Let orphaned descendants become our children, as they do for PID 1 (prctl(2))."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main(argv: list[str]) -> int:
    """Be PID 1, or with `--listen` an ordinary process. Returns only when the command line is wrong."""
    try:
        settings = config.parse(argv)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if settings.local:
        os.makedirs(settings.state, 0o700, exist_ok=True)
        _adopt_orphans()
    else:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        boot.prepare(settings)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    Supervisor(settings).run()
    return 0
