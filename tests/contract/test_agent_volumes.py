"""Volumes as far as an ordinary process goes: what is asked wrongly is refused before anything is touched, and a guest
without a data disk says so. The rest needs a Btrfs: tests/vm/test_volumes.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from limpet import errors
from limpet.guest import Agent
from limpet.guest.volumes import Volumes
from tests.contract.local_guest import LocalGuest

Call = Callable[[Volumes], Awaitable[object]]


async def _sent(volumes: Volumes, *words: Any) -> bytes:
    return b"".join([piece async for piece in volumes.send(*words)])


@pytest.mark.parametrize(
    "name", ["", "etc", "../home", "@home", "home/x", "payload-", "payload-1234567", "payload-0a1b2c3g"]
)
def test_a_name_that_is_no_volume_is_refused(guest: LocalGuest, name: str) -> None:
    """PAY-3: nothing outside of the volumes can be named."""
    calls: list[Call] = [
        lambda volumes: volumes.snapshot([name], "t"),
        lambda volumes: volumes.forget(name),
        lambda volumes: volumes.create(name, "/nowhere/x"),
        lambda volumes: volumes.remove(name),
        lambda volumes: volumes.watch({name: 0}),
        lambda volumes: _sent(volumes, name, "t"),
    ]
    for call in calls:
        with pytest.raises(errors.BadRequest, match="is not a volume"):
            guest.do(lambda agent, call=call: call(Volumes(agent)))  # type: ignore[misc]


@pytest.mark.parametrize("token", ["", "a.b", "../x", "A", "a/b", "x" * 65, "a\0", None, 7])
def test_a_token_that_is_none_is_refused(guest: LocalGuest, token: Any) -> None:
    """PAY-3: a token is part of a file name."""
    calls: list[Call] = [
        lambda volumes: volumes.snapshot(["home"], token),
        lambda volumes: volumes.forget("home", [token]),
        lambda volumes: _sent(volumes, "home", token),
    ]
    if token is not None:
        calls.append(lambda volumes: _sent(volumes, "home", "t", token))
    for call in calls:
        with pytest.raises(errors.BadRequest, match="is not a token"):
            guest.do(lambda agent, call=call: call(Volumes(agent)))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("op", "params"),
    [
        ("vol.watch", {}),
        ("vol.watch", {"since": {}}),
        ("vol.watch", {"since": {"home": "1"}}),
        ("vol.watch", {"since": {"home": 1}, "poll": 0}),
        ("vol.watch", {"since": {"home": 1}, "poll": "fast"}),
        ("vol.snapshot", {"volumes": "home", "token": "t"}),
        ("vol.snapshot", {"volumes": [], "token": "t"}),
        ("vol.snapshot", {"volumes": [["home"]], "token": "t"}),
        ("vol.forget", {"name": "home", "keep": "t"}),
        ("vol.create", {"name": "payload-0a1b2c3d", "mount": "relative"}),
        ("vol.create", {"name": "payload-0a1b2c3d", "mount": "/x", "uid": -1}),
        ("vol.create", {"name": "home", "mount": "/x"}),
        ("vol.remove", {"name": "workspace"}),
    ],
)
def test_what_makes_no_sense_is_refused(guest: LocalGuest, op: str, params: dict[str, Any]) -> None:
    """PAY-3: and the agent goes on."""

    async def work(agent: Agent) -> None:
        stream = await agent.opened(op, **params)
        with pytest.raises(errors.BadRequest):
            await stream.message()
        await agent.ping()

    guest.do(work)


def test_a_guest_without_a_data_disk_says_so(guest: LocalGuest) -> None:
    """PAY-3"""
    calls: list[Call] = [
        lambda volumes: volumes.state(),
        lambda volumes: volumes.snapshot(["home"], "t"),
        lambda volumes: volumes.watch({"home": 0}),
        lambda volumes: volumes.forget("home"),
        lambda volumes: volumes.create("payload-0a1b2c3d", "/nowhere/x"),
        lambda volumes: volumes.remove("payload-0a1b2c3d"),
    ]

    async def work(agent: Agent) -> None:
        for call in calls:
            with pytest.raises(errors.FailedPrecondition, match="no data disk"):
                await asyncio.wait_for(call(Volumes(agent)), 10)

    guest.do(work)
