"""Container engines from the host's side: one start for all who want one, the verbs, and the stop ladder's rung."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from limpet.daemon import build_parts
from limpet.errors import DeadlineExceeded, FailedPrecondition, LimpetError, Unavailable
from limpet.models import Operation, PortMapping, RuntimeStopRequest, State, StopRequest, StopResult
from limpet.services import engines, instants, reconcile, stopping
from limpet.services.live import LiveVM
from limpet.services.runtime import Runtimes
from limpet.vmm import capture
from limpet_agent import frames
from tests.unit.runtime_kit import SERVICES, Running, fault, running

Test = Callable[[Running], Awaitable[None]]


@pytest.fixture
def home() -> Iterator[Path]:
    """Not pytest's tmp_path: its paths are long for a socket."""
    with tempfile.TemporaryDirectory(prefix="le", dir="/tmp") as directory:
        yield Path(directory)


def play(home: Path, test: Test) -> None:
    async def main() -> None:
        async with running(home) as box:
            await test(box)

    asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


# ── one start ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_twenty_who_want_an_engine_at_once_share_one_start(home: Path) -> None:
    """RUN-1: and the late ones hear how far it is."""

    async def test(box: Running) -> None:
        heard: list[list[str]] = [[] for _ in range(20)]

        async def want(number: int) -> str:
            told = heard[number]
            return (await box.host.engines.ensure_now(box.vm, lambda stage, state, _: told.append(stage + state))).how

        first = [asyncio.create_task(want(number)) for number in range(10)]
        await until(lambda: heard[0])
        late = [asyncio.create_task(want(number)) for number in range(10, 20)]
        await until(lambda: heard[19])
        box.guest.gate.set()
        assert set(await asyncio.gather(*first, *late)) == {"started"}
        assert heard[0] == heard[19] and heard[0][-1] == "dockerddone"
        assert box.guest.ops().count("rt.ensure") == 1
        assert box.told("runtime.started") == [{"seconds": 1.0, "started": SERVICES}]

    play(home, test)


def test_ready_engine_is_asked_every_time_and_no_news(home: Path) -> None:
    """RUN-2"""

    async def test(box: Running) -> None:
        box.guest.ready = True
        for _ in range(3):
            assert (await box.host.engines.ensure_now(box.vm)).how == "reused"
        assert box.guest.ops().count("rt.ensure") == 3
        assert box.told("runtime.started") == []

    play(home, test)


