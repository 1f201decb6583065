"""The SDK's checkpoints, copies, images and upkeep against the real API over a stand-in guest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import AsyncClient, Client
from limpet.errors import BadRequest, FailedPrecondition, InsufficientSpace, NotFound
from limpet.models import State
from tests.contract.local_moments import FITTING

from .client_kit import StandIn, stand_in


@pytest.fixture(scope="module")
def daemon() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def client(daemon: StandIn) -> Iterator[Client]:
    with Client(daemon.home, autostart=False) as client:
        yield client


def test_checkpoint_restore_and_undo(client: Client, daemon: StandIn) -> None:
    """FRZ-6, FRZ-7"""
    daemon.add("box")
    box = client.sandboxes.get("box")
    first = box.checkpoint(label="clean")
    assert (first.kind, box.checkpoint(disk_only=True).kind) == ("full", "disk")
    assert box.checkpoints()[0].id == first.id
    with pytest.raises(FailedPrecondition) as caught:
        box.restore("clean")
    assert caught.value.hint == "--force replaces it"
    back = box.restore("clean", force=True)
    assert back.checkpoint.id == first.id and back.saved is not None
    assert box.undo().checkpoint.kind == "disk"
    assert box.restore(first.id, as_name="other").sandbox.name == "other"
    assert box.info.name == "box"


def test_checkpoints_are_named_by_id_prefix_and_label(client: Client, daemon: StandIn) -> None:
    """FRZ-6"""
    daemon.checkpoints.known.clear()
    daemon.add("named")
    older = client.sandboxes.ref("named").checkpoint(label="same")
    newer = client.sandboxes.ref("named").checkpoint(label="same")
    assert client.checkpoints.get("named@same").id == newer.id
    assert client.checkpoints.get(f"named@{older.id}").id == client.checkpoints.get(older.id).id == older.id
    with pytest.raises(BadRequest, match="beginning of 2"):
        client.checkpoints.get("named@ck_")
    with pytest.raises(NotFound):
        client.checkpoints.get("web@same")
    assert client.checkpoints.verify("named@same", boot=True).booted
    assert client.checkpoints.restore("named@same", as_name="fresh").sandbox.name == "fresh"
    assert client.checkpoints.remove("named@same").removed == [newer.id]
    assert [info.id for info in client.checkpoints.list()] == [older.id]


def test_fork_gives_running_sandboxes(client: Client, daemon: StandIn) -> None:
    """FRZ-8"""
    daemon.add("mother")
    mother = client.sandboxes.ref("mother")
    assert [fork.name for fork in mother.fork(2, prefix="child")] == ["child-1", "child-2"]
    assert mother.fork(name="single")[0].exec(["echo", "hi"]).text == "hi\n"
    partly = mother.try_fork(FITTING + 2)
    assert (len(partly.forks), [one.name for one in partly.failed]) == (FITTING, ["mother-4", "mother-5"])
    with pytest.raises(InsufficientSpace, match="no room for single") as caught:
        mother.fork(name="single")
    assert caught.value.hint == f"{FITTING} copies fit"


def test_pause_suspend_resume_and_wake(client: Client, daemon: StandIn) -> None:
    """VM-16"""
    daemon.add("sleeper")
    box = client.sandboxes.ref("sleeper")
    assert box.pause().state is State.PAUSED
    assert box.resume().state is State.RUNNING
    assert box.suspend().state is State.SUSPENDED
    assert client.sandboxes.ensure("sleeper").info.state is State.RUNNING
    with pytest.raises(FailedPrecondition):
        box.resume()
    daemon.boxes.known["sleeper"].state = State.STOPPED
    assert client.sandboxes.ref("sleeper").wake().state is State.RUNNING


def test_commit_and_images(client: Client, daemon: StandIn, tmp_path: Path) -> None:
    """FRZ-1, FRZ-4"""
    made = client.sandboxes.ref("web").commit("mine:v1", comment="works")
    assert (made.image.name, made.image.tag, made.image.comment) == ("mine", "v1", "works")
    assert {"base", "served"} <= {image.name for image in client.images.list()}
    assert client.images.get("base:latest").name == "base"
    assert client.images.history("base")[0].used_by == 2
    assert client.images.prune().removed == ["base@sha256:11"]
    assert not client.images.verify("broken").ok
    assert client.images.build("docker", force=True).name == "docker"
    assert daemon.images.builds[-1].force
    assert client.images.import_(tmp_path / "far.limpet", name="far:v2", replace=True).tag == "v2"
    client.images.export("far:v2", tmp_path / "x", replace=True)
    assert [(one.path, one.replace) for one in daemon.images.files] == [
        (str(tmp_path / "far.limpet"), True),
        (str(tmp_path / "x"), True),
    ]
    client.images.remove("far:v2")
    with pytest.raises(NotFound):
        client.images.get("far:v2")


def test_templates_settings_and_disk_space(client: Client, daemon: StandIn) -> None:
    template = client.templates.build(memory_mib=256, network="none")
    assert template.key in [one.key for one in client.templates.list()]
    client.templates.remove(template.key)
    assert client.config.set("pool.size", "2").value == client.config.get("pool.size").value == "2"
    assert client.config.unset("pool.size").value == "0"
    with pytest.raises(NotFound):
        client.config.get("pool")
    assert client.system.df().rows[0].kind == "images"
    assert client.system.prune(images=True).freed == 1 << 20
    assert daemon.storage.requests[-1].images


def test_empty_names_are_refused_before_anything_is_sent(client: Client) -> None:
    """Bad input"""
    for name in ("", "web@"):
        with pytest.raises(BadRequest, match="a name is empty"):
            client.checkpoints.remove(name)
    with pytest.raises(BadRequest, match="a name is empty"):
        client.images.remove("")
    with pytest.raises(BadRequest, match="a name is empty"):
        client.templates.remove("")


def test_create_sends_only_what_was_given_of_what_the_image_decides(client: Client, daemon: StandIn) -> None:
    """FRZ-2"""
    decided = {"vcpus", "memory_mib", "env", "labels", "user", "workdir", "entrypoint"}
    client.sandboxes.create("bare")
    assert daemon.boxes.created[-1].model_fields_set & decided == set()
    client.sandboxes.create("dressed", env={}, entrypoint=["make"], user="root")
    assert daemon.boxes.created[-1].model_fields_set & decided == {"env", "entrypoint", "user"}


def test_set_with_dry_run_changes_nothing_here(client: Client) -> None:
    """VM-18"""
    box = client.sandboxes.get("web")
    result = box.set(name="renamed", dry_run=True)
    assert (result.applied, box.name) == ([], "web")


def test_asynchronous_client_has_the_same_surface(daemon: StandIn) -> None:
    async def all_of_it() -> None:
        async with AsyncClient(daemon.home, autostart=False) as client:
            box = client.sandboxes.ref("web")
            made = await box.checkpoint()
            assert (await client.checkpoints.get(made.id)).sandbox == "web"
            copies = await box.fork(2, prefix="async")
            assert (await copies[1].exec(["true"])).ok
            assert (await client.images.get("base")).tag == "latest"
            assert (await client.config.get("pool.size")).default == "0"
            assert (await client.system.df()).total
            assert await client.templates.list()

    asyncio.run(all_of_it())
