"""The container runtime as far as an ordinary process goes: what it lacks is named, nothing of this machine is touched.
The rest needs an engine: tests/unit/test_agent_runtime.py plays one, tests/vm/test_runtime.py has one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from limpet import errors
from limpet.guest import Agent
from limpet.guest.runtime import Runtime, Stopped
from limpet.models import RuntimeStatus
from tests.contract.local_guest import LocalGuest


def test_a_guest_that_cannot_run_it_says_why_at_once(guest: LocalGuest) -> None:
    """RUN-3, RUN-4: in the error and in the status; and the agent goes on."""

    async def work(agent: Agent) -> tuple[errors.LimpetError, RuntimeStatus]:
        runtime = Runtime(agent)
        with pytest.raises(errors.FailedPrecondition) as caught:
            await runtime.ensure()
        assert (await runtime.ensure(start=False)).how == "not_ready"
        return caught.value, await runtime.status()

    began = time.monotonic()
    error, status = guest.do(work)
    assert time.monotonic() - began < 10
    assert (status.state, status.error, status.autostart) == ("unavailable", error.message, False)
    assert "has no" in error.message or "data disk" in error.message
    assert [(service.name, service.state) for service in status.services] == [
        ("containerd", "not_ready"), ("dockerd", "not_ready"),
    ]  # fmt: skip


def test_many_at_once_share_the_failure(guest: LocalGuest) -> None:
    """RUN-1"""

    async def work(agent: Agent) -> list[BaseException | Any]:
        return await asyncio.gather(*(Runtime(agent).ensure() for _ in range(20)), return_exceptions=True)

    assert {type(answer) for answer in guest.do(work)} == {errors.FailedPrecondition}


def test_a_runtime_that_does_not_run_is_stopped_and_has_no_logs_and_no_containers(guest: LocalGuest) -> None:
    """RUN-1, RUN-7"""

    async def work(agent: Agent) -> None:
        runtime = Runtime(agent)
        assert await runtime.stop(30, keep=False) == Stopped(stopped=[], killed=[])
        assert [piece async for piece in runtime.log("dockerd", 10)] == []
        with pytest.raises(errors.FailedPrecondition, match="not ready"):
            await runtime.containers()
        with pytest.raises(errors.BadRequest, match="is not a service"):
            await anext(runtime.log("sshd", None))
        await runtime.go_on()
        await runtime.stop(0, keep=True)
        with pytest.raises(errors.Unavailable, match="being stopped"):
            await runtime.ensure()
        await runtime.go_on()

    guest.do(work)


def test_a_guest_that_is_asked_to_look_only_starts_no_service(guest: LocalGuest) -> None:
    """RUN-1: a start that nobody waits for any more is harmless too."""

    async def work(agent: Agent) -> None:
        runtime = Runtime(agent)
        with pytest.raises((errors.DeadlineExceeded, errors.FailedPrecondition)):
            await runtime.ensure(timeout=0.0001)
        assert (await runtime.ensure(start=False)).how == "not_ready"
        await agent.ping()

    guest.do(work)
