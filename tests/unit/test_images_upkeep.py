"""Tags, history, removal and pruning of images: what is in use stays (FRZ-4, FRZ-5)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limpet.errors import AlreadyExists, BadRequest, FailedPrecondition, NotFound
from limpet.images import ImageFacts, Reference, find_image, list_images, registry, upkeep
from limpet.paths import Paths
from tests.unit.images_kit import paths_in, publish, strays


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return paths_in(tmp_path)


def nobody(directory: Path) -> Sequence[str]:
    return ()


def somebody(directory: Path) -> Sequence[str]:
    return ("box", "ck_1")


def at(day: int) -> ImageFacts:
    return ImageFacts(created_at=datetime(2030, 1, day, tzinfo=UTC), comment=f"day {day}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base", Reference("base")),
        ("base:latest", Reference("base")),
        ("base:v1-2", Reference("base", "v1-2")),
        ("base@sha256:abcd", Reference("base", digest="abcd")),
    ],
)
def test_reference_is_parsed_and_printed(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected
    assert Reference.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["", ":", "base:", ":v1", "a/b", "..", "base:../x", "base:a/b", "Base", "base:v1\n"])
def test_reference_that_cannot_name_an_image_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        Reference.parse(text)


def test_tag_finds_its_version_and_latest_stays(paths: Paths) -> None:
    latest = publish(paths, "tool", b"1")
    tagged = publish(paths, "tool", b"2", tag="v2")
    assert find_image(paths, "tool").root == latest.root
    assert find_image(paths, "tool:v2").root == tagged.root
    assert find_image(paths, f"tool@{tagged.info.digest[:14]}").root == tagged.root
    assert [(info.name, info.tag) for info in list_images(paths)] == [("tool", "latest"), ("tool", "v2")]


def test_unknown_tag_gets_the_nearest(paths: Paths) -> None:
    publish(paths, "tool", b"1", tag="version-one")
    with pytest.raises(NotFound) as caught:
        find_image(paths, "tool:version-on")
    assert caught.value.hint == "did you mean 'tool:version-one'?"


def test_existing_tag_is_refused_unless_replaced(paths: Paths) -> None:
    publish(paths, "tool", b"1", tag="v1")
    registry.refuse_existing(paths, Reference.parse("tool:v2"))
    with pytest.raises(AlreadyExists, match="tool:v1"):
        registry.refuse_existing(paths, Reference.parse("tool:v1"))


def test_spec_and_data_disk_are_part_of_the_image(paths: Paths) -> None:
    """FRZ-3: equal disks with another spec are another image, and the spec comes back whole."""
    spec = {"env": {"A": "ü"}, "labels": {"l": "x"}, "entrypoint": ["sh", "-c"], "user": "user", "workdir": "/w"}
    plain = publish(paths, "tool", b"same")
    full = publish(paths, "tool", b"same", data=b"home", tag="full", facts=ImageFacts(spec=spec, source="commit"))
    assert plain.info.digest != full.info.digest
    assert plain.data is None
    found = find_image(paths, "tool:full")
    assert found.info.spec == spec
    assert found.data is not None
    assert found.data.read_bytes().endswith(b"home")


def test_image_without_its_data_disk_is_none(paths: Paths) -> None:
    image = publish(paths, "tool", b"1", data=b"2")
    assert image.data is not None
    image.data.unlink()
    with pytest.raises(NotFound):
        find_image(paths, "tool")


def test_history_tells_every_version_with_its_tags_and_users(paths: Paths) -> None:
    old = publish(paths, "tool", b"1", facts=at(1))
    new = publish(paths, "tool", b"2", facts=at(2))
    publish(paths, "tool", b"2", tag="same", facts=at(3))
    told = upkeep.history(paths, "tool", lambda directory: ["box"] if directory == old.directory else [])
    assert [(version.digest, version.tags, version.used_by, version.comment) for version in told] == [
        (new.info.digest, ["latest", "same"], 0, "day 2"),
        (old.info.digest, [], 1, "day 1"),
    ]
    with pytest.raises(NotFound):
        upkeep.history(paths, "other", nobody)


def test_removed_tag_leaves_a_version_that_another_names(paths: Paths) -> None:
    publish(paths, "tool", b"1")
    publish(paths, "tool", b"1", tag="v1")
    assert upkeep.remove(paths, "tool", nobody) == 0
    assert find_image(paths, "tool:v1").root.is_file()
    with pytest.raises(NotFound):
        find_image(paths, "tool")


def test_removed_image_frees_its_bytes_and_its_name(paths: Paths) -> None:
    publish(paths, "tool", b"1", tag="v1")
    assert upkeep.remove(paths, "tool:v1", nobody) > 0
    assert list(paths.images.iterdir()) == []


def test_image_in_use_is_not_removed_and_its_users_are_named(paths: Paths) -> None:
    publish(paths, "tool", b"1", tag="v1")
    with pytest.raises(FailedPrecondition, match="used by box, ck_1"):
        upkeep.remove(paths, "tool:v1", somebody)
    assert find_image(paths, "tool:v1").root.is_file()


def test_tagged_version_is_not_removed_by_its_digest(paths: Paths) -> None:
    image = publish(paths, "tool", b"1")
    with pytest.raises(FailedPrecondition, match="latest"):
        upkeep.remove(paths, f"tool@{image.directory.name}", nobody)


def test_prune_removes_untagged_versions_that_nobody_uses(paths: Paths) -> None:
    used = publish(paths, "tool", b"1", facts=at(1))
    unused = publish(paths, "tool", b"2", facts=at(2))
    current = publish(paths, "tool", b"3", facts=at(3))
    publish(paths, "base", b"4")

    def users(directory: Path) -> Sequence[str]:
        return ["box"] if directory == used.directory else []

    expected = [f"tool@{unused.directory.name}"]
    assert upkeep.prune(paths, users, dry_run=True)[0] == expected
    assert unused.root.is_file()
    removed, freed = upkeep.prune(paths, users)
    assert (removed, freed) == (expected, unused.info.disk_used)
    assert used.root.is_file()
    assert current.root.is_file()
    assert upkeep.prune(paths, users, tagged=True, keep={"base"})[0] == ["tool"]
    assert [info.name for info in list_images(paths)] == ["base"]


def test_a_tag_can_be_moved(paths: Paths) -> None:
    old = publish(paths, "tool", b"1", tag="v1")
    publish(paths, "tool", b"2")
    assert upkeep.tag(paths, "tool:v1", "tool").directory == old.directory
    with pytest.raises(FailedPrecondition):
        upkeep.tag(paths, "tool:v1", "other")


def test_verify_finds_a_changed_byte_in_either_disk_and_in_the_description(paths: Paths) -> None:
    image = publish(paths, "tool", b"1", data=b"2", facts=ImageFacts(spec={"env": {"A": "1"}}))
    assert upkeep.verify(paths, "tool") == []
    assert image.data is not None
    for disk in (image.root, image.data):
        disk.chmod(0o600)
        whole = disk.read_bytes()
        disk.write_bytes(b"!" + whole[1:])
        assert upkeep.verify(paths, "tool") == [f"{disk} is damaged: its content has changed"]
        disk.write_bytes(whole)
    description = image.directory / "image.json"
    description.write_text(description.read_text().replace('"A": "1"', '"A": "2"'))
    assert len(upkeep.verify(paths, "tool")) == 1


def test_damaged_version_is_replaced_when_it_is_published_again(paths: Paths) -> None:
    image = publish(paths, "tool", b"1")
    (image.directory / "image.json").write_text("{")
    assert publish(paths, "tool", b"1").root.is_file()
    assert upkeep.verify(paths, "tool") == []


def test_failed_first_version_leaves_nothing(paths: Paths) -> None:
    with pytest.raises(RuntimeError), registry.staging(paths, "tool") as work:
        (work / "root.raw").write_bytes(b"half")
        raise RuntimeError
    assert list(paths.images.iterdir()) == []


def test_strays_of_a_crash_are_swept(paths: Paths) -> None:
    image = publish(paths, "tool", b"1", tag="v1")
    (image.directory.parent / ".tmp-image-1").mkdir()
    (image.directory.parent / "tags" / ".tmp-x").write_text("half")
    (paths.images / "new" / ".tmp-image-2").mkdir(parents=True)
    assert len(upkeep.sweep(paths)) == 3
    assert strays(paths) == []
    assert not (paths.images / "new").exists()
    assert find_image(paths, "tool:v1") == image
