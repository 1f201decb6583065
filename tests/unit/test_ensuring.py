"""Seeing that something runs, however many ask at once, whatever becomes of the driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from limpet_agent import ensuring
from limpet_agent.ensuring import Attempt, Ensuring, Outcome, Stage
from limpet_agent.faults import Fault

_LIMIT = 10.0  # seconds for anything here


class Engine:
    """Something that can be started. `work` is what its driver does besides."""

    def __init__(self, work: Callable[[Attempt], object] = lambda _attempt: None) -> None:
        self.work = work
        self.ready = False
        self.probes = self.drives = 0
        self.driving = threading.Event()
        self.ensuring = Ensuring(self._probe, self._drive)

    def _probe(self) -> bool:
        self.probes += 1
        return self.ready

    def _drive(self, attempt: Attempt) -> list[str]:
        self.drives += 1
        attempt.tell("engine", "running")
        self.driving.set()
        self.work(attempt)
        self.ready = True
        attempt.tell("engine", "done", "up")
        return ["engine"]


def at_once(count: int, call: Callable[[], Any]) -> list[Future[Any]]:
    """Call it in so many threads; their futures."""
    pool = ThreadPoolExecutor(count)
    futures = [pool.submit(call) for _ in range(count)]
    pool.shutdown(wait=False)
    return futures


def join(future: Future[Any]) -> Any:
    return future.result(timeout=_LIMIT)


def refused(future: Future[Any]) -> Fault:
    error = future.exception(timeout=_LIMIT)
    assert isinstance(error, Fault), error
    return error


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + _LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_twenty_in_a_row_start_it_once_and_probe_every_time() -> None:
    """RUN-1, RUN-2"""
    engine = Engine()
    found = [engine.ensuring.ensure() for _ in range(20)]
    assert [outcome.how for outcome in found] == ["started"] + ["reused"] * 19
    assert found[0].started == ["engine"] and not found[1].started
    assert (engine.drives, engine.probes) == (1, 20)


def test_five_at_once_have_one_driver_and_hear_the_same_stages() -> None:
    """RUN-1: who comes late hears what was before too."""
    go = threading.Event()
    engine = Engine(lambda _attempt: go.wait(_LIMIT))
    heard: list[list[tuple[str, str, str | None]]] = []

    def call() -> Outcome:
        mine: list[tuple[str, str, str | None]] = []
        heard.append(mine)
        return engine.ensuring.ensure(lambda stage: mine.append((stage.name, stage.state, stage.detail)))

    futures = at_once(4, call)
    assert engine.driving.wait(_LIMIT)
    futures += at_once(1, call)
    wait_until(lambda: len(heard) == 5 and all(heard))
    go.set()
    assert {join(future).how for future in futures} == {"started"}
    assert engine.drives == 1
    assert heard == [[("engine", "running", None), ("engine", "done", "up")]] * 5


def test_a_failing_driver_is_seen_by_all_and_can_be_tried_again() -> None:
    """RUN-1"""
    go = threading.Event()

    def fail(_attempt: Attempt) -> None:
        go.wait(_LIMIT)
        raise Fault("failed_precondition", "there is no overlay", "load it")

    engine = Engine(fail)
    futures = at_once(5, engine.ensuring.ensure)
    assert engine.driving.wait(_LIMIT)
    assert engine.ensuring.state == "starting"
    go.set()
    faults = [refused(future) for future in futures]
    assert {(fault.code, fault.message, fault.hint) for fault in faults} == {
        ("failed_precondition", "there is no overlay", "load it")
    }
    assert len(set(map(id, faults))) == 5  # raising changes an exception
    assert (engine.drives, engine.ensuring.state) == (1, "idle")
    assert engine.ensuring.error is not None
    engine.work = lambda _attempt: None
    assert engine.ensuring.ensure().how == "started"
    assert engine.ensuring.error is None


def test_a_look_starts_nothing_and_waits_for_nobody() -> None:
    """RUN-1: probe-only."""
    go = threading.Event()
    engine = Engine(lambda _attempt: go.wait(_LIMIT))
    assert engine.ensuring.look().how == "not_ready"
    assert (engine.drives, engine.ensuring.state) == (0, "idle")
    [future] = at_once(1, engine.ensuring.ensure)
    assert engine.driving.wait(_LIMIT)
    assert engine.ensuring.look().how == "not_ready"
    go.set()
    join(future)
    assert engine.ensuring.look().how == "reused"
    assert engine.drives == 1


@pytest.mark.parametrize("count", [1, 5])
def test_a_fast_driver_loses_no_wake_up(count: int) -> None:
    """RUN-1: fifty times, one that is done before anybody waits."""
    for _ in range(50):
        engine = Engine()
        found = [join(future) for future in at_once(count, engine.ensuring.ensure)]
        assert sorted({outcome.how for outcome in found}, reverse=True)[0] == "started"
        assert engine.drives == 1
        assert engine.ensuring.state == "idle"


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), MemoryError(), RuntimeError("odd"), OSError(5)])
def test_whatever_ends_the_driver_ends_the_attempt(error: BaseException) -> None:
    """RUN-1: never `starting` for ever, and the next one may succeed."""

    def end(_attempt: Attempt) -> None:
        raise error

    engine = Engine(end)
    futures = at_once(3, engine.ensuring.ensure)
    assert {refused(future).code for future in futures} == {"internal"}
    assert engine.ensuring.state == "idle"
    engine.work = lambda _attempt: None
    assert engine.ensuring.ensure().how == "started"


def test_a_probe_that_fails_fails_the_attempt() -> None:
    """RUN-1"""

    def probe() -> bool:
        raise OSError("no sockets left")

    broken = Ensuring(probe, lambda _attempt: [])
    with pytest.raises(Fault, match="no sockets left"):
        broken.ensure()
    assert broken.state == "idle"


def test_a_thread_that_cannot_be_started_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-1"""
    engine = Engine()

    def fail(*_arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(ensuring, "start_new_thread", fail)
        with pytest.raises(RuntimeError):
            engine.ensuring.ensure()
    assert engine.ensuring.state == "idle"
    assert engine.ensuring.ensure().how == "started"


def test_a_caller_that_goes_away_takes_nobody_along() -> None:
    """RUN-1"""
    go = threading.Event()
    engine = Engine(lambda _attempt: go.wait(_LIMIT))

    def leave(_stage: Stage) -> None:
        raise ConnectionError

    [gone] = at_once(1, lambda: engine.ensuring.ensure(leave))
    assert isinstance(gone.exception(_LIMIT), ConnectionError)
    [stays] = at_once(1, engine.ensuring.ensure)
    go.set()
    assert join(stays).how == "started"
    assert engine.drives == 1


def test_a_stop_cuts_off_a_start_and_keeps_others_out() -> None:
    """RUN-1: the driver has ended before the services are, and none begins meanwhile."""
    engine = Engine(lambda attempt: attempt.pause(_LIMIT))
    starting = at_once(3, engine.ensuring.ensure)
    assert engine.driving.wait(_LIMIT)
    seen: list[str] = []

    def work() -> str:
        seen.append(engine.ensuring.state)
        with pytest.raises(Fault, match="being stopped"):
            engine.ensuring.ensure()
        return "done"

    began = time.monotonic()
    assert engine.ensuring.stop(work) == "done"
    assert time.monotonic() - began < _LIMIT / 2
    assert seen == ["stopping"]
    assert all("cut off" in refused(future).message for future in starting)
    engine.work = lambda _attempt: None
    assert engine.ensuring.ensure().how == "started"


def test_a_start_that_is_done_as_it_is_cancelled_is_stopped_all_the_same() -> None:
    """RUN-1"""
    for _ in range(50):
        engine = Engine()
        [starting] = at_once(1, engine.ensuring.ensure)
        engine.ensuring.stop(lambda engine=engine: setattr(engine, "ready", False))  # type: ignore[misc]
        starting.exception(_LIMIT)
        assert engine.ensuring.state == "idle"


def test_a_stop_that_fails_leaves_it_startable() -> None:
    """RUN-1"""
    engine = Engine()

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        engine.ensuring.stop(fail)
    assert engine.ensuring.state == "idle"
    assert engine.ensuring.ensure().how == "started"


def test_a_machine_that_goes_down_starts_nothing_until_it_is_told_to_go_on() -> None:
    """RUN-1: a client that asks again while the sandbox is being stopped."""
    engine = Engine()
    engine.ensuring.stop(lambda: None, refuse=60)
    for call in (engine.ensuring.ensure, engine.ensuring.begin):
        with pytest.raises(Fault, match="being stopped"):
            call()
    engine.ensuring.allow()
    engine.ensuring.begin()
    wait_until(lambda: engine.ready)
    engine.ensuring.stop(lambda: None, refuse=0.01)
    time.sleep(0.02)
    assert engine.ensuring.ensure().how == "reused"  # it did not go down after all, and nobody said so


def test_who_lets_it_go_on_waits_for_the_stop_that_is_under_way() -> None:
    """RUN-1: of a host that was cut off in it; else nobody would start it again."""
    engine, stopping, go = Engine(), threading.Event(), threading.Event()

    def work() -> None:
        stopping.set()
        go.wait(_LIMIT)

    [stop] = at_once(1, lambda: engine.ensuring.stop(work, refuse=60))
    assert stopping.wait(_LIMIT)

    def go_on() -> None:
        engine.ensuring.allow()
        engine.ensuring.begin()

    [going_on] = at_once(1, go_on)
    time.sleep(0.1)
    assert not going_on.done()
    go.set()
    join(stop)
    join(going_on)
    wait_until(lambda: engine.ready)


def test_what_is_to_be_done_after_a_success_is_part_of_the_attempt() -> None:
    """RUN-1: after a start and after a reuse; a failure of it is one of the attempt."""
    done: list[str] = []
    good = Ensuring(lambda: True, lambda _attempt: [], lambda: done.append("marked"))
    good.ensure()
    assert done == ["marked"]

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(Fault, match="No space left"):
        Ensuring(lambda: True, lambda _attempt: [], fail).ensure()
