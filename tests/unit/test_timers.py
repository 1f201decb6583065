"""What happens by the clock, with a clock that the test moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from limpet.models import SandboxSpec, State
from limpet.services import timers
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.sandboxes import Sandboxes
from limpet.services.standing import Standing
from limpet.store import SandboxRecord
from limpet.vmm.machine import Machine
from tests.unit import services_kit as kit


class Hands:
    """The clocks of a host: `monotonic` stops in its sleep, `boottime` does not, `calendar` can be set."""

    CLOCK_MONOTONIC, CLOCK_BOOTTIME = time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME

    def __init__(self) -> None:
        self.mono, self.boot, self.calendar = 1000.0, 5000.0, 1.7e9

    def monotonic(self) -> float:
        return self.mono

    def time(self) -> float:
        return self.calendar

    def clock_gettime(self, which: int) -> float:
        return self.mono if which == self.CLOCK_MONOTONIC else self.boot

    def run(self, seconds: float) -> None:
        self.mono, self.boot, self.calendar = self.mono + seconds, self.boot + seconds, self.calendar + seconds

    def sleep(self, seconds: float) -> None:
        """The host sleeps."""
        self.boot, self.calendar = self.boot + seconds, self.calendar + seconds


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    found = Hands()
    monkeypatch.setattr(timers, "time", found)
    monkeypatch.setattr("limpet.services.live.time", found)
    return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with kit.host_in(tmp_path) as host:
        yield host


# ── guests' clocks ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_clocks_are_looked_at_once_in_a_while(hands: Hands) -> None:
    """GST-3"""
    clocks, looks = timers.Clocks(), 0
    for _ in range(600):
        hands.run(1)
        looks += clocks.due()
    assert 9 <= looks <= 10


def test_clocks_are_looked_at_as_soon_as_the_host_wakes(hands: Hands) -> None:
    """GST-3, issue 3 item 3: "Host sleep/resume"; once, not for ever."""
    clocks = timers.Clocks()
    hands.run(1)
    assert not clocks.due()
    hands.sleep(3600)
    hands.run(1)
    assert clocks.due()
    hands.run(1)
    assert not clocks.due()


@pytest.mark.parametrize("step", [3600.0, -3600.0, 0.2, -0.2])
def test_clocks_are_looked_at_when_the_hosts_was_set(hands: Hands, step: float) -> None:
    clocks = timers.Clocks()
    hands.calendar += step
    assert clocks.due() and not clocks.due()


def test_a_clock_that_is_kept_right_by_ntp_is_not_set(hands: Hands) -> None:
    """It slews by some milliseconds between two looks."""
    clocks = timers.Clocks()
    hands.calendar += 0.02
    assert not clocks.due()


# ── time-outs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def vm_of(host: Host, record: SandboxRecord) -> LiveVM:
    """A VM as far as time-outs look at it."""
    vm = LiveVM(record.id, cast(Machine, SimpleNamespace(pid=0)), host.paths.sandbox(record.id))
    host.live.add(vm)
    return vm


def spec(**changes: Any) -> SandboxSpec:
    return SandboxSpec(**changes)


def test_a_time_to_live_counts_from_the_start_and_an_idle_one_from_the_last_use(host: Host, hands: Hands) -> None:
    """VM-16"""
    vm = vm_of(host, kit.add_sandbox(host))
    hands.run(50)
    with vm.in_use():
        hands.run(50)
        assert timers.due(vm, spec(idle_timeout=10, idle_suspend=5), hands.mono) is None  # a command runs
    for limits, expected in (
        (spec(), None),
        (spec(ttl=100), "ttl"),
        (spec(ttl=100.1), None),
        (spec(idle_timeout=1, idle_suspend=1), None),
    ):
        assert timers.due(vm, limits, hands.mono) == expected
    hands.run(10)
    assert timers.due(vm, spec(idle_suspend=10), hands.mono) == "idle suspend"
    assert timers.due(vm, spec(idle_suspend=5, idle_timeout=10), hands.mono) == "idle"
    assert timers.due(vm, spec(ttl=100, idle_timeout=10), hands.mono) == "ttl"
    assert timers.due(vm, spec(idle_suspend=10.1), hands.mono) is None


def test_a_pooled_vm_that_becomes_somebodys_begins_its_time_then(host: Host, hands: Hands) -> None:
    """VM-16: it had been waiting for hours."""
    vm = vm_of(host, kit.add_sandbox(host))
    hands.run(7200)
    vm.began()
    assert timers.due(vm, spec(ttl=60, idle_timeout=60, idle_suspend=60), hands.mono) is None


class Verbs:
    """What a time-out calls."""

    def __init__(self) -> None:
        self.called: list[tuple[str, str]] = []

    async def stop_now(self, record: SandboxRecord, _request: object) -> None:
        self.called.append(("stop", record.name))

    async def suspend_now(self, record: SandboxRecord, _stages: object) -> None:
        self.called.append(("suspend", record.name))


async def expire(host: Host, vm: LiveVM) -> list[tuple[str, str]]:
    verbs = Verbs()
    await timers._expire(host, cast(Sandboxes, verbs), cast(Standing, verbs), vm)
    return verbs.called


@pytest.mark.parametrize(
    ("limits", "verb"), [({"ttl": 5}, "stop"), ({"idle_timeout": 5}, "stop"), ({"idle_suspend": 5}, "suspend")]
)
def test_an_idle_sandbox_is_stopped_or_suspended_as_it_was_told_and_the_events_say_why(
    host: Host, hands: Hands, limits: dict[str, float], verb: str
) -> None:
    """VM-16, issue 3 item 6"""
    vm = vm_of(host, kit.add_sandbox(host, spec=spec(**limits), state=State.RUNNING))
    assert asyncio.run(expire(host, vm)) == []
    hands.run(5)
    assert asyncio.run(expire(host, vm)) == [(verb, "box")]
    [event] = host.records._store.events_after(0)
    assert event.kind == "sandbox.expired" and event.sandbox == "box"


def test_limpets_own_vms_have_no_time_out(host: Host, hands: Hands) -> None:
    vm = vm_of(host, kit.add_sandbox(host, "+pool-1", spec=spec(ttl=1)))
    hands.run(5)
    assert asyncio.run(expire(host, vm)) == []


@pytest.mark.parametrize("meanwhile", ["restarted", "used", "changed", "nothing"])
def test_a_time_out_that_had_to_wait_fires_only_at_what_it_was_meant_for(
    host: Host, hands: Hands, meanwhile: str
) -> None:
    """VM-16: bound to one incarnation; not at one that has been used, or was given more time, since."""
    record = kit.add_sandbox(host, spec=spec(idle_timeout=5))
    vm = vm_of(host, record)
    hands.run(5)

    async def main() -> list[tuple[str, str]]:
        async with host.locks.lifecycle(record.id, "checkpoint"):
            waiting = asyncio.create_task(expire(host, vm))
            await asyncio.sleep(0.01)
            if meanwhile == "restarted":
                vm_of(host, record)
            elif meanwhile == "used":
                with vm.in_use():
                    pass
            elif meanwhile == "changed":
                host.records.change_spec(record.id, idle_timeout=600)
        return await waiting

    assert asyncio.run(main()) == ([("stop", "box")] if meanwhile == "nothing" else [])
