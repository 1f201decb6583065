"""The agent proper: one process that serves the channel. It may die; PID 1 starts another (supervisor.py)."""

from __future__ import annotations

import os
import time
from _thread import allocate_lock, start_new_thread

from limpet_agent import PROTOCOL, VERSION, links, system
from limpet_agent.agentlog import Log
from limpet_agent.config import Config
from limpet_agent.doorstep import Doorstep
from limpet_agent.execs import Execs
from limpet_agent.faults import Fault, Gone, from_os
from limpet_agent.intake import Intake
from limpet_agent.keeper import Held, Keeper, receive
from limpet_agent.loop import IN, Loop
from limpet_agent.streams import Mux, Stream
from limpet_agent.workers import Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable
    from typing import Any

    from limpet_agent.freezing import Standstill
    from limpet_agent.runtime import Runtime
    from limpet_agent.volumes import Volumes

    Params = dict[str, Any]

_DATA_PATIENCE = 30.0  # seconds that operations wait for the data disk
_DATA_LOOK = 0.01
_FROZEN_AT_MOST = 30.0  # seconds
# Part of the end of every machine: those without a container runtime answer at once, without importing it.
_NO_RUNTIME: dict[str, Params] = {"stop": {"stopped": [], "killed": []}, "go_on": {"ok": True}}


