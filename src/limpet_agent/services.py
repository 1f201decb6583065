"""A program that runs beside the agent and outlives it: in a session of its own, found again by its pid file, which
also says when it was started, or by who listens on its socket; never by its name."""

from __future__ import annotations

import os
import select
import time
from _thread import start_new_thread

from limpet_agent import probing, servicelog, system
from limpet_agent.doorstep import Doorstep
from limpet_agent.faults import Fault
from limpet_agent.signals import native as signal
from limpet_agent.spawn import PATH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from limpet_agent.ensuring import Attempt

_LOOK = 0.05  # seconds between two looks at one that is starting
_KILLED = 5.0  # seconds that the kernel may need for a SIGKILL
_UNREACHABLE = 20.0  # seconds for one to end that cannot be reached
_REAPED = 1.0  # seconds until its status is known
_QUOTED = 500  # characters of a log's last line
# Not protected from the OOM killer as the agent is; as many open files as Debian's units allow; told, as by systemd,
# that a listening socket is its own.
_ENTER = 'echo 0 >/proc/self/oom_score_adj; ulimit -n 1048576 2>/dev/null; export LISTEN_PID=$$; exec "$@"'
_FIRST_PASSED = 3  # SD_LISTEN_FDS_START


class Service:
    """One of them. `command()`: what to run; `ask`: how to tell whether it answers (probing.py); `doorstep`: where its
    clients wait until it does."""

    def __init__(
        self, name: str, socket: str, ask: Callable[[probing.Call], str | None], command: Callable[[], list[str]],
        run: str, state: str, patience: float, doorstep: Doorstep | None = None,
    ) -> None:  # fmt: skip
        self.name, self.socket, self.patience = name, socket, patience
        self.log = f"{state}/{name}.log"
        self._ask, self._command, self._doorstep = ask, command, doorstep
        self._pid_file = f"{run}/{name}.pid"
        self._end = (0, 0)  # pid and wait status of the last one that ended as our child

    def health(self) -> probing.Health:
        """Asks it."""
        if self._doorstep is not None and self._doorstep.fd >= 0 and not self.noted():
            return probing.Health(probing.NOT_READY, "is about to be started")
        found = probing.look(self.socket, self._ask)
        found.pid = self.noted() or self._stranger(found.pid)
        if found.pid and found.reason is None and found.state == probing.NOT_READY:
            found.reason = "runs, and has no socket yet"
        return found

    def pid(self) -> int | None:
        """The process that runs now, if one does."""
        return self.noted() or self._stranger(probing.look(self.socket, lambda _call: None).pid)

    def noted(self) -> int | None:
        """The process of the pid file, if it is still the same."""
        try:
            with open(self._pid_file, encoding="ascii") as file:
                pid, born = (int(word) for word in file.read().split())
        except (OSError, ValueError):
            return None
        return pid if born and _born(pid) == born else None

    def _stranger(self, pid: int | None) -> int | None:
        """Somebody whom we did not start and may end. Only by its name, too: a socket that was handed over tells the
        process that made it, an agent, whose number may be anybody's by now."""
        return pid if pid and system.read(f"/proc/{pid}/comm").strip() == self.name else None

    # -- starting

    def start(self, attempt: Attempt) -> bool:
        """See that it answers; whether it had to be started. Raises Fault when it ends or does not answer in time."""
        if self._doorstep is not None and self._doorstep.fd >= 0:
            self.stop(_UNREACHABLE)  # one that runs has lost the name of its socket: nobody would find it
        pid, fresh = self.pid(), False
        until = time.monotonic() + self.patience
        while (health := self.health()).state != probing.READY:
            if not _born(pid or 0):  # or not any more: one that was just about to end
                if fresh:
                    raise self._ended(pid)
                attempt.tell(self.name, "running")
                pid, fresh = self._spawn(), True
                until = time.monotonic() + self.patience
            if time.monotonic() > until:
                raise self._late(pid, health)
            attempt.pause(_LOOK)
        attempt.tell(self.name, "done", None if fresh else "runs already")
        return fresh

    def _spawn(self) -> int:
        for path in (self.log, self._pid_file):
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        argv = ["sh", "-c", _ENTER, "sh", *self._command()]
        environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        passed: list[tuple[int, int, int]] = []
        if self._doorstep is not None and self._doorstep.fd >= 0:
            environment["LISTEN_FDS"] = "1"
            passed = [(os.POSIX_SPAWN_DUP2, self._doorstep.fd, _FIRST_PASSED)]
        log, nothing = servicelog.open_end(self.log), os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            pid = os.posix_spawn(
                "/bin/sh", argv, environment, setsid=True,
                file_actions=[(os.POSIX_SPAWN_DUP2, nothing, 0), (os.POSIX_SPAWN_DUP2, log, 1),
                              (os.POSIX_SPAWN_DUP2, log, 2), *passed],
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP, signal.SIGTERM],
            )  # fmt: skip
        finally:
            os.close(log)
            os.close(nothing)
        with open(self._pid_file, "w", encoding="ascii") as file:
            file.write(f"{pid} {_born(pid)}\n")
        start_new_thread(self._reap, (pid,))
        return pid

    def _reap(self, pid: int) -> None:
        self._end = os.waitpid(pid, 0)

    def _ended(self, pid: int | None) -> Fault:
        lines = servicelog.tail(self.log, 20).decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        until = time.monotonic() + _REAPED
        while self._end[0] != pid and time.monotonic() < until:
            time.sleep(_LOOK)
        ended, status = self._end
        how = f" with status {os.waitstatus_to_exitcode(status)}" if ended == pid else ""
        return Fault("unavailable", f"{self.name} ended{how} at its start: {said[-_QUOTED:]}", self._advice())

    def _late(self, pid: int | None, health: probing.Health) -> Fault:
        what = health.reason or "no socket yet"
        return Fault(
            "deadline", f"{self.name} ({pid}) does not answer after {self.patience:g} s: {what}", self._advice()
        )

    def _advice(self) -> str:
        return f"limpet runtime logs NAME {self.name}"

    # -- stopping

    def stop(self, seconds: float) -> str | None:
        """End it: "stopped", "killed" when it did not within so many seconds, None when it did not run."""
        pid = self.pid()
        if not pid:
            return None
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        try:
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            signal.pidfd_send_signal(handle, signal.SIGCONT)
            if _ends(handle, seconds):
                return "stopped"
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            _ends(handle, _KILLED)
            return "killed"
        except ProcessLookupError:
            return "stopped"
        finally:
            os.close(handle)


def _ends(handle: int, seconds: float) -> bool:
    """Wait for the end of a process."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _born(pid: int) -> int:
    """When a process was started, in ticks since the boot (proc(5)); 0 when there is none, or it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
