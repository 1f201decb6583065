"""The operations `rt.…`: the container runtime, asked for, looked at, stopped.

    rt.ensure      {"start"} → {"stage", "state", "detail"} …, {"ensured": {"how", "started", "seconds"}}
    rt.status      {} → {"state", "error", "services": [{"name", "state", "reason", "pid"}], "version", "autostart"}
    rt.stop        {"seconds", "keep"} → {"stopped", "killed"}
    rt.go_on       {} → {"ok"}
    rt.log         {"service", "tail"} → bytes
    rt.containers  {} → {"containers": [one of them]} …

While the file `autostart` is there, the runtime comes with the machine: it is left by whoever asked for the runtime,
and by an image that is made for it; taken away by a stop that is meant to last.
"""

from __future__ import annotations

import os
import time

from limpet_agent import engine, prerequisites, probing, servicelog
from limpet_agent.ensuring import Attempt, Ensuring, Stage
from limpet_agent.faults import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from limpet_agent.config import Config
    from limpet_agent.doorstep import Doorstep
    from limpet_agent.loop import Loop
    from limpet_agent.services import Service
    from limpet_agent.workers import Worker

    Params = dict[str, Any]

_TRIM_EVERY = 10.0  # seconds
_CHUNK = 256 << 10
_LONGEST_STOP = 3600.0  # seconds
_GOES_DOWN = 30.0  # seconds within which a machine goes down after its runtime: until then nobody starts it again
_CONTAINERD = 5.0  # seconds that containerd gets to end; dockerd has what the containers need
_MOST_CONTAINERS = 200