class Agent:
    """Everything that lives as long as this process."""

    def __init__(
        self, config: Config, supervisor: Socket, listener: Socket | None, held: dict[str, Held],
        ended: dict[str, Params], starts: int, boot_id: str,
    ) -> None:  # fmt: skip
        self.config = config
        self.log = Log(config.log)
        self.loop = Loop(lambda error: self.log("callback failed", error=repr(error), at=_where(error)))
        self._starts = starts
        self._supervisor = supervisor
        self._keeper = Keeper(supervisor, self.log)
        # The kernel's own, by which commands of this boot are known; what `ping` tells may have been renewed.
        self._execs = Execs(self.loop, self._keeper, config.state, boot_id, protect=not config.local)
        self._execs.adopt(held, ended)
        self._intake: Intake | None = None
        self._waiting: list[Callable[[], None]] = []
        self._data = "ready" if config.local else "waiting"
        self._began = time.monotonic()
        link = self._link(listener)
        self._standstill: Standstill | None = None
        self._volumes: Volumes | None = None
        self._runtime: Runtime | None = None
        self._doorstep = Doorstep(config.docker)
        self._host = link
        self.mux = Mux(link, self._opened, self._open_intake, self.log)
        self.loop.before_wait = self.mux.flush
        self._short: dict[str, Callable[[Stream, Params], None]] = {
            "ping": self._ping, "system": self._system, "hostname": self._hostname, "log": self._send_log,
            "poweroff": self._thawed(self._poweroff), "renew": self._thawed(self._renew), "warm": self._warm,
            "fs.thaw": self._thaw,
        }  # fmt: skip
        execs = self._execs
        self._after_data: dict[str, Callable[[Stream, Params], None]] = {
            "exec.start": execs.op_start, "exec.attach": execs.op_attach, "exec.list": execs.op_list,
            "exec.get": execs.op_get, "exec.signal": execs.op_signal, "exec.wait": execs.op_wait,
            "exec.stdin": execs.op_stdin, "tcp.connect": self._connect_tcp, "sync": self._of_files("sync"),
            "unix.connect": self._connect_unix, "fs.freeze": self._freeze, "vol.watch": self._watch_volumes,
        }  # fmt: skip
        for name in ("stat", "list", "read", "write", "mkdir", "rename", "remove", "pack", "unpack"):
            self._after_data["fs." + name] = self._of_files(name)
        for name in ("state", "snapshot", "send", "forget", "create", "remove"):
            self._after_data["vol." + name] = self._of_volumes(name)
        for name in ("ensure", "status", "stop", "go_on", "log", "containers"):
            self._after_data["rt." + name] = self._of_runtime(name)
        self.loop.watch(supervisor.fileno(), IN, self._told)
        link.start()

    def run(self) -> None:
        """Serve until the process ends."""
        self.log("agent started", version=VERSION, starts=self._starts)
        self._look_for_data()
        self.loop.run()

    def _link(self, listener: Socket | None) -> links.PortLink | links.SocketLink:
        if listener is not None:
            return links.SocketLink(self.loop, listener)
        for _ in range(500):  # the port appears a moment after its module
            device = links.find_port()
            if device is not None:
                return links.PortLink(self.loop, device)
            time.sleep(0.01)
        raise SystemExit("no virtio port named " + links.PORT_NAME)

    def _open_intake(self) -> Intake:
        if self._intake is None:
            self._intake = Intake(self.config.intake if self.config.local else links.find_disk("intake"))
        return self._intake

    def _told(self, _events: int) -> None:
        try:
            received = receive(self._supervisor)
        except BlockingIOError:
            return
        if received is None:
            os._exit(1)  # no PID 1, no agent
        message = received[0]
        if "ended" in message:
            self._execs.orphan_ended(message["ended"], message["status"])

    # -- operations

    def _opened(self, stream: Stream, params: Params) -> None:
        op, op_id = params.get("op"), params.get("op_id")
        stream.op_id = op_id if isinstance(op_id, str) else None
        if not isinstance(op, str):
            raise Fault("bad_request", "the request names no operation")
        if op != "ping" and not op.startswith("vol."):  # several times a second
            self.log(op, stream.op_id)
        if op in self._short:
            self._guarded(self._short[op], stream, params)
        elif op in self._after_data:
            handler = self._after_data[op]
            if self._data == "waiting" or self._standstill is not None:
                self._waiting.append(lambda: self._guarded(handler, stream, params))
            else:
                self._guarded(handler, stream, params)
        else:
            raise Fault("unimplemented", f"this agent ({VERSION}) has no operation '{op}'", "restart the sandbox")

    def _guarded(self, handler: Callable[[Stream, Params], None], stream: Stream, params: Params) -> None:
        """Run a handler; whatever it raises ends its stream and nothing else."""
        try:
            handler(stream, params)
        except Fault as fault:
            self.log("refused", stream.op_id, code=fault.code, message=fault.message)
            stream.reset(fault)
        except OSError as error:
            stream.reset(from_os(error))
        except Exception as error:
            self.log("operation failed", stream.op_id, error=repr(error), at=_where(error))
            stream.reset(Fault("internal", f"the guest agent failed: {error!r}"))

    def _of_files(self, name: str) -> Callable[[Stream, Params], None]:
        """A handler that runs an operation of files.py in a thread of its own, and imports it there."""

        def run(worker: Worker, params: Params) -> None:
            from limpet_agent import files

            files.OPERATIONS[name](worker, params)

        return lambda stream, params: self._in_thread(name, run, stream, params)

    def _of_volumes(self, name: str) -> Callable[[Stream, Params], None]:
        return lambda stream, params: self._in_thread(name, self._have_volumes().operations[name], stream, params)

    def _watch_volumes(self, stream: Stream, params: Params) -> None:
        self._have_volumes().watch(stream, params)

    def _have_volumes(self) -> Volumes:
        from limpet_agent.volumes import Volumes

        if self._volumes is None:
            self._volumes = Volumes(self.loop, self.config.data, self.log)
        return self._volumes

    def _of_runtime(self, name: str) -> Callable[[Stream, Params], None]:
        def handle(stream: Stream, params: Params) -> None:
            if name in _NO_RUNTIME and not self._uses_runtime():
                stream.answer(_NO_RUNTIME[name])
            else:
                self._in_thread(name, self._have_runtime().operations[name], stream, params)

        return handle

    def _uses_runtime(self) -> bool:
        return self._runtime is not None or any(map(os.path.exists, (self.config.autostart, self.config.docker)))

    def _have_runtime(self) -> Runtime:
        from limpet_agent.runtime import Runtime

        if self._runtime is None:
            self._runtime = Runtime(self.loop, self.config, self.log, self._doorstep)
        return self._runtime

    def _let_wait(self) -> None:
        """Commands that use the container engine find it, or wait for it."""
        try:
            self._doorstep.open()
        except OSError as error:
            self.log("no doorstep", error=repr(error))

    def _bring_runtime_back(self) -> None:
        """In a thread of its own: the loop need not wait for the imports."""
        from limpet_agent import runtime  # noqa: F401

        self.loop.from_thread(lambda: self._have_runtime().come_back())

    def _in_thread(
        self, name: str, operation: Callable[[Worker, Params], None], stream: Stream, params: Params
    ) -> None:  # fmt: skip
        lock = allocate_lock()
        lock.acquire()
        worker = Worker(stream, self.loop.from_thread, lock)
        start_new_thread(self._work, (name, operation, worker, params, stream.op_id))

    def _work(
        self, name: str, operation: Callable[[Worker, Params], None], worker: Worker, params: Params, op_id: str | None
    ) -> None:  # fmt: skip
        try:
            operation(worker, params)
            worker.finish()
        except Gone:
            self.log("abandoned", op_id, op=name)
        except Fault as fault:
            self.log("refused", op_id, code=fault.code, message=fault.message)
            worker.fail(fault)
        except OSError as error:
            worker.fail(from_os(error))
        except Exception as error:
            self.log("operation failed", op_id, error=repr(error), at=_where(error))
            worker.fail(Fault("internal", f"the guest agent failed: {error!r}"))

    def _ping(self, stream: Stream, params: Params) -> None:
        if params.get("time_ns") is not None:
            system.set_clock(params["time_ns"])
        stream.answer({
            "version": VERSION, "protocol": PROTOCOL, "boot_id": system.boot_id(), "time_ns": time.time_ns(),
            "agent_pid": os.getpid(), "agent_starts": self._starts, "uptime": system.uptime(), "data": self._data,
        })  # fmt: skip

    def _system(self, stream: Stream, _params: Params) -> None:
        stream.answer(system.info())

    def _hostname(self, stream: Stream, params: Params) -> None:
        system.set_hostname(params.get("name"))
        stream.answer({"ok": True})

    def _send_log(self, stream: Stream, params: Params) -> None:
        tail = params.get("tail")
        text = self.log.tail(tail if isinstance(tail, int) else 1000)
        for at in range(0, len(text), 64 << 10):
            stream.send(text[at : at + (64 << 10)])
        stream.end()

    def _connect_tcp(self, stream: Stream, params: Params) -> None:
        from limpet_agent import relay

        relay.connect_tcp(self.loop, stream, params)

    def _connect_unix(self, stream: Stream, params: Params) -> None:
        from limpet_agent import relay

        relay.connect_unix(self.loop, stream, params)

    def _poweroff(self, stream: Stream, _params: Params) -> None:
        stream.answer({"ok": True})
        self.loop.after(0.01, self._keeper.poweroff)  # let the answer leave first

    # -- identity, and standing still

    def _renew(self, stream: Stream, params: Params) -> None:
        from limpet_agent import renewal

        self._only_in_a_machine()
        ahead = renewal.run_ahead()
        answer = renewal.renew(params)
        if ahead:
            fd = os.pidfd_open(ahead)
            self.loop.watch(fd, IN, lambda _events: self._reap(ahead, fd))
        self.log("renewed", stream.op_id, failed=answer["failed"])
        stream.answer(answer)

    def _reap(self, pid: int, pidfd: int) -> None:
        self.loop.unwatch(pidfd)
        os.close(pidfd)
        os.waitpid(pid, 0)

    def _warm(self, stream: Stream, _params: Params) -> None:
        from limpet_agent import renewal

        renewal.warm()
        if not self.config.local:
            renewal.cover_boot_id()
        stream.answer({"ok": True})

    def _freeze(self, stream: Stream, params: Params) -> None:
        """From now until the thaw only the channel is served: nothing here may wait for a frozen disk."""
        from limpet_agent.freezing import Standstill

        self._only_in_a_machine()
        seconds = params.get("seconds")
        if not isinstance(seconds, (int, float)) or not 0 < seconds <= _FROZEN_AT_MOST:
            raise Fault("bad_request", f"seconds must be between 0 and {_FROZEN_AT_MOST}")
        if stream.open:  # it may have waited for an earlier thaw, and the host gone meanwhile
            self._standstill = Standstill(self.loop, self._keeper, self._go_on)
            self._standstill.begin(self._host.fileno(), seconds, stream.answer)

    def _thaw(self, stream: Stream, _params: Params) -> None:
        if self._standstill is None:
            stream.answer({"was_frozen": False})
        else:
            self._standstill.end(lambda whole: stream.answer({"was_frozen": whole}))

    def _go_on(self) -> None:
        self._standstill = None
        self.log("thawed")
        self._release()

    def _thawed(self, handler: Callable[[Stream, Params], None]) -> Callable[[Stream, Params], None]:
        """A handler for which frozen disks are thawed first, because it writes to them."""

        def after_thaw(stream: Stream, params: Params) -> None:
            if self._standstill is None:
                handler(stream, params)
            else:
                self._standstill.end(lambda _whole: self._guarded(handler, stream, params))

        return after_thaw

    def _only_in_a_machine(self) -> None:
        if self.config.local:
            raise Fault("failed_precondition", "this agent is an ordinary process: the machine is not its own")

    # -- the data disk

    def _look_for_data(self) -> None:
        if self._data != "waiting":
            return
        if os.path.exists(self.config.marks + "/data-ready"):
            self._data = "ready"
        elif os.path.exists(self.config.marks + "/data-failed"):
            self._data = "failed: " + (system.read(self.config.marks + "/data-failed").strip() or "see the console log")
        elif time.monotonic() - self._began > _DATA_PATIENCE:
            self._data = "failed: the data disk was not mounted in time"
        else:
            self.loop.after(_DATA_LOOK, self._look_for_data)
            return
        self.log("data disk", state=self._data)
        comes_back = os.path.exists(self.config.autostart)
        if comes_back:
            self._let_wait()
        self._release()
        if comes_back:
            start_new_thread(self._bring_runtime_back, ())

    def _release(self) -> None:
        """Begin with what had to wait."""
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()


def _where(error: BaseException) -> str:
    """File and line at which an exception was raised; `traceback` would be a large import."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}" if trace is not None else "?"
