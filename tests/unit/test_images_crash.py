"""Killed at any point, an image is there whole or not at all, and what its tag meant before is (FRZ-4)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from limpet.errors import NotFound
from limpet.images import find_image, registry, upkeep
from limpet.paths import Paths
from tests.unit.images_kit import paths_in, publish, strays

ROOT = Path(__file__).parents[2]
POINTS = (
    "image.publish.before", "image.publish.after", "image.tag.before", "image.tag.after", "image.untag.before",
    "image.untag.after", "image.delete.before", "image.delete.after",
)  # fmt: skip


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = paths_in(tmp_path)
    publish(paths, "tool", b"old", tag="v1")
    return paths


def killed_at(point: str, paths: Paths, statement: str) -> None:
    """Run a statement in a process of its own that ends itself at `point`."""
    program = f"""
from pathlib import Path
from limpet.images import upkeep
from tests.unit.images_kit import Paths, publish
home = Path({str(paths.data.parent)!r})
paths = Paths(home / "data", home / "cache", home / "run")
{statement}
"""
    orders = paths.data.parent / "orders"
    orders.write_text(f"{point}=kill")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "LIMPET_CRASHPOINTS": str(orders)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize("point", POINTS[:4])
def test_killed_publishing_leaves_the_old_image_or_the_new_one(paths: Paths, point: str) -> None:
    killed_at(point, paths, "publish(paths, 'tool', b'new', tag='v1')")
    upkeep.sweep(paths)
    assert strays(paths) == []
    content = find_image(paths, "tool:v1").root.read_bytes()
    assert (b"new" in content) == (point == "image.tag.after")
    assert (b"old" in content) == (point != "image.tag.after")
    assert upkeep.verify(paths, "tool:v1") == []
    upkeep.prune(paths, lambda directory: ())
    assert len(registry.versions(paths, "tool")) == 1
    publish(paths, "tool", b"new", tag="v1")
    assert b"new" in find_image(paths, "tool:v1").root.read_bytes()


@pytest.mark.parametrize("point", POINTS[4:])
def test_killed_removal_leaves_a_whole_image_or_none(paths: Paths, point: str) -> None:
    killed_at(point, paths, "upkeep.remove(paths, 'tool:v1', lambda directory: ())")
    upkeep.sweep(paths)
    assert strays(paths) == []
    if point == "image.untag.before":
        assert upkeep.verify(paths, "tool:v1") == []
    else:
        with pytest.raises(NotFound):
            find_image(paths, "tool:v1")
    upkeep.prune(paths, lambda directory: (), tagged=True)
    assert not paths.images.exists() or list(paths.images.iterdir()) == []
