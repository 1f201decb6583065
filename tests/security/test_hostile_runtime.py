"""A guest that lies about its container runtime: each lie ends in a typed error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from limpet import errors
from limpet.guest import Agent, Channel
from limpet.guest.runtime import Runtime
from limpet_agent import frames
from tests.security.test_hostile_guest import _answering, _with_guest

Asking = Callable[[Runtime], Awaitable[object]]
CONTAINER: dict[str, Any] = {"id": "0" * 12, "name": "n", "image": "i", "state": "running", "ports": []}
PORT = {"ip": "::", "public": 1, "private": 1, "protocol": "tcp"}


def _message(body: object) -> tuple[int, bytes]:
    return frames.MSG, json.dumps(body).encode()


async def _log(runtime: Runtime) -> object:
    return [piece async for piece in runtime.log("dockerd")]


LIES: list[tuple[Asking, list[tuple[int, bytes]]]] = [
    (Runtime.ensure, [_message({"ensured": {"how": "perhaps", "started": [], "seconds": 1}})]),
    (Runtime.ensure, [_message({"ensured": {"how": "started", "started": ["sshd"], "seconds": 1}})]),
    (Runtime.ensure, [_message({"ensured": {"how": "started", "started": [], "seconds": -1}})]),
    (Runtime.ensure, [_message({"ensured": {"how": "started", "started": [], "seconds": float("inf")}})]),
    (Runtime.ensure, [_message({"stage": "s" * 9000, "state": "running"})]),
    (Runtime.ensure, [_message({"stage": "\x1b[2J", "state": "running"})]),
    (Runtime.ensure, [_message({"stage": "containerd", "state": "running"})] * 100),
    (Runtime.ensure, [(frames.END, b"")]),
    (Runtime.status, [_message({"state": "splendid", "services": [], "autostart": True})]),
    (Runtime.status, [_message({"state": "ready", "services": [{"name": "sshd", "state": "ready"}], "autostart": 1})]),
    (Runtime.containers, [_message({"containers": [{**CONTAINER, "id": "../../etc"}]})]),
    (Runtime.containers, [_message({"containers": [{**CONTAINER, "ports": [{**PORT, "public": 0}]}]})]),
    (Runtime.containers, [_message({"containers": [{**CONTAINER, "ports": [{**PORT, "public": 65536}]}]})]),
    (Runtime.containers, [_message({"containers": [CONTAINER] * 101})] * 2),
    (Runtime.containers, [(frames.DATA, b"x")]),
    (lambda runtime: runtime.stop(1, keep=True), [_message({"stopped": "all"})]),
    (Runtime.go_on, [_message({"ok": False})]),
    (_log, [_message({"log": "text"})]),
]


@pytest.mark.parametrize(("ask", "answers"), LIES)
def test_a_lie_about_the_runtime_is_a_typed_error(ask: Asking, answers: list[tuple[int, bytes]]) -> None:
    """GST-2, RUN-5"""

    async def work(channel: Channel) -> None:
        with pytest.raises(errors.Unavailable):
            await ask(Runtime(Agent(channel)))

    asyncio.run(_with_guest(_answering(*answers), work))
