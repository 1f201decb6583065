"""Chains of layers: when they are folded, onto what, and that what they read as stays the same."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from limpet.digests import Seal
from limpet.services import chains, garbage
from limpet.services.chains import DEEPEST, Folding, lowest
from limpet.services.host import Host
from limpet.store import SandboxRecord
from tests.unit import services_kit as kit

CHUNK = 65536


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with kit.host_in(tmp_path) as host:
        yield host


def paths(*names: str) -> list[Path]:
    return [Path(name if name.endswith(".raw") else f"{name}.qcow2") for name in names]


def on(chain: Sequence[str], needed: Sequence[str] = ()) -> str | None:
    """What the top of a chain should lie on."""
    found = lowest(paths(*chain), set(paths(*needed)))
    return None if found is None else found.name.removesuffix(".qcow2")


@pytest.mark.parametrize(
    ("chain", "needed", "expected"),
    [
        ("a i.raw", "", None),  # nothing between
        ("a b i.raw", "", "i.raw"),
        ("a b c i.raw", "", "i.raw"),
        ("a b c i.raw", "b", None),  # what is needed and all below it stays
        ("a b c d i.raw", "d", "d"),
        ("a b c d i.raw", "c", "c"),
        ("a", "", None),  # a data disk that lies on nothing
        ("a b", "", None),
        ("a b c", "", "c"),
        ("a b c", "c", "c"),
        ("a b c", "b", None),
    ],
)
def test_layers_that_nobody_else_needs_are_folded_away(chain: str, needed: str, expected: str | None) -> None:
    """Issue 3, item 8: down to the first that somebody else needs."""
    assert on(chain.split(), needed.split()) == expected


@pytest.mark.parametrize("bottom", ["i.raw", "z"])
@pytest.mark.parametrize("needed", [True, False])
def test_a_chain_that_is_too_deep_is_cut_whoever_needs_its_layers(bottom: str, needed: bool) -> None:
    """Issue 3, item 8: overlays deeper than 8 are flattened, also those on a disk without an image."""
    for depth in range(DEEPEST + 1, 40):
        names = [f"l{number}" for number in range(depth)]
        base = on([*names, bottom], names if needed else [])
        assert base is not None
        left = [base, *names, bottom].index(base, 1) - 1  # layers of `names` that are gone or folded
        assert len(names) + 1 - left <= DEEPEST


def test_a_chain_of_the_greatest_depth_allowed_is_left_alone_while_it_is_needed() -> None:
    names = [f"l{number}" for number in range(DEEPEST)]
    assert on([*names, "i.raw"], names) is None


def test_much_data_is_not_copied_only_to_save_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold of many GiB would cost more than it is good for, unless the chain is too deep."""
    monkeypatch.setattr(chains, "_WORTH_BYTES", 100_000)
    small, large = tmp_path / "s.qcow2", tmp_path / "l.qcow2"
    small.write_bytes(b"x" * 50_000)
    large.write_bytes(b"x" * 200_000)
    top, image = tmp_path / "a.qcow2", tmp_path / "i.raw"
    assert lowest([top, small, image], set()) == image
    assert lowest([top, large, image], set()) is None
    deep = [top, *(large for _ in range(DEEPEST)), image]
    assert lowest(deep, set()) == image


# ── with real disks ──────────────────────────────────────────────────────────────────────────────────────────────────


def write(host: Host, layer: str, pattern: int, position: int) -> None:
    argv = ["qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} {position * CHUNK} {CHUNK}"]
    subprocess.run([*argv, str(host.layers.path(layer))], check=True, capture_output=True)


def read(host: Host, layer: str, tmp_path: Path) -> bytes:
    target = tmp_path / "seen.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(host.layers.path(layer)), str(target)], check=True)
    return target.read_bytes()


def deepen(host: Host, box: SandboxRecord, count: int) -> dict[str, str]:
    """Put layers on top, as as many checkpoints would, each with something of its own."""
    disks = dict(host.records.by_id(box.id).disks or {})
    for number in range(count):
        write(host, disks["root"], number + 1, number)
        disks["root"] = asyncio.run(host.layers.overlay(host.layers.path(disks["root"])))
        host.records.update(box.id, disks=disks)
    return disks


def fold(host: Host) -> None:
    async def once() -> None:
        folding = Folding(host)
        folding.look()
        assert folding._task is not None
        await folding._task
        folding.look()
        assert folding._task.done()  # all is well: not looked at again until something changes

    asyncio.run(once())


