"""Renewal, freezing and clones as far as an ordinary process goes: a machine that is not its own is left alone."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from pathlib import Path

import pytest

from limpet import errors
from limpet.guest import Agent, Exit, Identity, Output
from tests.contract.local_guest import LocalGuest


def _identity() -> Identity:
    return Identity("somebody-else", uuid.uuid4().hex, str(uuid.uuid4()), os.urandom(64).hex())


def test_an_agent_that_is_no_machine_is_not_renewed_and_the_host_keeps_its_names(guest: LocalGuest) -> None:
    """GST-3"""
    before = socket.gethostname()
    with pytest.raises(errors.FailedPrecondition, match="ordinary process"):
        guest.do(lambda agent: agent.renew(_identity()))
    assert socket.gethostname() == before


def test_an_agent_that_is_no_machine_freezes_nothing_and_goes_on(guest: LocalGuest) -> None:
    """FRZ-1"""

    async def work(agent: Agent) -> bool:
        with pytest.raises(errors.FailedPrecondition, match="ordinary process"):
            await agent.freeze(1)
        return await agent.thaw()

    assert guest.do(work) is False
    assert guest.do(lambda agent: agent.run(["echo", "on"])).stdout == b"on\n"


def test_a_right_clock_is_found_right(guest: LocalGuest) -> None:
    """GST-3"""
    assert abs(guest.do(lambda agent: agent.check_clock())) < 0.05


def test_an_agent_can_be_warmed_twice(guest: LocalGuest) -> None:
    """GST-3"""

    async def work(agent: Agent) -> None:
        await agent.warm()
        await agent.warm()

    guest.do(work)


def test_the_boot_id_told_is_the_one_that_programs_read(guest: LocalGuest) -> None:
    """GST-3"""
    seen = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert guest.do(lambda agent: agent.ping()).boot_id == seen


def test_who_comes_after_the_host_of_a_clones_origin_finds_its_commands_running(guest: LocalGuest) -> None:
    """FRZ-8: in a clone the connection is gone without a word; the next host begins with a session of its own."""

    async def work(agent: Agent) -> bytes:
        command = await agent.exec(["sh", "-c", "echo early; read word; echo $word"], stdin=True)
        await agent.channel.close()
        async with guest.channel() as channel:
            clone = Agent(channel)
            assert [info.id for info in await clone.execs() if info.running] == [command.id]
            follower = await clone.attach(command.id, stdin=True, steal=True)
            await follower.send_stdin(b"late\n")
            await follower.close_stdin()
            out = b""
            async with asyncio.timeout(10):
                async for event in follower.events():
                    if isinstance(event, Output):
                        out += event.data
                    elif isinstance(event, Exit):
                        return out
        raise AssertionError("no end")

    assert guest.do(work) == b"early\nlate\n"
