"""The operations `rt.…` over services that are processes of this machine: what a status says, what a stop leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from limpet_agent import prerequisites, probing, runtime, servicelog
from limpet_agent.config import Config
from limpet_agent.doorstep import Doorstep
from limpet_agent.faults import Fault, Gone
from limpet_agent.loop import Loop
from limpet_agent.runtime import Runtime
from limpet_agent.services import Service
from tests.unit.test_agent_services import PROGRAM

Messages = list[dict[str, Any]]


class Asker:
    """The worker's side of an operation: keeps what would be sent. `gone`: the host has hung up."""

    def __init__(self) -> None:
        self.messages: Messages = []
        self.data = b""
        self.gone = False

    def send_message(self, message: dict[str, Any]) -> None:
        if self.gone:
            raise Gone
        self.messages.append(message)

    def send(self, data: bytes | memoryview) -> None:
        self.data += data


class Machine:
    """A runtime in a directory. `words`: what each of its services is told, see PROGRAM."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = Config(str(root / "chan"), str(root), str(root), None)
        self.words: dict[str, list[str]] = {"containerd": [], "dockerd": []}
        self.again()

    def again(self) -> None:
        """As a new agent would find it."""
        loop = Loop(lambda error: (_ for _ in ()).throw(error))
        self.runtime = Runtime(loop, self.config, lambda _event, **_details: None, Doorstep(self.config.docker))
        self.runtime.services = [self._service(name) for name in self.words]

    def _service(self, name: str) -> Service:
        path = str(self.root / name)
        return Service(
            name, path, probing.ping_docker, lambda: [sys.executable, "-c", PROGRAM, path, *self.words[name]],
            str(self.root / "run"), str(self.root / "state"), 10.0,
        )  # fmt: skip

    def ask(self, op: str, **params: Any) -> Messages:
        asker = Asker()
        self.runtime.operations[op](asker, params)  # type: ignore[arg-type]
        return asker.messages

    def ensure(self, **params: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("ensure", **params)[-1]["ensured"]
        return found

    def status(self) -> dict[str, Any]:
        [status] = self.ask("status")
        return status

    def stop(self, *, keep: bool, seconds: float = 5) -> dict[str, Any]:
        [stopped] = self.ask("stop", keep=keep, seconds=seconds)
        return stopped

    def kill(self, name: str) -> None:
        [service] = [each for each in self.runtime.services if each.name == name]
        pid = service.noted()
        assert pid
        os.kill(pid, signal.SIGKILL)
        _wait_until(lambda: service.noted() is None)


def _wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """One that lacks nothing."""
    monkeypatch.setattr(prerequisites, "prepare", lambda _config: None)
    monkeypatch.setattr(prerequisites, "obstacle", lambda _config: None)
    made = Machine(tmp_path)
    yield made
    for service in made.runtime.services:
        service.stop(0)


def test_a_start_tells_its_stages_and_stays(machine: Machine) -> None:
    """RUN-1, RUN-3: containerd first; from then on it comes with the machine."""
    assert machine.status()["state"] == "stopped"
    assert machine.ensure(start=False)["how"] == "not_ready"
    *stages, last = machine.ask("ensure")
    assert [(each["stage"], each["state"]) for each in stages] == [
        (stage, state) for stage in ("prerequisites", "containerd", "dockerd") for state in ("running", "done")
    ]
    assert last["ensured"]["started"] == ["containerd", "dockerd"]
    assert os.path.exists(machine.config.autostart)
    assert machine.ensure() == {"how": "reused", "started": [], "seconds": pytest.approx(0, abs=1)}
    status = machine.status()
    assert (status["state"], status["error"], status["autostart"]) == ("ready", None, True)


def test_only_what_does_not_run_is_started(machine: Machine) -> None:
    """RUN-3, RUN-2: a killed one is seen; the other one keeps its pid."""
    machine.ensure()
    assert machine.ensure()["how"] == "reused"  # what was seen then is not believed later
    before = machine.status()["services"]
    machine.kill("dockerd")
    status = machine.status()
    assert status["state"] == "degraded"
    assert status["services"][1] == {
        "name": "dockerd", "state": "not_ready", "reason": "socket exists but nobody listens", "pid": None,
    }  # fmt: skip
    assert machine.ensure()["started"] == ["dockerd"]
    after = machine.status()["services"]
    assert after[0] == before[0] and after[1]["pid"] != before[1]["pid"]


def test_a_service_that_ends_at_its_start_fails_the_attempt_and_a_retry_succeeds(machine: Machine) -> None:
    """RUN-1: what had come up so far is kept."""
    machine.words["dockerd"] = ["fail"]
    with pytest.raises(Fault, match="no luck today"):
        machine.ensure()
    status = machine.status()
    assert status["state"] == "failed" and "no luck today" in status["error"] and not status["autostart"]
    assert [service["state"] for service in status["services"]] == ["ready", "not_ready"]
    machine.words["dockerd"] = []
    assert machine.ensure()["started"] == ["dockerd"]
    assert machine.status()["state"] == "ready"


def test_what_is_missing_makes_it_unavailable(tmp_path: Path) -> None:
    """RUN-3, RUN-4: all missing programs are named at once; else that there is no data disk. Nothing is touched."""
    machine = Machine(tmp_path)
    status = machine.status()
    assert status["state"] == "unavailable"
    assert "data disk" in status["error"] or "dockerd, containerd, containerd-shim-runc-v2, runc" in status["error"]
    with pytest.raises(Fault) as caught:
        machine.ensure()
    assert (caught.value.code, caught.value.message) == ("failed_precondition", status["error"])
    assert not (tmp_path / "run").exists()


def test_without_a_data_disk_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-4: although all programs are there."""
    monkeypatch.setattr(prerequisites, "_have", lambda _name: True)
    with pytest.raises(Fault, match="data disk"):
        Machine(tmp_path).ensure()


