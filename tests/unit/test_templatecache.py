"""Templates on the disk: keys, trust, removal and what sandboxes keep of a template that is gone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from limpet import durable
from limpet.digests import Seal
from limpet.errors import FailedPrecondition, NotFound
from limpet.services import garbage, manifests
from limpet.services.catalogue import size_of
from limpet.services.host import Host
from limpet.services.templatecache import Template, TemplateCache, TemplateManifest, key_of
from tests.unit import services_kit as kit

KEY = "0123456789abcdef"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with kit.host_in(tmp_path) as host:
        host.paths.templates.mkdir()
        yield host


def publish(host: Host, key: str = KEY, build: int = 1, size: int = 1000, disk: bytes = b"") -> Template:
    """A template whose files say which build they are of, or with `disk` as its disks."""
    staging = durable.staging(host.paths.templates, "template")
    for name in ("ram", "state", "agent.squashfs", "root.qcow2", "data.qcow2"):
        (staging / name).write_bytes(f"{name} of build {build} of {key} ".encode() * (size // 20))
    for name in ("root.qcow2", "data.qcow2") if disk else ():
        (staging / name).write_bytes(disk)
    files = {path.name: Seal.of(path) for path in sorted(staging.iterdir())}
    manifest = TemplateManifest(
        key=key, image="base", digest="d", artifacts="a", machine=kit.FACTS, created_at=datetime.now(UTC), files=files
    )
    return host.templates.publish(staging, manifest)


def test_what_was_published_is_found_whole_with_its_disks_among_the_layers(host: Host) -> None:
    """Issue 3, item 1"""
    made = publish(host)
    found = host.templates.get(KEY)
    assert found == made and host.templates.whole(found) is None
    for disk, layer in found.layers.items():
        path = host.layers.path(layer)
        assert path.stat().st_ino == (found.directory / f"{disk}.qcow2").stat().st_ino  # no copy
    assert host.templates.info(found, current=True).size == size_of(found.directory)


def test_a_template_that_is_built_anew_does_not_come_with_the_disks_of_the_old_one(host: Host) -> None:
    """FRZ-6: its memory fits its own disks only, while sandboxes still lie on the earlier ones."""
    old = publish(host, build=1)
    host.templates.whole(old)
    kit.add_sandbox(host, disks=old.layers)
    kept = {layer: host.layers.path(layer).read_bytes() for layer in old.layers.values()}
    host.templates.remove(KEY)
    new = publish(host, build=2)
    assert host.templates.whole(new) is None
    for disk, layer in new.layers.items():
        assert host.layers.path(layer).read_bytes() == (new.directory / f"{disk}.qcow2").read_bytes()
    assert {layer: host.layers.path(layer).read_bytes() for layer in kept} == kept


def test_a_deleted_cache_takes_nothing_from_the_sandboxes(host: Host) -> None:
    """`cache/` can be made again."""
    made = publish(host)
    host.templates.whole(made)
    shutil.rmtree(host.paths.templates)
    assert all(host.layers.path(layer).is_file() for layer in made.layers.values())
    assert host.templates.all() == [] and list(host.templates.roots()) == []


def test_layers_of_a_template_are_no_garbage_while_it_is_there(host: Host) -> None:
    made = publish(host)
    host.templates.whole(made)
    assert set(garbage.roots(host)) >= set(made.layers.values())
    host.templates.remove(KEY)
    assert not set(garbage.roots(host)) & set(made.layers.values())


FILES = ("ram", "state", "agent.squashfs", "root.qcow2", "data.qcow2")
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda path: kit.flip(path, 500), "is damaged"),
    "truncated": (lambda path: os.truncate(path, 10), "has 10 bytes instead of"),
    "missing": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("trusted", [True, False])
def test_each_damage_is_named_also_of_a_template_that_was_whole_before(
    host: Host, file: str, kind: str, trusted: bool
) -> None:
    """Issue 3, bad input: refused, named."""
    made = publish(host)
    if trusted:
        assert host.templates.whole(made) is None
    damage, said = DAMAGE[kind]
    damage(made.directory / file)
    problem = host.templates.whole(host.templates.get(KEY))
    assert problem is not None and said in problem and str(made.directory / file) in problem


def test_a_template_that_is_known_to_be_whole_is_not_read_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 3: ≤ 250 ms from create to first output."""
    made = publish(host)
    assert host.templates.whole(made) is None
    monkeypatch.setattr(Seal, "problem", lambda *_args, **_options: pytest.fail("it was looked at again"))
    assert host.templates.whole(made) is None
    os.link(made.directory / "ram", made.directory.parent / ".link")  # another change time
    with pytest.raises(pytest.fail.Exception):
        host.templates.whole(made)


