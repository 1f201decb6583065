"""The images that limpet makes itself: made once, on demand, and anew after an update (RUN-3, VM-20)."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from limpet.cli.images import complete_recipes
from limpet.errors import FailedPrecondition, NotFound
from limpet.images import RECIPES, Recipe, build_image, find_image, initramfs, list_images, named, recipes, registry
from limpet.models import Stage
from limpet.paths import Paths
from tests.unit import setup_kit


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A home in which setup has run."""
    asyncio.run(setup_kit.run(tmp_path))
    return setup_kit.paths_in(tmp_path)


def built(paths: Paths, name: str, *, force: bool = False) -> list[str]:
    """The stages that building it took."""
    seen: list[Stage] = []
    with setup_kit.builders():
        asyncio.run(build_image(paths, name, progress=seen.append, force=force))
    return [stage.name for stage in seen if stage.state == "done"]


def test_setup_makes_base_only(paths: Paths) -> None:
    assert [image.name for image in list_images(paths)] == ["base"]


def test_docker_is_base_with_an_engine_and_more_memory(paths: Paths) -> None:
    """RUN-3"""
    assert built(paths, "docker") == ["image docker"]
    image = find_image(paths, "docker")
    packages = set(image.root.read_text().split())
    assert packages >= {*RECIPES["base"].packages, "docker.io", "containerd", "runc", "iptables"}
    assert (image.info.user, image.info.home, image.spec) == ("user", "/home/user", {"memory_mib": 1024})


def test_image_that_is_current_is_not_made_again_unless_forced(paths: Paths) -> None:
    assert built(paths, "docker") == ["image docker"]
    assert built(paths, "docker") == []
    assert built(paths, "docker", force=True) == ["image docker"]


def test_builds_at_the_same_time_make_it_once(paths: Paths) -> None:
    seen: list[Stage] = []

    async def both() -> None:
        await asyncio.gather(*(build_image(paths, "docker", progress=seen.append) for _ in range(5)))

    with setup_kit.builders():
        asyncio.run(both())
    assert [stage.name for stage in seen if stage.state == "done" and stage.name != "lock"] == ["image docker"]


def test_failed_build_is_told_and_can_be_tried_again(paths: Paths) -> None:
    seen: list[Stage] = []
    with setup_kit.builders(fail_in="image docker"), pytest.raises(OSError, match="the disk broke"):
        asyncio.run(build_image(paths, "docker", progress=seen.append))
    assert seen[-1].state == "failed"
    assert not paths.image("docker").exists()
    assert built(paths, "docker") == ["image docker"]


def test_recipe_that_changed_is_made_anew_by_the_next_setup(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(paths, "docker")
    old = find_image(paths, "docker").info.digest
    changed = replace(RECIPES["docker"], packages=(*RECIPES["docker"].packages, "news"))
    assert changed.key() != RECIPES["docker"].key()
    monkeypatch.setitem(recipes.RECIPES, "docker", changed)
    assert changed.is_outdated(paths)
    assert asyncio.run(setup_kit.run(tmp_path)) == ["image docker"]
    assert find_image(paths, "docker").info.digest != old
    assert len(registry.versions(paths, "docker")) == 2  # sandboxes lie on the old one
    assert asyncio.run(setup_kit.run(tmp_path)) == []


def test_script_that_changed_makes_another_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: recipe.key() for name, recipe in RECIPES.items()}
    shutil.copytree(initramfs.GUEST, tmp_path / "guest")
    monkeypatch.setattr(initramfs, "GUEST", tmp_path / "guest")
    assert {name: recipe.key() for name, recipe in RECIPES.items()} == before
    with (tmp_path / "guest" / "docker.sh").open("a") as script:
        script.write("# news\n")
    assert RECIPES["docker"].key() != before["docker"]
    assert RECIPES["base"].key() == before["base"]


def test_image_of_that_name_that_the_user_made_is_left_alone_by_setup(paths: Paths, tmp_path: Path) -> None:
    with registry.staging(paths, "docker") as work:
        (work / "root.raw").write_bytes(b"mine")
        registry.publish(paths, "docker", work, registry.ImageFacts())
    assert asyncio.run(setup_kit.run(tmp_path)) == []
    assert find_image(paths, "docker").root.read_bytes() == b"mine"
    assert not isinstance(named(paths, "docker"), Recipe)


def test_name_that_nobody_knows_is_answered_with_the_nearest(paths: Paths) -> None:
    for ask in (lambda: named(paths, "dokcer"), lambda: built(paths, "dokcer")):
        with pytest.raises(NotFound) as caught:
            ask()
        assert "docker" in (caught.value.hint or "")
    assert named(paths, "docker") is RECIPES["docker"]
    for other in ("docker:old", "docker@1234", "base:old"):
        with pytest.raises(NotFound):
            named(paths, other)


def test_nothing_is_built_where_no_setup_has_run(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="not set up yet") as caught:
        built(setup_kit.paths_in(tmp_path), "docker")
    assert caught.value.hint == "limpet setup"


def test_shell_completes_the_names_of_the_recipes() -> None:
    assert complete_recipes("") == list(RECIPES)
    assert complete_recipes("d") == ["docker"]