def test_a_run_directory_that_outlives_a_boot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-3"""
    monkeypatch.setattr(prerequisites, "obstacle", lambda _config: None)
    monkeypatch.setattr(prerequisites, "_MOUNTS", ())
    monkeypatch.setattr(prerequisites, "_kinds", lambda: {"/": "ext4"})
    monkeypatch.setattr(prerequisites, "_forward", lambda: pytest.fail("it went on"))
    with pytest.raises(Fault, match="/run is not a tmpfs"):
        Machine(tmp_path).ensure()


def test_modules_that_cannot_be_loaded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-3: when modprobe is content, what does not show is built in."""
    config = Config(None, str(tmp_path), str(tmp_path), None)
    monkeypatch.setattr(prerequisites, "_MODULES", ("no_such_one", "nor_this"))
    monkeypatch.setattr(prerequisites, "_modprobe", lambda _tool, _names: None)
    prerequisites._load(config)
    monkeypatch.setattr(prerequisites, "_modprobe", lambda _tool, names: f"not found: {names[0]}")
    with pytest.raises(Fault, match="cannot load no_such_one, nor_this: not found: no_such_one") as caught:
        prerequisites._load(config)
    assert caught.value.code == "failed_precondition"


def test_a_stop_cuts_off_a_start_and_ends_what_had_come_up(machine: Machine) -> None:
    """RUN-1: state and processes are as before."""
    machine.words["dockerd"] = ["deaf"]
    failures: list[Fault] = []

    def start() -> None:
        try:
            machine.ensure()
        except Fault as fault:
            failures.append(fault)

    thread = threading.Thread(target=start)
    thread.start()
    _wait_until(lambda: machine.status()["state"] == "starting" and machine.runtime.services[1].noted())
    assert machine.stop(keep=False) == {"stopped": ["dockerd", "containerd"], "killed": []}
    thread.join(10)
    assert [fault.code for fault in failures] == ["unavailable"]
    assert (machine.status()["state"], machine.status()["autostart"]) == ("stopped", False)
    machine.words["dockerd"] = []
    assert machine.ensure()["how"] == "started"


def test_a_stop_tells_what_had_to_be_killed(machine: Machine) -> None:
    """RUN-3: and one of nothing answers at once."""
    assert machine.stop(keep=False) == {"stopped": [], "killed": []}
    machine.words["dockerd"] = ["stubborn"]
    machine.ensure()
    assert machine.stop(keep=False, seconds=0.2) == {"stopped": ["dockerd", "containerd"], "killed": ["dockerd"]}


def test_a_stop_that_keeps_it_is_made_good_by_going_on(machine: Machine) -> None:
    """RUN-1: the stop ladder, cut off: nobody starts it until then."""
    machine.ensure()
    machine.stop(keep=True)
    with pytest.raises(Fault, match="being stopped"):
        machine.ensure()
    assert machine.ask("go_on") == [{"ok": True}]
    _wait_until(lambda: machine.status()["state"] == "ready")
    machine.stop(keep=False)
    machine.ask("go_on")
    time.sleep(0.2)
    assert machine.status()["state"] == "stopped"


