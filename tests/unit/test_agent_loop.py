"""The agent's loop while it is held (frozen disks): only the channel and urgent timers, and nothing is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from limpet_agent.loop import IN, Loop

Pipes = tuple[tuple[int, int], tuple[int, int]]


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    """Two pipes; read ends first."""
    found = os.pipe(), os.pipe()
    yield found
    for pair in found:
        for fd in pair:
            try:
                os.close(fd)
            except OSError:
                pass


def _loop() -> Loop:
    def fail(error: BaseException) -> None:
        raise error

    return Loop(fail)


def _turn_for(loop: Loop, seconds: float) -> int:
    """Turn until `seconds` are over; how many turns that were."""
    over: list[bool] = []
    loop.after(seconds, lambda: over.append(True), urgent=True)
    turns = 0
    while not over:
        loop.turn()
        turns += 1
    return turns


def test_a_held_loop_serves_the_channel_and_leaves_the_rest_for_later(pipes: Pipes) -> None:
    """FRZ-1"""
    (channel, to_channel), (other, to_other) = pipes
    loop, seen = _loop(), []
    loop.watch(channel, IN, lambda _events: seen.append(os.read(channel, 9)))
    loop.watch(other, IN, lambda _events: seen.append(os.read(other, 9)))
    loop.hold(frozenset((channel,)))
    os.write(to_channel, b"channel")
    os.write(to_other, b"other")
    _turn_for(loop, 0.02)
    assert seen == [b"channel"]
    loop.hold(None)
    _turn_for(loop, 0.02)
    assert seen == [b"channel", b"other"]


def test_a_descriptor_watched_while_the_loop_is_held_waits_too(pipes: Pipes) -> None:
    """FRZ-1"""
    _, (other, to_other) = pipes
    loop, seen = _loop(), []
    loop.hold(frozenset())
    loop.watch(other, IN, lambda _events: seen.append(os.read(other, 9)))
    os.write(to_other, b"other")
    _turn_for(loop, 0.02)
    assert seen == []
    loop.hold(None)
    _turn_for(loop, 0.02)
    assert seen == [b"other"]


def test_timers_that_were_due_while_the_loop_was_held_come_afterwards_but_urgent_ones_at_once() -> None:
    """FRZ-1: what a timer writes could wait for the frozen disk, and the thaw for the timer."""
    loop, seen = _loop(), []
    loop.after(0.001, lambda: seen.append("saves a file"))
    cancelled = loop.after(0.001, lambda: seen.append("cancelled"))
    loop.after(0.002, lambda: seen.append("thaws"), urgent=True)
    loop.hold(frozenset())
    _turn_for(loop, 0.02)
    cancelled.cancel()
    assert seen == ["thaws"]
    loop.hold(None)
    _turn_for(loop, 0.02)
    assert seen == ["thaws", "saves a file"]


def test_a_pipe_that_hangs_up_does_not_keep_a_held_loop_busy(pipes: Pipes) -> None:
    """FRZ-1"""
    _, (other, to_other) = pipes
    loop, ends = _loop(), []

    def ended(_events: int) -> None:
        ends.append(os.read(other, 9))
        loop.unwatch(other)

    loop.watch(other, IN, ended)
    loop.hold(frozenset())
    os.close(to_other)
    began = time.monotonic()
    assert _turn_for(loop, 0.05) < 10 and time.monotonic() - began < 5
    loop.hold(None)
    _turn_for(loop, 0.02)
    assert ends == [b""]