class Runtime:
    """The runtime of this machine."""

    def __init__(self, loop: Loop, config: Config, log: Callable[..., None], doorstep: Doorstep) -> None:
        self._loop, self._config, self._log = loop, config, log
        self._autostart = config.autostart
        self._doorstep = doorstep
        self.services = engine.services(config, doorstep)
        self._ensuring = Ensuring(self._ready, self._drive, self._stay)
        self._trimming = False
        self.operations: dict[str, Callable[[Worker, Params], None]] = {
            "ensure": self.ensure, "status": self.status, "stop": self.stop, "go_on": self.go_on, "log": self.send_log,
            "containers": self.containers,
        }  # fmt: skip

    # -- the operations

    def ensure(self, worker: Worker, params: Params) -> None:
        """rt.ensure"""
        start = params.get("start", True)
        if not isinstance(start, bool):
            raise Fault("bad_request", "start must be true or false")

        def tell(stage: Stage) -> None:
            worker.send_message({"stage": stage.name, "state": stage.state, "detail": stage.detail})

        found = self._ensuring.ensure(tell) if start else self._ensuring.look()
        worker.send_message({"ensured": {"how": found.how, "started": found.started, "seconds": found.seconds}})

    def status(self, worker: Worker, _params: Params) -> None:
        """rt.status"""
        healths = [(service.name, service.health()) for service in self.services]
        ready = all(health.state == probing.READY for _name, health in healths)
        runs = any(health.pid or health.state != probing.NOT_READY for _name, health in healths)
        state, error = self._state(ready, runs)
        worker.send_message({
            "state": state, "error": error.message if error is not None else None,
            "services": [{"name": name, "state": health.state, "reason": health.reason, "pid": health.pid}
                         for name, health in healths],
            "version": engine.version(self.services[-1].socket) if ready else None,
            "autostart": os.path.exists(self._autostart),
        })  # fmt: skip

    def _state(self, ready: bool, runs: bool) -> tuple[str, Fault | None]:
        under_way, error = self._ensuring.state, self._ensuring.error
        if under_way != "idle":
            return under_way, None
        if ready:
            return "ready", None
        obstacle = prerequisites.obstacle(self._config)
        if obstacle is not None and not runs:
            return "unavailable", obstacle
        if error is not None:
            return "failed", error
        return "degraded" if runs or os.path.exists(self._autostart) else "stopped", None

    def stop(self, worker: Worker, params: Params) -> None:
        """rt.stop"""
        seconds, keep = params.get("seconds"), params.get("keep")
        if not isinstance(seconds, (int, float)) or not 0 <= seconds <= _LONGEST_STOP or not isinstance(keep, bool):
            raise Fault("bad_request", f"seconds must be between 0 and {_LONGEST_STOP:g}, keep true or false")
        how = self._ensuring.stop(lambda: self._stop(seconds, keep), _GOES_DOWN if keep else 0)
        killed = [name for name, end in how.items() if end == "killed"]
        self._log("runtime stopped", stopped=list(how), killed=killed, keep=keep)
        worker.send_message({"stopped": list(how), "killed": killed})

    def _stop(self, seconds: float, keep: bool) -> dict[str, str]:
        """dockerd first, which ends the containers; how each of the services that ran ended."""
        if not keep:
            _remove(self._autostart)
        self._doorstep.close(served=False)
        until = time.monotonic() + seconds
        how = {}
        for service in reversed(self.services):
            last = service is self.services[0]
            end = service.stop(_CONTAINERD if last else max(until - time.monotonic(), 0))
            if not last and not self._config.local and engine.kill_containers():
                end = "killed"
            if end is not None:
                how[service.name] = end
        return how

    def go_on(self, worker: Worker, _params: Params) -> None:
        """rt.go_on"""
        self._ensuring.allow()
        self.come_back()
        worker.send_message({"ok": True})

    def come_back(self) -> None:
        """Start in the background what is to come with the machine."""
        if os.path.exists(self._autostart):
            self._loop.from_thread(self._trim)
            self._ensuring.begin()
        elif self._ensuring.state == "idle":  # else it is the one of a first start, or a stop's to close
            self._doorstep.close(served=False)

    def send_log(self, worker: Worker, params: Params) -> None:
        """rt.log"""
        lines = params.get("tail")
        if lines is not None and (not isinstance(lines, int) or lines < 0):
            raise Fault("bad_request", "tail must be a number of lines")
        data = memoryview(servicelog.tail(self._service(params.get("service")).log, lines))
        for at in range(0, len(data), _CHUNK):
            worker.send(data[at : at + _CHUNK])

    def _service(self, name: object) -> Service:
        for service in self.services:
            if service.name == name:
                return service
        raise Fault("bad_request", f"{name!r} is not a service", ", ".join(one.name for one in self.services))

    def containers(self, worker: Worker, _params: Params) -> None:
        """rt.containers"""
        if not self._ready():
            raise Fault("failed_precondition", "the container runtime is not ready", "limpet runtime ensure NAME")
        for each in engine.containers(self.services[-1].socket)[:_MOST_CONTAINERS]:
            worker.send_message({"containers": [each]})

    # -- for the state machine, in its driver's thread

    def _ready(self) -> bool:
        return all(service.health().state == probing.READY for service in self.services)

    def _drive(self, attempt: Attempt) -> list[str]:
        self._log("runtime starts")
        served = False
        try:
            attempt.tell("prerequisites", "running")
            prerequisites.prepare(self._config)
            self._doorstep.open()
            attempt.tell("prerequisites", "done")
            self._loop.from_thread(self._trim)
            started = [service.name for service in self.services if service.start(attempt)]
            served = True
        finally:  # one that is only late has it, and is going to serve
            self._doorstep.close(served=served or self.services[-1].noted() is not None)
        self._log("runtime started", started=started)
        return started

    def _stay(self) -> None:
        """From now on it comes with the machine; with a full disk it does not, which is no reason to call it failed."""
        try:
            if not os.path.exists(self._autostart):
                os.makedirs(os.path.dirname(self._autostart), 0o755, exist_ok=True)
                os.close(os.open(self._autostart, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            self._log("runtime will not come back", error=repr(error))

    # -- its logs

    def _trim(self) -> None:
        """From the first start on, every now and then; in the loop's thread, where there is one of these at a time."""
        if self._trimming:
            return
        self._trimming = True
        self._trim_now()

    def _trim_now(self) -> None:
        for service in self.services:
            try:
                if servicelog.trim(service.log):
                    self._log("log trimmed", service=service.name)
            except OSError as error:
                self._log("log not trimmed", service=service.name, error=repr(error))
        self._loop.after(_TRIM_EVERY, self._trim_now)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