def test_a_template_under_another_key_is_foreign(host: Host) -> None:
    """Issue 3, bad input: the memory of another shape must not be booted."""
    made = publish(host)
    made.directory.rename(made.directory.with_name("fedcba9876543210"))
    with pytest.raises(FailedPrecondition, match="named after"):
        host.templates.get("fedcba9876543210")
    assert host.templates.all() == [] and list(host.templates.roots()) == []
    with pytest.raises(NotFound):
        host.templates.get(KEY)


def test_a_manifest_without_disks_is_foreign(host: Host) -> None:
    """It would be found when a sandbox is to be put on them."""
    made = publish(host)
    path = made.directory / "template.json"
    content = json.loads(path.read_text())["manifest"]
    del content["files"]["root.qcow2"]
    path.write_text(json.dumps({"digest": manifests._digest(content), "manifest": content}))
    with pytest.raises(FailedPrecondition, match=KEY):
        host.templates.get(KEY)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"digest": "x", "manifest": {}}'])
def test_a_damaged_manifest_is_named_and_the_others_are_served(host: Host, content: bytes) -> None:
    made, other = publish(host), publish(host, "aaaaaaaaaaaaaaaa")
    (made.directory / "template.json").write_bytes(content)
    with pytest.raises(FailedPrecondition, match="damaged or foreign"):
        host.templates.get(KEY)
    assert [template.key for template in host.templates.all()] == [other.key]
    assert host.templates.remove(KEY) > 0 and not made.directory.exists()


@pytest.mark.parametrize("key", ["", ".", "..", "../layers", "/", ".tmp-x", "no", "0123456789ABCDEF"])
def test_what_is_no_key_of_a_template_names_nothing_and_removes_nothing(host: Host, key: str) -> None:
    """A key comes from the API."""
    made = publish(host)
    (host.paths.templates / ".tmp-x").mkdir()
    for door in (host.templates.get, host.templates.remove):
        with pytest.raises(NotFound):
            door(key)
    assert host.templates.whole(made) is None and host.paths.layers.is_dir()
    assert (host.paths.templates / ".tmp-x").is_dir()


def age(template: Template, seconds: int) -> None:
    """It was used so long ago."""
    when = datetime.now(UTC).timestamp() - seconds
    os.utime(template.directory / "template.json", (when, when))


def test_the_least_recently_used_go_first_when_the_cache_is_full(host: Host) -> None:
    """Issue 3, item 1: "cached with a size limit and LRU"."""
    for number, seconds in enumerate((30, 10, 20)):
        age(publish(host, f"{number}" * 16, size=100_000), seconds)
    assert [template.key[0] for template in host.templates.all()] == ["1", "2", "0"]
    one = size_of(host.paths.templates / ("1" * 16))
    assert host.templates.trim(3 * one) == []
    host.templates.touch(host.templates.get("0" * 16))
    assert host.templates.trim(2 * one) == ["2" * 16]
    assert host.templates.trim(0) == ["1" * 16]  # the newest one stays: somebody has just built it
    assert [template.key[0] for template in host.templates.all()] == ["0"]


def test_the_faster_of_two_daemons_publishes_and_the_other_uses_it(host: Host) -> None:
    """The cache may be shared."""
    first = publish(host, build=1)
    second = publish(host, build=2)
    assert second == first and host.templates.whole(second) is None
    assert [path.name for path in host.paths.templates.iterdir()] == [KEY]


def test_a_cache_that_is_not_there_is_empty(host: Host) -> None:
    cache = TemplateCache(host.paths.templates / "none", host.layers)
    assert cache.all() == [] and list(cache.roots()) == [] and cache.trim(0) == []


CHANGES: dict[str, dict[str, Any]] = {
    "image": {"image_digest": "e"}, "artifacts": {"artifacts": "b"}, "vcpus": {"vcpus": 3},
    "memory": {"memory_mib": 513}, "network": {"network": "none"}, "QEMU": {"qemu": "7.2.1"}, "accel": {"accel": "kvm"},
}  # fmt: skip


def test_everything_that_a_template_depends_on_is_in_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Issue 3, item 1: "rebuilt when a key changes"."""

    def key(image_digest: str = "d", artifacts: str = "a", **facts: Any) -> str:
        return key_of(image_digest, artifacts, kit.FACTS.model_copy(update=facts))

    keys = {key(), *(key(**change) for change in CHANGES.values())}
    assert len(keys) == 1 + len(CHANGES) and key() == key()
    monkeypatch.setattr("limpet.vmm.command.__file__", str(tmp_path / "other.py"))
    (tmp_path / "other.py").write_text("another command line")
    assert key() not in keys
