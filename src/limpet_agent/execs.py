"""All commands of this guest: starting, finding, forgetting them, and taking them over from an agent that died."""

from __future__ import annotations

import os
import time
from collections import OrderedDict

from limpet_agent import codec, spawn, users
from limpet_agent.attach import Attachment
from limpet_agent.capture import Lane
from limpet_agent.commands import Command, Owner
from limpet_agent.faults import Fault, from_os
from limpet_agent.loop import IN, Loop
from limpet_agent.signals import number_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from limpet_agent.keeper import Held, Keeper
    from limpet_agent.streams import Stream

KEEP_ENDED = 50
_LONGEST_ARGUMENT = 128 << 10  # MAX_ARG_STRLEN, execve(2)


class Execs(Owner):
    """The table of commands, by id."""

    def __init__(self, loop: Loop, keeper: Keeper, state: str, boot_id: str, protect: bool) -> None:
        self.loop, self.keeper, self.boot_id = loop, keeper, boot_id
        self._root = state + "/exec"
        self._protect = protect
        self._commands: dict[str, Command] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._loaded = False

    def directory(self, ident: str) -> str:
        """Where the command's capture files are."""
        return f"{self._root}/{ident}"

    def find(self, ident: object) -> Command:
        """The command with this id. Raises Fault(not_found)."""
        if isinstance(ident, str) and ident in self._commands:
            return self._commands[ident]
        self._load()
        if isinstance(ident, str) and ident in self._commands:
            return self._commands[ident]
        raise Fault("not_found", f"no such command {ident!r}", "its output may have made room for newer ones")

    def all(self) -> list[Command]:
        """Every command, the oldest first."""
        self._load()
        return sorted(self._commands.values(), key=lambda command: command.started_at)

    def finished(self, command: Command) -> None:
        """Count a command among the ended ones; forget the oldest of too many."""
        self._ended[command.id] = None
        while len(self._ended) > KEEP_ENDED:
            self._forget(self._ended.popitem(last=False)[0])

    # -- starting

    def start(self, params: dict[str, Any], done: Callable[[Command], None], failed: Callable[[Fault], None]) -> None:
        """Start what exec.start asks for; exactly one of the callbacks follows. Raises Fault for bad parameters."""
        ident = _ident(params.get("id"))
        if ident in self._commands:
            raise Fault("already_exists", f"the command id {ident} is taken")
        argv, env = _argv(params.get("argv")), _env(params.get("env") or {})
        user = users.find(str(params.get("user") or users.default_user()))
        tty = bool(params.get("tty"))
        cwd = params.get("cwd")
        if cwd is not None and (not isinstance(cwd, str) or "\0" in cwd or not cwd):
            raise Fault("bad_request", "cwd must be a path")
        command = Command(self, ident, argv, user.name, cwd or user.home, tty)
        timeout = params.get("timeout")
        if isinstance(timeout, int | float) and timeout > 0:
            command.deadline = time.monotonic() + timeout
        environment = spawn.environment(user, tty, users.image().get("env"), env)
        theirs = self._descriptors(command, params, user)
        plan = spawn.Plan(argv, environment, cwd, user, tty, theirs)
        self._commands[ident] = command
        try:
            pid, reader = spawn.fork(plan, self._protect)
        except OSError as error:
            self._abandon(command)
            raise from_os(error, "cannot fork") from None
        finally:
            for fd in set(theirs):
                os.close(fd)
        self._await_exec(command, plan, pid, reader, done, failed)

    def _await_exec(
        self, command: Command, plan: spawn.Plan, pid: int, reader: int,
        done: Callable[[Command], None], failed: Callable[[Fault], None],
    ) -> None:  # fmt: skip
        report = bytearray()

        def spoke(_events: int) -> None:
            try:
                while piece := os.read(reader, 8192):
                    report.extend(piece)
            except BlockingIOError:
                return
            self.loop.unwatch(reader)
            os.close(reader)
            if report:
                os.waitpid(pid, 0)  # it is about to end
                self._abandon(command)
                failed(spawn.explain(bytes(report), plan))
            else:
                command.begin(pid, child=True)
                self.keeper.keep(command)  # before anybody is told that it runs
                done(command)

        self.loop.watch(reader, IN, spoke)

    def _descriptors(self, command: Command, params: dict[str, Any], user: users.User) -> tuple[int, int, int]:
        """Pipes or a terminal: ours go into the command, theirs are returned (to be closed after the fork)."""
        base = self.directory(command.id)
        if command.tty:
            rows, cols = _size(params.get("rows"), 24), _size(params.get("cols"), 80)
            ours, terminal = spawn.open_terminal(user, rows, cols)
            command.stdin = ours
            command.lanes["stdout"] = Lane("stdout", base + "/stdout", ours, terminal=True)
            return terminal, terminal, terminal
        theirs = []
        if params.get("stdin"):
            reader, command.stdin = os.pipe()
            os.set_blocking(command.stdin, False)
            theirs.append(reader)
        else:
            theirs.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for name in ("stdout", "stderr"):
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            command.lanes[name] = Lane(name, f"{base}/{name}", reader, terminal=False)
            theirs.append(writer)
        return theirs[0], theirs[1], theirs[2]

    def _abandon(self, command: Command) -> None:
        self._commands.pop(command.id, None)
        for lane in command.lanes.values():
            lane.close()
        if command.stdin >= 0:
            os.close(command.stdin)
            command.stdin = -1

    # -- taking over, remembering, forgetting

    def adopt(self, held: dict[str, Held], ended: dict[str, dict[str, Any]]) -> None:
        """Take over what an earlier agent of this boot had started, and know what had ended."""
        for info in ended.values():
            self.finished(self._restore(info))
        for ident, record in held.items():
            about, fds = record.about, record.fds
            command = Command(self, ident, about["argv"], about["user"], about["cwd"], about["tty"])
            command.started_at, command.deadline = about["started_at"], about["deadline"]
            command.stdin = os.dup(fds["stdin"]) if "stdin" in fds else -1
            for name in about["lanes"]:
                source = command.stdin if command.tty else (os.dup(fds[name]) if name in fds else -1)
                path = f"{self.directory(ident)}/{name}"
                file = os.dup(fds[name + ".file"]) if name + ".file" in fds else _existing(path)
                command.lanes[name] = Lane(name, path, source, terminal=command.tty, file=file)
            self._commands[ident] = command
            self.keeper.adopted(ident, record)
            command.begin(about["pid"], child=False)
            self.keeper.keep(command)
            if record.status is not None:
                command.process_ended(record.status)

    def orphan_ended(self, pid: int, status: int) -> None:
        """PID 1 reaped a process that an earlier agent had started."""
        for command in list(self._commands.values()):
            if command.pid == pid and not command.ended:
                command.process_ended(status)

    def _load(self) -> None:
        """Learn of commands that ended before this agent started (or that a power cut ended)."""
        if self._loaded:
            return
        self._loaded = True
        try:
            names = os.listdir(self._root)
        except OSError:
            return
        for name in names:
            if name not in self._commands:
                self._load_one(name)
        for command in sorted(self._commands.values(), key=lambda one: one.started_at):
            if command.finished:
                self._ended.pop(command.id, None)
                self.finished(command)

    def _load_one(self, ident: str) -> None:
        try:
            with open(self.directory(ident) + "/info.json", "rb") as file:
                self._restore(codec.loads(file.read(1 << 20)))
        except (OSError, Fault, KeyError, TypeError):
            _remove(self.directory(ident))

    def _restore(self, told: dict[str, Any]) -> Command:
        """A command that is over, from its `info`; the output files may be longer than it says after a power cut."""
        ident = told["id"]
        command = Command(self, ident, told["argv"], told["user"], told["cwd"], told["tty"])
        command.exit_code, command.signal = told["exit_code"], told["signal"]
        command.pid, command.timed_out = told["pid"], told["timed_out"]
        command.started_at, command.ended_at = told["started_at"], told["ended_at"]
        for name in ("stdout", "stderr"):
            lane = Lane(name, f"{self.directory(ident)}/{name}", -1, terminal=False)
            lane.start = told[name + "_start"]
            lane.end = os.stat(lane.path).st_size if os.path.exists(lane.path) else 0
            command.lanes[name] = lane
        command.ended = command.finished = True
        self._commands[ident] = command
        return command

    def _forget(self, ident: str) -> None:
        command = self._commands.pop(ident, None)
        if command is not None:
            self.keeper.forget(ident)
            for lane in command.lanes.values():
                if lane.source >= 0:
                    self.loop.unwatch(lane.source)
                lane.close()
        _remove(self.directory(ident))

    # -- operations

    def op_start(self, stream: Stream, params: dict[str, Any]) -> None:
        """exec.start"""

        early: list[tuple[int, bytes]] = []
        stream.on_data = lambda charge, data: early.append((charge, data))

        def started(command: Command) -> None:
            stream.send_message({"started": {"id": command.id, "pid": command.pid}})
            if params.get("detach"):
                stream.end()
            elif stream.open:
                offsets = dict.fromkeys(command.lanes, 0)
                Attachment(stream, command, offsets, stdin=bool(params.get("stdin")) or command.tty).begin(early)

        self.start(params, started, stream.reset)

    def op_attach(self, stream: Stream, params: dict[str, Any]) -> None:
        """exec.attach"""
        command = self.find(params.get("id"))
        offsets: dict[str, int] = {}
        for name in ("stdout", "stderr"):
            offset = params.get(name, 0)
            if offset is None or name not in command.lanes:
                continue
            if not isinstance(offset, int) or not 0 <= offset <= command.lanes[name].end:
                raise Fault("bad_request", f"{name} has {command.lanes[name].end} bytes, none at {offset!r}")
            offsets[name] = offset
        stdin, steal = bool(params.get("stdin")), bool(params.get("steal"))
        attachment = Attachment(stream, command, offsets, stdin=stdin, steal=steal)
        stream.send_message({"attached": command.info()})
        attachment.begin()

    def op_list(self, stream: Stream, _params: dict[str, Any]) -> None:
        """exec.list: one message per command, for the argv may be long."""
        for command in self.all():
            stream.send_message({"execs": [command.info()]})
        stream.end()

    def op_get(self, stream: Stream, params: dict[str, Any]) -> None:
        """exec.get"""
        stream.answer({"exec": self.find(params.get("id")).info()})

    def op_signal(self, stream: Stream, params: dict[str, Any]) -> None:
        """exec.signal"""
        number = number_of(params.get("signal"))
        self.find(params.get("id")).kill(number)
        stream.answer({"ok": True})

    def op_wait(self, stream: Stream, params: dict[str, Any]) -> None:
        """exec.wait"""
        command = self.find(params.get("id"))

        def ended() -> None:
            stream.answer({"exec": command.info()})

        if command.finished:
            ended()
            return
        command.waiters.append(ended)
        timeout = params.get("timeout")
        if isinstance(timeout, int | float):
            fault = Fault("deadline", f"the command {command.id} still runs after {timeout:g} s")

            def late() -> None:
                if not command.finished:
                    stream.reset(fault)

            self.loop.after(max(timeout, 0), late)
        stream.on_gone = lambda: command.waiters.remove(ended) if ended in command.waiters else None

    def op_stdin(self, stream: Stream, params: dict[str, Any]) -> None:
        """exec.stdin: input without attaching; END keeps the command's input open unless `eof`."""
        command = self.find(params.get("id"))
        if command.ended:
            raise Fault("failed_precondition", f"the command {command.id} has ended")
        eof = bool(params.get("eof"))

        def ended() -> None:
            if eof:
                command.end_input()
            stream.answer({"ok": True})

        stream.on_data = lambda charge, data: command.write(data, charge, stream)
        stream.on_end = ended