def test_a_folded_disk_reads_as_before_and_is_shallow_and_the_rest_is_gone(host: Host, tmp_path: Path) -> None:
    """Issue 3, item 8"""
    box = kit.add_sandbox(host)
    disks = deepen(host, box, 12)
    before = read(host, disks["root"], tmp_path)
    assert before[: 12 * CHUNK] == b"".join(bytes([n + 1]) * CHUNK for n in range(12))
    fold(host)
    assert host.records.by_id(box.id).disks == disks
    assert len(host.layers.chain(disks["root"])) == 2
    assert read(host, disks["root"], tmp_path) == before
    assert sorted(path.stem for path in host.paths.layers.iterdir()) == sorted(disks.values())


def test_a_disk_on_no_image_is_folded_as_well(host: Host, tmp_path: Path) -> None:
    """A blank data disk is a copy of its own."""
    path = host.layers.path("ly_own")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "64M"], check=True)
    box = kit.add_sandbox(host, disks={"root": "ly_own"})
    disks = deepen(host, box, 12)
    before = read(host, disks["root"], tmp_path)
    fold(host)
    assert [path.stem for path in host.layers.chain(disks["root"])] == [disks["root"], "ly_own"]
    assert read(host, disks["root"], tmp_path) == before


def test_what_a_checkpoint_is_made_of_is_not_touched_by_a_fold(host: Host, tmp_path: Path) -> None:
    """FRZ-6: "immutable"; the chain above it is cut all the same."""
    box = kit.add_sandbox(host)
    made = [kit.add_checkpoint(host, box)]
    for number in range(DEEPEST + 1):
        write(host, (host.records.by_id(box.id).disks or {})["root"], number + 1, number)
        made.append(kit.add_checkpoint(host, box))
    top = (host.records.by_id(box.id).disks or {})["root"]
    before = read(host, top, tmp_path)
    assert len(host.layers.chain(top)) == DEEPEST + 4
    fold(host)
    assert len(host.layers.chain(top)) - 1 <= DEEPEST // 2
    assert read(host, top, tmp_path) == before
    assert [kit.problems(host, checkpoint, thorough=True) for checkpoint in made] == [[]] * len(made)


def test_layers_that_two_sandboxes_lie_on_are_not_copied_into_both(host: Host) -> None:
    """FRZ-8: forks share what they have in common."""
    source = kit.add_sandbox(host)
    shared = deepen(host, source, 2)["root"]
    for name in ("one", "two"):
        disks = {"root": asyncio.run(host.layers.overlay(host.layers.path(shared)))}
        kit.add_sandbox(host, name, disks=disks)
    host.forget(source)
    fold(host)
    for name in ("one", "two"):
        [layer] = (host.records.by_name(name).disks or {}).values()
        assert host.layers.chain(layer)[1] == host.layers.path(shared)


def test_a_sandbox_that_is_being_changed_is_left_for_later(host: Host, tmp_path: Path) -> None:
    """VM-11: folding waits for nobody and nobody waits for it."""
    box = kit.add_sandbox(host)
    disks = deepen(host, box, 3)

    async def under_way() -> None:
        folding = Folding(host)
        async with host.locks.lifecycle(box.id, "start"):
            folding.look()
            assert folding._task is not None
            await asyncio.wait_for(folding._task, 10)
            assert len(host.layers.chain(disks["root"])) == 5
        folding.look()
        await asyncio.wait_for(folding._task, 10)

    asyncio.run(under_way())
    assert len(host.layers.chain(disks["root"])) == 2


def test_a_damaged_chain_is_left_alone_and_keeps_no_other_from_being_folded(host: Host) -> None:
    """VM-10: one that cannot be handled never stops the others."""
    broken, box = kit.add_sandbox(host, "broken"), kit.add_sandbox(host)
    damaged, disks = deepen(host, broken, 3), deepen(host, box, 3)
    below = host.layers.chain(damaged["root"])[1]
    below.write_bytes(b"damaged")
    asyncio.run(Folding(host)._fold_all(frozenset(garbage.roots(host))))
    assert len(host.layers.chain(disks["root"])) == 2
    assert below.read_bytes() == b"damaged" and len(host.layers.reachable(damaged["root"])) == 2


def test_a_layer_that_was_frozen_since_the_look_is_never_written(host: Host) -> None:
    """Issue 3, item 8: a checkpoint may be taken between the look at everything and the folding of one disk."""
    box = kit.add_sandbox(host)
    old = deepen(host, box, 12)["root"]
    needed = chains._needed(host, list(garbage.roots(host)))
    disks = deepen(host, box, 1)
    frozen = Seal.of(host.layers.path(old))
    assert asyncio.run(chains._fold(host, box.id, "root", needed))
    assert frozen.problem(host.layers.path(old), thorough=True) is None
    assert len(host.layers.chain(disks["root"])) <= DEEPEST + 1
