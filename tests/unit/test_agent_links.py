"""The guest's end of the channel: when it believes that its host has left."""

from __future__ import annotations

import os
import pty
import time

import pytest

from limpet_agent import links
from limpet_agent.loop import Loop

_SOON = 0.3  # seconds, in place of the real one


def _turn(loop: Loop, lost: list[float], seconds: float) -> None:
    """Turn until the link is lost, or the time is over."""
    over: list[bool] = []
    loop.after(seconds, lambda: over.append(True))
    while not over and not lost:
        loop.turn()


@pytest.mark.parametrize("greeted", [True, False])
def test_an_end_right_after_a_greeting_may_be_the_last_hosts_and_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, greeted: bool
) -> None:
    """GST-2: a virtio port tells of its host apart from the bytes, and later; the new host's streams must live on."""
    monkeypatch.setattr(links, "_OLD_NEWS", _SOON)
    host, guest = pty.openpty()

    def fail(error: BaseException) -> None:
        raise error

    loop, lost = Loop(fail), list[float]()
    link = links.PortLink(loop, os.ttyname(guest))
    os.close(guest)
    received: list[bytes] = []
    link.received, link.lost = received.append, lambda: lost.append(time.monotonic())
    link.start()
    os.write(host, b"hello\n")
    loop.turn()
    assert received
    if greeted:
        link.begun()
    began = time.monotonic()
    os.close(host)
    _turn(loop, lost, 3 * _SOON)
    assert len(lost) == 1
    assert (lost[0] - began >= _SOON * 0.9) is greeted
