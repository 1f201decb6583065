"""The image `docker` on its first use: made in the create that wants it, with its progress (RUN-3, VM-13)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet.daemon import build_parts, build_services
from limpet.errors import NotFound
from limpet.images import find_image
from limpet.models import CreateRequest, ImageBuildRequest, Operation, State
from limpet.services.host import Host
from tests.unit import services_kit, setup_kit


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A daemon's, in a home in which setup has run."""
    asyncio.run(setup_kit.run(tmp_path))
    with services_kit.host_in(tmp_path) as host:
        yield host


def create(host: Host, *names: str, fail: bool = False, image: str = "docker") -> list[Operation]:
    """How creates at the same time ended, without a start."""

    async def work() -> list[Operation]:
        sandboxes = build_parts(host).sandboxes
        begun = [await sandboxes.create(CreateRequest(name=name, image=image, start=False, vcpus=1)) for name in names]
        return [await host.operations.wait(operation.id) for operation in begun]

    with setup_kit.builders(fail_in="image docker" if fail else ""):
        return asyncio.run(work())


def built(host: Host) -> int:
    async def count() -> int:
        return sum([event.kind == "image.built" async for event in host.events.follow(0, wait=False)])

    return asyncio.run(count())


def test_first_create_makes_the_image_and_gives_the_sandbox_what_it_says(host: Host) -> None:
    [ended] = create(host, "first")
    assert ended.state == "done"
    assert [(stage.name, stage.state) for stage in ended.stages] == [("image docker", "done")]
    record = host.records.by_name("first")
    assert record.state is State.STOPPED
    assert (record.spec.image, record.spec.memory_mib, record.spec.vcpus) == ("docker", 1024, 1)
    assert built(host) == 1
    [again] = create(host, "second")
    assert again.stages == []
    assert host.records.by_name("second").spec.memory_mib == 1024


def test_two_first_creates_make_the_image_once(host: Host) -> None:
    ended = create(host, "one", "two")
    assert [operation.state for operation in ended] == ["done", "done"]
    made = [stage.name for operation in ended for stage in operation.stages if stage.name != "lock"]
    assert made == ["image docker"]
    assert find_image(host.paths, "docker").info.source == "built"


def test_create_whose_image_cannot_be_made_leaves_no_trace_and_can_be_tried_again(host: Host) -> None:
    [ended] = create(host, "first", fail=True)
    assert ended.state == "failed"
    assert [(stage.name, stage.state, stage.detail) for stage in ended.stages] == [
        ("image docker", "failed", "the disk broke")
    ]
    assert host.records.all() == []
    assert not host.paths.image("docker").exists()
    assert create(host, "first")[0].state == "done"


def test_misspelt_image_is_answered_at_once_with_the_nearest(host: Host) -> None:
    with pytest.raises(NotFound) as caught:
        create(host, "first", image="docer")
    assert "docker" in (caught.value.hint or "")
    assert host.records.all() == []


def test_image_that_is_not_made_yet_is_told_apart_from_one_that_nobody_knows(host: Host) -> None:
    images = build_services(host, build_parts(host), lambda: None).images
    with pytest.raises(NotFound) as caught:
        asyncio.run(images.get("docker"))
    assert caught.value.hint == "limpet image build docker"
    create(host, "first")
    assert asyncio.run(images.get("docker")).spec == {"memory_mib": 1024}


def test_build_verb_tells_whether_it_made_something_by_its_stages_and_events(host: Host) -> None:
    async def build(*, force: bool) -> Operation:
        images = build_services(host, build_parts(host), lambda: None).images
        begun = await images.build(ImageBuildRequest(name="docker", force=force))
        return await host.operations.wait(begun.id)

    with setup_kit.builders():
        ended = [asyncio.run(build(force=force)) for force in (False, False, True)]
    assert [len(operation.stages) for operation in ended] == [1, 0, 1]
    assert all((operation.result or {})["name"] == "docker" for operation in ended)
    assert built(host) == 2