def test_failed_start_is_everybodys_and_can_be_tried_again(home: Path) -> None:
    """RUN-1, RUN-3"""

    async def test(box: Running) -> None:
        box.guest.faults["rt.ensure"] = fault("failed_precondition", "the image lacks dockerd")
        wanting = [asyncio.create_task(box.host.engines.ensure_now(box.vm)) for _ in range(5)]
        await until(box.guest.ops)
        box.guest.gate.set()
        outcomes = await asyncio.gather(*wanting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [FailedPrecondition] * 5
        assert box.told("runtime.failed") == [{"reason": "the image lacks dockerd"}]
        box.guest.faults.clear()
        assert (await box.host.engines.ensure_now(box.vm)).how == "started"

    play(home, test)


def test_who_gives_up_ends_nobodys_start(home: Path) -> None:
    """RUN-1: not even when all do; a failure that nobody waits for is still told."""

    async def test(box: Running) -> None:
        first, second = (asyncio.create_task(box.host.engines.ensure_now(box.vm)) for _ in range(2))
        await until(box.guest.ops)
        first.cancel()
        await asyncio.sleep(0)
        box.guest.gate.set()
        assert (await second).how == "started"
        box.guest.ready = False
        box.guest.gate.clear()
        box.guest.faults["rt.ensure"] = fault("unavailable", "dockerd ended with status 1")
        alone = asyncio.create_task(box.host.engines.ensure_now(box.vm))
        await until(lambda: box.guest.ops().count("rt.ensure") == 2)
        alone.cancel()
        box.guest.gate.set()
        await until(lambda: box.told("runtime.failed"))

    play(home, test)


def test_guest_that_goes_away_in_a_start_fails_it_and_leaves_nothing_behind(home: Path) -> None:
    """RUN-1: a start that never ends would be everybody's for ever."""

    async def test(box: Running) -> None:
        wanting = asyncio.create_task(box.host.engines.ensure_now(box.vm))
        await until(box.guest.ops)
        await box.guest.hang_up()
        box.guest.gate.set()
        with pytest.raises(Unavailable):
            await wanting
        assert (await box.host.engines.ensure_now(box.vm)).how == "started"

    play(home, test)


def test_start_that_does_not_end_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-1: and can be tried again."""
    monkeypatch.setattr(engines, "_TIMEOUT", 0.2)

    async def test(box: Running) -> None:
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(box.host.engines.ensure_now(box.vm), 5)
        assert len(box.told("runtime.failed")) == 1
        box.guest.gate.set()
        assert (await box.host.engines.ensure_now(box.vm)).how in ("started", "reused")  # the guest went on by itself

    play(home, test)


def test_start_in_an_earlier_machine_is_not_shared_with_the_next(home: Path) -> None:
    """RUN-1: a sandbox that was stopped and started again has another engine."""

    async def test(box: Running) -> None:
        earlier = asyncio.create_task(box.host.engines.ensure_now(box.vm))
        await until(box.guest.ops)
        later = LiveVM(box.record.id, box.vm.machine, box.vm.files)
        try:
            wanting = asyncio.create_task(box.host.engines.ensure_now(later))
            await until(lambda: box.guest.ops().count("rt.ensure") == 2)
            box.guest.gate.set()
            await asyncio.gather(earlier, wanting)
        finally:
            await later.close()

    play(home, test)


def test_guest_that_says_not_ready_to_a_start_is_not_believed_to_be(home: Path) -> None:
    async def test(box: Running) -> None:
        box.guest.gate.set()
        box.guest.faults["rt.ensure"] = frames.MSG, {"ensured": {"how": "not_ready", "started": [], "seconds": 0.1}}
        with pytest.raises(Unavailable, match="not ready"):
            await box.host.engines.ensure_now(box.vm)

    play(home, test)


def test_daemon_that_ends_waits_for_no_start_and_calls_none_failed(home: Path) -> None:
    """RUN-1: the guest goes on by itself."""

    async def test(box: Running) -> None:
        wanting = asyncio.create_task(box.host.engines.ensure_now(box.vm))
        box.guest.silent.add("rt.go_on")
        box.host.engines.go_on(box.vm)
        await until(lambda: len(box.guest.ops()) == 2)
        await box.host.engines.close()
        with pytest.raises(asyncio.CancelledError):
            await wanting
        assert box.told("runtime.failed") == []

    play(home, test)


# ── verbs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def runtimes(box: Running) -> Runtimes:
    return Runtimes(box.host, build_parts(box.host).sandboxes)


async def ended(box: Running, begun: Operation) -> Operation:
    return await box.host.operations.wait(begun.id)


def test_ensure_is_an_operation_with_the_guests_stages(home: Path) -> None:
    """RUN-1"""

    async def test(box: Running) -> None:
        box.guest.gate.set()
        done = await ended(box, await runtimes(box).ensure("box"))
        assert done.result == {"how": "started", "seconds": 1.0, "started": SERVICES}
        assert [(stage.name, stage.state) for stage in done.stages] == [
            ("prerequisites", "done"),
            ("containerd", "done"),
            ("dockerd", "done"),
        ]

    play(home, test)


def test_ensure_that_fails_marks_the_stage_in_which_it_did(home: Path) -> None:
    async def test(box: Running) -> None:
        box.guest.gate.set()
        box.guest.faults["rt.ensure"] = fault("failed_precondition", "the kernel lacks overlay")
        done = await ended(box, await runtimes(box).ensure("box"))
        assert (done.error or {})["message"] == "the kernel lacks overlay"
        assert [(stage.name, stage.state) for stage in done.stages] == [("prerequisites", "failed")]

    play(home, test)


def test_what_needs_the_guest_is_refused_while_it_cannot_answer(home: Path) -> None:
    async def test(box: Running) -> None:
        service = runtimes(box)
        box.become(State.PAUSED)
        for asking in (service.status("box"), service.logs("box", "dockerd", None)):
            with pytest.raises(FailedPrecondition, match="paused"):
                await asking
        assert await service.ports("box") == []
        box.become(State.STOPPING)
        with pytest.raises(FailedPrecondition, match="stopping"):
            await service.ensure("box")
        box.host.live.drop(box.record.id)
        box.become(State.STOPPED)
        for refused in (service.ensure("box"), service.stop("box", RuntimeStopRequest())):
            with pytest.raises(FailedPrecondition, match="not running"):
                await refused
        assert await service.ports("box") == []
        assert box.guest.heard == []

    play(home, test)


def test_status_names_the_socket_and_logs_are_the_guests(home: Path) -> None:
    """RUN-5, RUN-7"""

    async def test(box: Running) -> None:
        status = await runtimes(box).status("box")
        assert (status.state, status.socket) == ("stopped", str(box.vm.files.docker_socket))
        log = [piece async for piece in await runtimes(box).logs("box", "dockerd", 7)]
        assert b"".join(log) == b"dockerd 7\n"

    play(home, test)


def test_container_ports_are_joined_with_those_of_this_host(home: Path) -> None:
    """IPv4 and IPv6 are one port; a TCP port of the host does not lead to one of UDP."""

    async def test(box: Running) -> None:
        service = runtimes(box)
        assert await service.ports("box") == []
        box.guest.ready = True
        assert [(port.guest, port.protocol, port.host) for port in await service.ports("box")] == [
            (53, "udp", None),
            (8080, "tcp", None),
        ]
        for mapping in ({"host": 0, "guest": 8080}, {"host": 0, "guest": 53}):
            await box.host.ports.add("box", PortMapping(**mapping))
        given = {mapping.guest: mapping.host for mapping in box.host.ports.of(box.record.id)}
        assert [(port.guest, port.port, port.host) for port in await service.ports("box")] == [
            (53, 53, None),
            (8080, 80, given[8080]),
        ]
        await box.host.ports.withdraw(box.record.id)

    play(home, test)


def test_stop_gives_containers_their_time_and_does_not_come_back(home: Path) -> None:
    async def test(box: Running) -> None:
        box.guest.ready, box.guest.killed = True, ["dockerd"]
        done = await ended(box, await runtimes(box).stop("box", RuntimeStopRequest(timeout=3)))
        assert (done.result or {})["stopped"] == ["dockerd", "containerd"]
        assert [(asked["seconds"], asked["keep"]) for asked in box.guest.asked("rt.stop")] == [(3.0, False)]
        assert [told["killed"] for told in box.told("runtime.stopped")] == [["dockerd"]]

    play(home, test)


# ── the stop ladder ──────────────────────────────────────────────────────────────────────────────────────────────────


async def climb(box: Running, timeout: float = 30.0, *, force: bool = False) -> StopResult:
    async def final(_vm: LiveVM, left: float) -> tuple[int | None, str | None]:
        box.guest.heard.append({"op": "final sync", "left": left})
        return 1, None

    return await stopping.stop(box.vm, "box", force=force, timeout=timeout, final=final)


def test_stop_ends_containers_after_the_flush_and_before_the_last_sync(home: Path) -> None:
    """RUN-4, VM-1"""

    async def test(box: Running) -> None:
        box.guest.ready = True
        result = await climb(box)
        assert (result.durability, result.at_risk) == ("clean", [])
        assert box.guest.ops() == ["sync", "rt.stop", "sync", "final sync", "poweroff"]
        (stop,), (final,) = box.guest.asked("rt.stop"), box.guest.asked("final sync")
        assert stop["keep"] is True and 15 < stop["seconds"] < 20
        assert final["left"] > 20

    play(home, test)


def test_stop_without_an_engine_does_nothing_more_for_it(home: Path) -> None:
    async def test(box: Running) -> None:
        result = await climb(box)
        assert box.guest.ops() == ["sync", "rt.stop", "final sync", "poweroff"]
        assert result.at_risk == []

    play(home, test)


@pytest.mark.parametrize(
    ("code", "at_risk"), [("unimplemented", []), ("unavailable", ["what containers had only in memory (no)"])]
)
def test_engine_that_cannot_be_stopped_is_told_and_no_reason_to_refuse(
    home: Path, code: str, at_risk: list[str]
) -> None:
    """RUN-4: the agent of an older limpet has no engine."""

    async def test(box: Running) -> None:
        box.guest.faults["rt.stop"] = fault(code, "no")
        result = await climb(box)
        assert (result.durability, result.at_risk) == ("clean", at_risk)

    play(home, test)


def test_containers_that_were_killed_are_told(home: Path) -> None:
    async def test(box: Running) -> None:
        box.guest.ready, box.guest.killed = True, ["dockerd"]
        assert (await climb(box)).at_risk == ["what containers had only in memory (they did not end in time)"]

    play(home, test)


def test_engine_that_hangs_does_not_hold_a_stop_up(home: Path) -> None:
    """VM-2: the whole stop is bounded."""

    async def test(box: Running) -> None:
        box.guest.silent.add("rt.stop")
        result = await climb(box, timeout=2)
        assert (result.durability, len(result.at_risk)) == ("clean", 1)
        assert result.seconds < 2 + 2

    play(home, test)


def test_machine_that_stands_still_is_not_waited_for(home: Path) -> None:
    """A forced stop of a guest that cannot be flushed leaves its containers alone."""

    async def test(box: Running) -> None:
        box.guest.faults["sync"] = fault("unavailable", "input/output error")
        await climb(box, force=True)
        assert "rt.stop" not in box.guest.ops()

    play(home, test)


def test_engine_comes_back_after_a_stop_in_which_the_daemon_ended(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN-4: the next daemon finds a machine that runs without its engine."""

    async def test(box: Running) -> None:
        async def recognised(*_: object) -> object:
            return box.vm.machine

        async def agreed(*_: object) -> object:
            return box.record

        async def as_it_was(*_: object, **__: object) -> None:
            pass

        monkeypatch.setattr(reconcile, "_recognised", recognised)
        monkeypatch.setattr(instants, "agree", agreed)
        monkeypatch.setattr(capture, "go_on", as_it_was)
        monkeypatch.setattr(LiveVM, "save_handles", lambda _vm: None)
        box.host.live.drop(box.record.id)
        sandboxes = build_parts(box.host).sandboxes
        monkeypatch.setattr(sandboxes, "watch", as_it_was)
        await reconcile._adopt(box.host, sandboxes, box.record)
        await until(lambda: "rt.go_on" in box.guest.ops())
        adopted = box.host.live.require(box.record.id, "box")
        await adopted.close()

    play(home, test)


def test_engine_comes_back_after_a_stop_that_was_refused(home: Path) -> None:
    """RUN-4"""

    async def test(box: Running) -> None:
        box.guest.faults["sync"] = fault("unavailable", "input/output error")
        sandboxes = build_parts(box.host).sandboxes
        with pytest.raises(LimpetError, match="left running"):
            await sandboxes.stop_now(box.record, StopRequest())
        assert box.host.records.by_id(box.record.id).state is State.RUNNING
        await until(lambda: "rt.go_on" in box.guest.ops())

    play(home, test)
