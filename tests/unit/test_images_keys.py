"""Content keys: what may be kept and what must be made again after an update."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from limpet.digests import file_digest
from limpet.images import agent_disk, keys
from limpet.images.plan import Plan
from limpet.paths import Paths


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "data", tmp_path / "cache", tmp_path / "run")


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the agent's sources, taken for the installed one."""
    package = tmp_path / "limpet_agent"
    shutil.copytree(agent_disk.agent_package(), package)
    monkeypatch.setattr(agent_disk, "agent_package", lambda: package)
    return package


def test_equal_inputs_plan_equal_names(paths: Paths) -> None:
    assert Plan.make(paths) == Plan.make(paths)


def test_changed_agent_changes_the_agent_disk_and_nothing_else(paths: Paths, agent: Path) -> None:
    before = Plan.make(paths)
    (agent / "frames.py").write_text((agent / "frames.py").read_text() + "\n# changed\n")
    after = Plan.make(paths)
    assert after.agent_disk != before.agent_disk
    assert after == Plan(**{**vars(before), "agent_disk": after.agent_disk})


def test_compiled_leftovers_do_not_change_the_agent_disk(paths: Paths, agent: Path) -> None:
    before = Plan.make(paths)
    (agent / "__pycache__").mkdir(exist_ok=True)
    (agent / "__pycache__" / "frames.cpython-311.pyc").write_bytes(os.urandom(10))
    assert Plan.make(paths) == before


def test_renamed_source_changes_the_agent_disk(paths: Paths, agent: Path) -> None:
    before = Plan.make(paths)
    (agent / "frames.py").rename(agent / "frame.py")
    assert Plan.make(paths).agent_disk != before.agent_disk


def test_no_two_lists_of_parts_have_the_same_key() -> None:
    assert len({keys.key_of("ab", "c"), keys.key_of("a", "bc"), keys.key_of("abc"), keys.key_of("abc", "")}) == 4


def test_digest_of_a_disk_does_not_depend_on_how_its_holes_are_stored(tmp_path: Path) -> None:
    mebi = 1 << 20
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    with open(sparse, "wb") as file:
        file.truncate(64 * mebi)
        file.seek(5 * mebi + 4096)
        file.write(b"data")
    dense.write_bytes(sparse.read_bytes())
    assert sparse.stat().st_blocks < dense.stat().st_blocks
    assert file_digest(sparse) == file_digest(dense)


def test_digest_of_a_disk_tells_where_data_lies_and_how_long_it_is(tmp_path: Path) -> None:
    digests = set()
    for offset, size in ((0, 1 << 22), (4096, 1 << 22), (1 << 21, 1 << 22), (0, 1 << 23)):
        disk = tmp_path / f"{offset}-{size}"
        with open(disk, "wb") as file:
            file.truncate(size)
            file.seek(offset)
            file.write(b"data")
        digests.add(file_digest(disk))
    assert len(digests) == 4
