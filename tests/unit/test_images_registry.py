"""Images by name: what `create --image` finds, and that a version in use never changes under its name (FRZ-4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from limpet.errors import NotFound
from limpet.images import ImageFacts, find_image, list_images, registry
from limpet.paths import Paths


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "data", tmp_path / "cache", tmp_path / "run")


def publish(paths: Paths, name: str, content: bytes, recipe: str = "recipe") -> registry.Image:
    (paths.images / name).mkdir(parents=True, exist_ok=True)
    staging = paths.images / name / ".tmp-work"
    staging.mkdir()
    with open(staging / "root.raw", "wb") as file:
        file.write(content)
        file.truncate(1 << 20)
    facts = ImageFacts(user="user", home="/home/user")
    return registry.publish(paths, name, staging, facts, recipe_key=recipe)


def test_misspelt_image_gets_the_nearest_name(paths: Paths) -> None:
    publish(paths, "base", b"x")
    publish(paths, "python", b"y")
    with pytest.raises(NotFound) as caught:
        find_image(paths, "pyton")
    assert caught.value.hint == "did you mean 'python'?"


def test_unknown_image_lists_what_there_is(paths: Paths) -> None:
    publish(paths, "base", b"x")
    with pytest.raises(NotFound) as caught:
        find_image(paths, "zzzzzz")
    assert caught.value.hint == "there are: base"


@pytest.mark.parametrize("name", ["base", "", ".", "..", "../base", "a/b", "nul\0"])
def test_without_any_image_setup_is_the_remedy(paths: Paths, name: str) -> None:
    with pytest.raises(NotFound) as caught:
        find_image(paths, name)
    assert caught.value.hint == "run `limpet setup` first"


def test_published_image_is_listed_with_its_facts(paths: Paths) -> None:
    image = publish(paths, "base", b"x")
    [info] = list_images(paths)
    assert find_image(paths, "base") == image
    assert (info.name, info.size, info.user, info.home) == ("base", 1 << 20, "user", "/home/user")
    assert info.digest.startswith("sha256:")
    assert image.root.read_bytes()[:1] == b"x"


def test_new_version_takes_the_name_and_leaves_the_old_one_whole(paths: Paths) -> None:
    """Sandboxes' disks are overlays on the old version."""
    old = publish(paths, "base", b"old", "recipe 1")
    new = publish(paths, "base", b"new", "recipe 2")
    assert find_image(paths, "base").root == new.root != old.root
    assert old.root.read_bytes()[:3] == b"old"
    assert registry.recipe(paths, "base") == "recipe 2"


def test_equal_content_is_published_once(paths: Paths) -> None:
    first = publish(paths, "base", b"same", "recipe 1")
    inode = first.root.stat().st_ino
    again = publish(paths, "base", b"same", "recipe 2")
    assert (again.root, again.root.stat().st_ino) == (first.root, inode)
    assert registry.recipe(paths, "base") == "recipe 2"


def test_image_without_its_disk_is_none(paths: Paths) -> None:
    publish(paths, "base", b"x").root.unlink()
    assert list_images(paths) == []
    assert registry.recipe(paths, "base") is None


def test_garbage_in_the_image_directory_is_passed_over(paths: Paths) -> None:
    publish(paths, "base", b"x")
    (paths.images / "stray").write_text("a file")
    (paths.images / "broken").mkdir()
    (paths.images / "broken" / "current").write_text("{not json")
    assert [info.name for info in list_images(paths)] == ["base"]
