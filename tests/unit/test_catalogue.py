"""The checkpoints on this host: how they are found, published and removed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limpet import durable
from limpet.digests import Seal
from limpet.errors import AlreadyExists, BadRequest, NotFound
from limpet.models import CheckpointInfo, SandboxSpec
from limpet.services import catalogue as module
from limpet.services.catalogue import Catalogue, Checkpoint, keep, size_of
from limpet.services.host import Host
from limpet.services.manifests import LayerSeal, Manifest
from limpet.vmm.layers import Layers
from tests.unit import services_kit as kit


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with kit.host_in(tmp_path) as host:
        yield host


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """An empty one: what is found does not depend on what is on the disk."""
    (tmp_path / "checkpoints").mkdir()
    return Catalogue(tmp_path / "checkpoints", Layers(tmp_path / "layers"))


def add(catalogue: Catalogue, identity: str, *, sandbox: str = "sb_1", label: str | None = None) -> Checkpoint:
    info = CheckpointInfo(
        id=identity, sandbox="box", sandbox_id=sandbox, label=label, created_at=datetime.now(UTC), kind="disk",
        spec=SandboxSpec(),
    )  # fmt: skip
    staging = durable.staging(catalogue._directory, identity)
    return catalogue.publish(staging, Manifest(info=info, disks={}, image={}))


def test_a_checkpoint_is_found_by_its_id_or_by_how_it_begins(catalogue: Catalogue) -> None:
    """FRZ-9: with or without `ck_`, as git does it."""
    first, second = add(catalogue, "ck_01aaaabbbb"), add(catalogue, "ck_01aaaacccc")
    for reference in ("ck_01aaaabbbb", "01aaaabbbb", "ck_01aaaab", "01aaaab"):
        assert catalogue.find(reference) == first
    assert catalogue.find("01aaaac") == second


def test_an_id_that_is_the_beginning_of_another_is_itself(catalogue: Catalogue) -> None:
    """What was meant is what was said whole."""
    short = add(catalogue, "ck_01aaaa")
    add(catalogue, "ck_01aaaabbbb")
    assert catalogue.find("ck_01aaaa") == short


@pytest.mark.parametrize("reference", ["01aaaa", "ck_01aaaa", "01", "ck_", ""])
def test_an_ambiguous_id_is_refused_with_examples(catalogue: Catalogue, reference: str) -> None:
    """Issue 3, bad input: nothing is guessed."""
    add(catalogue, "ck_01aaaabbbb")
    add(catalogue, "ck_01aaaacccc")
    with pytest.raises(BadRequest, match="is the beginning of 2 checkpoints") as refused:
        catalogue.find(reference)
    assert "ck_01aaaabbbb" in (refused.value.hint or "") and "ck_01aaaacccc" in (refused.value.hint or "")


@pytest.mark.parametrize("reference", ["01bbbb", "ck_x", "", "ck_", "01a", "../ck_01aaaabbbb", "CK_01AAAABBBB"])
def test_an_unknown_id_is_refused_also_when_there_is_only_one_checkpoint(catalogue: Catalogue, reference: str) -> None:
    """Issue 3, bad input: fewer than four characters name nothing."""
    add(catalogue, "ck_01aaaabbbb")
    with pytest.raises(NotFound, match="no checkpoint"):
        catalogue.find(reference)


def test_a_mistyped_label_gets_the_nearest_one_as_a_hint(catalogue: Catalogue) -> None:
    add(catalogue, "ck_01aaaabbbb", label="before the migration")
    with pytest.raises(NotFound) as refused:
        catalogue.find("before the migraton", "sb_1")
    assert "before the migration" in (refused.value.hint or "")


def test_a_label_counts_within_its_sandbox_and_the_newest_of_it(catalogue: Catalogue) -> None:
    """FRZ-9"""
    add(catalogue, "ck_01aaaa0001", label="good")
    newest = add(catalogue, "ck_01aaaa0002", label="good")
    other = add(catalogue, "ck_01aaaa0003", sandbox="sb_2", label="good")
    assert catalogue.find("good", "sb_1") == newest
    assert catalogue.find("good", "sb_2") == other
    with pytest.raises(NotFound):
        catalogue.find("good")
    with pytest.raises(NotFound):
        catalogue.find("01aaaa0003", "sb_1")


def test_a_label_goes_before_the_beginning_of_an_id_and_an_id_before_a_label(catalogue: Catalogue) -> None:
    """A label may look like anything."""
    first = add(catalogue, "ck_01aaaabbbb", label="01bbbb")
    second = add(catalogue, "ck_01bbbbcccc", label="ck_01aaaabbbb")
    assert catalogue.find("01bbbb", "sb_1") == first
    assert catalogue.find("01bbbbc", "sb_1") == second
    assert catalogue.find("ck_01aaaabbbb", "sb_1") == first


def test_checkpoints_come_in_the_order_of_their_making(catalogue: Catalogue) -> None:
    """FRZ-9: ids are time-ordered; each sandbox has its own."""
    made = [add(catalogue, f"ck_01aaaa000{n}", sandbox=f"sb_{n % 2}").info.id for n in (3, 1, 2)]
    assert [known.info.id for known in catalogue.all()] == sorted(made)
    assert [known.info.id for known in catalogue.of("sb_1")] == ["ck_01aaaa0001", "ck_01aaaa0003"]


def test_what_was_published_is_found_by_the_next_daemon_and_what_was_not_is_not(host: Host) -> None:
    """FRZ-6: "published by rename"; work in progress is no checkpoint."""
    made = kit.add_checkpoint(host, kit.add_sandbox(host))
    staging = durable.staging(host.paths.checkpoints, "ck_01unfinished")
    (staging / "checkpoint.json").write_bytes((made.directory / "checkpoint.json").read_bytes())
    (host.paths.checkpoints / "notes").mkdir()
    again = Catalogue(host.paths.checkpoints, host.layers)
    again.load()
    assert again.all() == [made] and again.damaged == {}


def test_a_removed_checkpoint_frees_its_memory_and_is_gone_for_good(host: Host) -> None:
    """FRZ-6: "deleting it frees its bytes"."""
    made = kit.add_memory(host, kit.add_checkpoint(host, kit.add_sandbox(host)), {"ram": b"x" * (1 << 20)})
    size = size_of(made.directory)
    assert size >= 1 << 20
    assert host.catalogue.forget(made.info.id) == size
    assert not made.directory.exists() and [path.name for path in host.paths.checkpoints.glob(".tmp*")] == []
    with pytest.raises(NotFound):
        host.catalogue.find(made.info.id)
    assert host.catalogue.forget(made.info.id) == 0


def test_a_damaged_checkpoint_can_be_removed(host: Host) -> None:
    """FRZ-6: it is named until it is."""
    made = kit.add_checkpoint(host, kit.add_sandbox(host))
    (made.directory / "checkpoint.json").write_text("{")
    host.catalogue.load()
    with pytest.raises(BadRequest) as refused:
        host.catalogue.find(made.info.id)
    assert f"limpet checkpoint rm {made.info.id}" in (refused.value.hint or "")
    host.catalogue.forget(made.info.id)
    assert host.catalogue.damaged == {} and not made.directory.exists()


def test_roots_are_the_top_layers_of_every_checkpoint(catalogue: Catalogue) -> None:
    """What garbage collection begins with."""
    made = add(catalogue, "ck_01aaaabbbb")
    seal = Seal(0, "", (0, 0, 0))
    chains = {"root": [LayerSeal(id="ly_top", seal=seal), LayerSeal(id="ly_low", seal=seal)]}
    catalogue._known["ck_01aaaabbbb"] = Checkpoint(made.directory, made.manifest.model_copy(update={"disks": chains}))
    assert list(catalogue.roots()) == ["ly_top"]


def test_a_file_is_kept_under_a_second_name_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FRZ-6: the agent disk of a checkpoint outlives an update; a copy where no link is possible."""
    (tmp_path / "source").write_text("disk")
    keep(tmp_path / "source", tmp_path / "linked")
    assert (tmp_path / "linked").stat().st_ino == (tmp_path / "source").stat().st_ino
    (tmp_path / "work").write_text("work")
    with pytest.raises(AlreadyExists):
        keep(tmp_path / "source", tmp_path / "work")
    assert (tmp_path / "work").read_text() == "work"

    def across(_source: object, _target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    module.keep(tmp_path / "source", tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "disk"
    assert (tmp_path / "copied").stat().st_ino != (tmp_path / "source").stat().st_ino