def _existing(path: str) -> int:
    """A capture file that the last agent made but had no time to hand over, at its end; -1 when there is none."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1
    os.lseek(fd, 0, os.SEEK_END)
    return fd


def _remove(directory: str) -> None:
    for name in ("stdout", "stderr", "info.json"):
        try:
            os.unlink(f"{directory}/{name}")
        except OSError:
            pass
    try:
        os.rmdir(directory)
    except OSError:
        pass


def _ident(value: object) -> str:
    if isinstance(value, str) and 0 < len(value) <= 64 and value.replace("_", "").replace("-", "").isalnum():
        return value
    raise Fault("bad_request", f"{value!r} is not a command id")


def _argv(value: object) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        raise Fault("bad_request", "argv must be a list of strings, the command first")
    if not value[0] or any("\0" in word for word in value):
        raise Fault("bad_request", "a command and its arguments cannot be empty or hold NUL bytes")
    if any(len(word) >= _LONGEST_ARGUMENT for word in value):
        raise Fault("bad_request", f"an argument is longer than {_LONGEST_ARGUMENT >> 10} KiB", "send it on stdin")
    return value


def _env(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Fault("bad_request", "env must map names to values")
    for name, text in value.items():
        if not isinstance(text, str) or not name or "=" in name or "\0" in name + text:
            raise Fault("bad_request", f"{name!r} is not a valid environment variable")
    return value


def _size(value: object, default: int) -> int:
    return value if isinstance(value, int) and 0 < value < 65536 else default
