"""After a power loss at any moment of a publication the host directory is one generation or the other, whole, and the
new one once that was acknowledged (PAY-2, D3, D5)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from limpet.paths import Paths
from limpet.services.payloads.state import States
from tests.crash import localpayloads
from tests.crash.counting import noticed
from tests.crash.proving import Workload, prove
from tests.unit import payload_kit as kit

_OLD = {"a": b"one", "sub/b": b"b"}
_TREES = [_OLD, {**_OLD, "a": b"two"}]


def _check(directory: Path, acked: int, begun: int) -> None:
    """Which tree is where is recognised by inodes, which the disks here do not have: tests/crash/test_local.py looks at
    what the next daemon makes of it."""
    world = directory / "world"
    home = world / "home"
    state = States(Paths(home / "data", home / "cache", home / "run").payloads).get(kit.ID)
    assert state is not None and state.published is not None
    found = kit.files(world / "host")
    assert found in (_TREES[acked], _TREES[begun]), f"the directory has {found}"
    known = {published.generation for published in (state.published, state.coming) if published is not None}
    assert 1 + _TREES.index(found) in known, "nobody knows what was published"


def _work(omit: Collection[str] = ()) -> Workload:
    return Workload(localpayloads.setup, (("publish", localpayloads.publish),), omit)


def test_a_host_directory_is_one_generation_or_the_other() -> None:
    prove(_work(), _check)


@pytest.mark.parametrize("omitted", ["fsync", "fsync_dir"])
def test_a_publication_without_one_of_its_fsyncs_is_noticed(omitted: str) -> None:
    with noticed():
        prove(_work({omitted}), _check)
