"""One world for all faults, made anew after a failure; and the figures at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.counting import COUNT, Count
from tests.crash.world import World


class Worlds:
    """The world that faults are tried in."""

    def __init__(self, pieces: Path) -> None:
        self._pieces = pieces
        self._world: World | None = None

    def get(self) -> World:
        self._world = self._world or World(self._pieces)
        return self._world

    def discard(self) -> None:
        """After a failure: the next one shall not begin with what this one left."""
        if self._world is not None:
            world, self._world = self._world, None
            world.close()


@pytest.fixture(scope="session")
def worlds(pieces: Path) -> Iterator[Worlds]:
    worlds = Worlds(pieces)
    try:
        yield worlds
    finally:
        worlds.discard()


@pytest.fixture
def world(worlds: Worlds, request: pytest.FixtureRequest) -> Iterator[World]:
    failed = request.session.testsfailed
    try:
        yield worlds.get()
    finally:
        if request.session.testsfailed != failed:
            worlds.discard()


@pytest.fixture
def spoilt(worlds: Worlds) -> Iterator[World]:
    """The world, for a test that breaks it."""
    try:
        yield worlds.get()
    finally:
        worlds.discard()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if Count() != COUNT:
        terminalreporter.write_line(str(COUNT))