def test_a_later_agent_knows_what_an_earlier_one_started(machine: Machine) -> None:
    """RUN-2"""
    machine.ensure()
    before = machine.status()
    machine.again()
    assert machine.status() == before
    assert machine.ensure()["how"] == "reused"
    machine.runtime.come_back()
    assert machine.stop(keep=False)["stopped"] == ["dockerd", "containerd"]


def test_clients_wait_for_a_start_and_are_turned_away_when_none_comes_of_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-1: after a start that failed, after a stop, and when nothing is to come back."""
    seen: list[bool] = []

    def fail(_attempt: object) -> bool:
        seen.append(os.path.exists(machine.config.docker))
        raise Fault("unavailable", "no luck today")

    monkeypatch.setattr(machine.runtime.services[0], "start", fail)
    with pytest.raises(Fault, match="no luck today"):
        machine.ensure()
    assert seen == [True] and not os.path.exists(machine.config.docker)
    for end in (lambda: machine.stop(keep=False), machine.runtime.come_back):
        machine.runtime._doorstep.open()
        end()
        assert not os.path.exists(machine.config.docker)


def test_logs_are_cut_again_and_again_from_the_first_start_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN-7: whatever is wrong with that of another service."""
    monkeypatch.setattr(runtime, "_TRIM_EVERY", 0.01)
    machine.ensure()
    os.unlink(machine.runtime.services[0].log)
    os.mkdir(machine.runtime.services[0].log)
    log = machine.runtime.services[1].log
    for _ in range(2):
        os.truncate(log, servicelog.LIMIT + 1)
        deadline = time.monotonic() + 5
        while os.path.getsize(log) > servicelog.LIMIT:
            assert time.monotonic() < deadline
            machine.runtime._loop.after(0.1, lambda: None)
            machine.runtime._loop.turn()


def test_a_caller_that_hangs_up_does_not_end_the_start(machine: Machine) -> None:
    """RUN-1"""
    asker = Asker()
    asker.gone = True
    with pytest.raises(Gone):
        machine.runtime.ensure(asker, {})  # type: ignore[arg-type]
    _wait_until(lambda: machine.status()["state"] == "ready")
    assert os.path.exists(machine.config.autostart)


def test_the_log_of_a_service_is_sent_and_no_other_file(machine: Machine) -> None:
    """RUN-7"""
    asker = Asker()
    machine.runtime.send_log(asker, {"service": "dockerd"})  # type: ignore[arg-type]
    assert asker.data == b""
    machine.ensure()
    machine.kill("dockerd")
    machine.ensure()
    machine.runtime.send_log(asker, {"service": "dockerd", "tail": 1})  # type: ignore[arg-type]
    assert asker.data == b"begins\n"
    for params in ({"service": "../agent"}, {"service": None}, {"service": "dockerd", "tail": -1}, {}):
        with pytest.raises(Fault) as caught:
            machine.runtime.send_log(asker, params)  # type: ignore[arg-type]
        assert caught.value.code == "bad_request"


@pytest.mark.parametrize(
    ("op", "params"),
    [
        ("ensure", {"start": 1}), ("stop", {}), ("stop", {"seconds": "1", "keep": True}),
        ("stop", {"seconds": -1, "keep": True}), ("stop", {"seconds": 1e9, "keep": True}),
        ("stop", {"seconds": 1, "keep": 1}), ("stop", {"seconds": float("nan"), "keep": True}),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(machine: Machine, op: str, params: dict[str, Any]) -> None:
    """RUN-1"""
    with pytest.raises(Fault) as caught:
        machine.ask(op, **params)
    assert caught.value.code == "bad_request"


def test_containers_of_an_engine_that_does_not_run_are_not_asked_for(machine: Machine) -> None:
    """RUN-2: nor is it started."""
    with pytest.raises(Fault) as caught:
        machine.ask("containers")
    assert caught.value.code == "failed_precondition"
    assert machine.status()["state"] == "stopped"


def test_an_agent_without_a_runtime_pays_nothing_for_it() -> None:
    """RUN-1: what it imports at its start has none of this."""
    script = "import sys, limpet_agent.supervisor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    late = {"limpet_agent." + name for name in ("runtime", "ensuring", "engine", "services", "probing", "libc")}
    assert not late & set(done.stdout.split())
    assert "limpet_agent.agent" in done.stdout.split()
