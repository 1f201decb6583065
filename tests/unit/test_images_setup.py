"""Setup goes on where it stopped, does nothing the second time, and says what it needs (VM-20)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from limpet import process
from limpet.errors import FailedPrecondition, InsufficientSpace, Unavailable
from limpet.images import artifacts, find_image, missing_tools, requirements
from limpet.models import Stage
from tests.unit import setup_kit

ROOT = Path(__file__).parents[2]


def start(home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.unit.setup_kit", str(home), *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)


def strays(home: Path) -> list[Path]:
    return list(home.rglob(".tmp-*"))


def test_first_setup_makes_everything_and_tells_each_step(tmp_path: Path) -> None:
    seen: list[Stage] = []
    assert sorted(asyncio.run(setup_kit.run(tmp_path, seen=seen))) == sorted(setup_kit.STEPS)
    assert {stage.name for stage in seen if stage.state == "done"} == set(setup_kit.STEPS)
    assert all(stage.fraction is None or 0 <= stage.fraction <= 1 for stage in seen)
    paths = setup_kit.paths_in(tmp_path)
    found = artifacts(paths)
    assert found.kernel.read_bytes() == b"\x7fELFkernel"
    assert found.kernel_release == "6.1.0-test"
    assert b"git" in find_image(paths, "base").root.read_bytes().split()
    assert strays(tmp_path) == []


def test_second_setup_does_nothing_and_needs_no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(setup_kit.run(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(process, "_SEARCH", str(tmp_path / "empty"))
    assert asyncio.run(setup_kit.run(tmp_path)) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("step", ["pieces", "agent disk", "data disk", "image base"])
def test_killed_setup_goes_on_where_it_stopped(tmp_path: Path, step: str) -> None:
    running = start(tmp_path, step)
    assert running.stdout is not None
    assert running.stdout.readline() == b"hanging\n"
    running.send_signal(signal.SIGKILL)
    running.wait(10)
    running.stdout.close()
    assert strays(tmp_path) != []
    whole = {path.name for path in (tmp_path / "cache" / "artifacts").iterdir() if not path.name.startswith(".tmp-")}

    done = asyncio.run(setup_kit.run(tmp_path))

    assert step in done
    assert len(done) + len(whole) <= len(setup_kit.STEPS)
    assert strays(tmp_path) == []
    assert asyncio.run(setup_kit.run(tmp_path)) == []


def test_failed_step_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    seen: list[Stage] = []
    with pytest.raises(OSError, match="the disk broke"):
        asyncio.run(setup_kit.run(tmp_path, fail_in="agent disk", seen=seen))
    [failed] = [stage for stage in seen if stage.state == "failed" and stage.name == "agent disk"]
    assert failed.detail == "the disk broke"
    assert strays(tmp_path) == []
    with pytest.raises(FailedPrecondition) as caught:
        artifacts(setup_kit.paths_in(tmp_path))
    assert caught.value.hint == "limpet setup"


def test_setups_at_the_same_time_do_the_work_once(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]
    answers = [json.loads(running.communicate(timeout=60)[0]) for running in both]
    assert sorted(answers[0] + answers[1]) == sorted(setup_kit.STEPS)
    assert [] in answers


def test_all_missing_tools_are_named_at_once_with_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_SEARCH", str(tmp_path))
    assert {tool for tool, _ in missing_tools()} >= set(requirements.TOOLS)
    with pytest.raises(Unavailable) as caught:
        asyncio.run(requirements.check(setup_kit.paths_in(tmp_path)))
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("sudo apt-get install ")
    assert {"mmdebstrap", "qemu-system-x86", "squashfs-tools"} <= set(caught.value.hint.split())


def test_only_the_newest_versions_are_kept(tmp_path: Path) -> None:
    asyncio.run(setup_kit.run(tmp_path))
    paths = setup_kit.paths_in(tmp_path)
    current = artifacts(paths)
    for age in range(5):
        old = paths.artifacts / f"agent-{age}.squashfs"
        old.write_bytes(b"")
        os.utime(old, (age, age))
        (paths.pieces / f"old-{age}").mkdir()
        os.utime(paths.pieces / f"old-{age}", (age, age))
    current.initramfs.unlink()
    asyncio.run(setup_kit.run(tmp_path))
    assert artifacts(paths) == current
    assert len(list(paths.artifacts.glob("agent-*"))) == len(list(paths.pieces.iterdir())) == 3


def test_full_disk_is_refused_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing_tools():
        pytest.skip("the tools of setup are not installed")
    paths = setup_kit.paths_in(tmp_path)
    paths.make()
    monkeypatch.setattr(requirements, "_CACHE_SPACE", 1 << 62)
    with pytest.raises(InsufficientSpace, match="limpet setup needs"):
        asyncio.run(requirements.check(paths))
