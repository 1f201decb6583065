"""Send streams applied to a vault: real ones become what Btrfs had, hostile ones change nothing."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limpet.vault import BadStream, Vault, editing
from limpet.vault import commands as say
from limpet.vault.applying import apply, measure, read, receive
from limpet.vault.sendstream import Limits
from tests.unit import streams_kit as kit
from tests.unit import vault_kit
from tests.unit.streams_kit import command, full, incremental, mkdir, mkfile, write


@pytest.mark.parametrize("scenario", kit.SCENARIOS)
def test_every_step_of_a_real_subvolume_becomes_what_btrfs_had(scenario: str, tmp_path: Path) -> None:
    """D3, VM-3: every byte, mode, owner, time, attribute, link and device."""
    vault = Vault.open(tmp_path / "vault")
    for number in range(kit.steps(scenario)):
        generation = vault_kit.take(vault, kit.stream(scenario, number))
        ours, our_links = vault_kit.grouped(vault_kit.facts(generation.tree(vault_kit.VOLUME)))
        theirs, their_links = vault_kit.grouped(kit.tree(scenario, number))
        assert ours == theirs
        assert our_links == their_links
    assert vault.check() == []


@pytest.mark.parametrize("scenario", kit.SCENARIOS)
def test_earlier_generations_are_as_they_were(scenario: str, tmp_path: Path) -> None:
    """D3: whatever came after them, and after the vault was opened anew."""
    vault_kit.vault_of(tmp_path, *(kit.stream(scenario, number) for number in range(kit.steps(scenario))))
    for number, generation in enumerate(Vault.open(tmp_path / "vault").generations()):
        found = vault_kit.grouped(vault_kit.facts(generation.tree(vault_kit.VOLUME)))
        assert found == vault_kit.grouped(kit.tree(scenario, number))


# --- hostile streams that are well-formed

WORLD = (
    mkdir(b"d"), mkdir(b"d/e"), mkfile(b"d/f"), mkfile(b"g"), write(b"g", 0, b"content"),
    command("symlink", path=b"s", ino=1, link=b"d"), command("symlink", path=b"out", ino=1, link=b"/etc"),
    command("mkfifo", path=b"p", mode=0o644, rdev=0),
)  # fmt: skip


def clone(source: bytes, path: bytes, offset: int = 0, length: int = 7, uuid: bytes = kit.UUID) -> bytes:
    return command("clone", path=path, offset=offset, length=length, clone_path=source, clone_offset=0, clone_uuid=uuid)


MISFITS = {
    "a file below a symlink": mkfile(b"s/x"),
    "a file below a symlink that leads out": mkfile(b"out/x"),
    "a write through a symlink": write(b"s/f", 0, b"x"),
    "a write to a symlink": write(b"out", 0, b"x"),
    "a write to a directory": write(b"d", 0, b"x"),
    "a write to a fifo": write(b"p", 0, b"x"),
    "a write to nothing": write(b"none", 0, b"x"),
    "a file below a file": mkfile(b"g/x"),
    "a file below nothing": mkfile(b"none/x"),
    "a file where one is": mkfile(b"g"),
    "a directory where one is": mkdir(b"d"),
    "a symlink where something is": command("symlink", path=b"g", link=b"x"),
    "a directory into itself": command("rename", path=b"d", to=b"d/e/d"),
    "a directory over itself": command("rename", path=b"d", to=b"d/e"),
    "a rename of nothing": command("rename", path=b"none", to=b"x"),
    "a rename below a symlink": command("rename", path=b"g", to=b"out/passwd"),
    "a rename from below a symlink": command("rename", path=b"out/passwd", to=b"x"),
    "a file over a directory": command("rename", path=b"g", to=b"d"),
    "a directory over a file": command("rename", path=b"d", to=b"g"),
    "a link to a directory": command("link", path=b"x", link=b"d"),
    "a link to nothing": command("link", path=b"x", link=b"none"),
    "a link where something is": command("link", path=b"g", link=b"d/f"),
    "a link through a symlink": command("link", path=b"x", link=b"out/passwd"),
    "rmdir of what is not empty": command("rmdir", path=b"d"),
    "rmdir of a file": command("rmdir", path=b"g"),
    "unlink of a directory": command("unlink", path=b"d/e"),
    "unlink of nothing": command("unlink", path=b"none"),
    "chmod of nothing": command("chmod", path=b"none", mode=0o644),
    "a truncated directory": command("truncate", path=b"d", size=5),
    "an attribute that is not there": command("remove_xattr", path=b"g", name=b"user.none"),
    "a clone of a symlink": clone(b"out", b"g"),
    "a clone of nothing": clone(b"none", b"g"),
    "a clone beyond the end": clone(b"g", b"d/f", length=8),
    "a clone from a stranger": clone(b"g", b"d/f", uuid=b"\x33" * 16),
    "an extent without data": command("update_extent", path=b"g", offset=0, size=7),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_command_that_does_not_fit_the_tree_is_refused_and_nothing_changes(case: str, tmp_path: Path) -> None:
    """D5, D6: the generation before is still the newest, whole, and the next one works."""
    vault = vault_kit.vault_of(tmp_path, full(*WORLD))
    before = vault_kit.facts(vault.generations()[-1].tree(vault_kit.VOLUME))
    with pytest.raises(BadStream):
        vault_kit.take(vault, full(*WORLD, MISFITS[case]))
    assert vault.head is not None
    assert vault.head.number == vault.generations()[-1].number
    assert vault_kit.facts(vault.head.tree(vault_kit.VOLUME)) == before
    assert vault_kit.take(vault, full(*WORLD, mkfile(b"after"))).tree(vault_kit.VOLUME).lookup(b"after") is not None


def test_a_stream_cut_off_changes_nothing(tmp_path: Path) -> None:
    """D5."""
    vault = vault_kit.vault_of(tmp_path, full(*WORLD))
    with pytest.raises(BadStream, match="in the middle"):
        vault_kit.take(vault, full(*WORLD)[:-1])
    assert [generation.number for generation in vault.generations()] == [vault.generations()[0].number]


def test_a_stream_of_another_snapshot_is_refused(tmp_path: Path) -> None:
    """D6: of another subvolume, from another parent, everything instead of a change, a change instead of everything."""
    vault = vault_kit.vault_of(tmp_path, full(*WORLD))
    other = "33333333-3333-3333-3333-333333333333"
    for stream, uuid, parent, why in (
        (full(), other, None, "is of"),
        (incremental(), kit.UUID_TEXT, other, "begins at"),
        (full(), kit.UUID_TEXT, kit.PARENT_TEXT, "everything"),
        (incremental(), kit.UUID_TEXT, None, "instead of nothing"),
    ):
        draft = vault.begin()
        with pytest.raises(BadStream, match=why):
            receive(draft.volume("home", b"/home", base=vault.head), [stream], uuid=uuid, parent=parent)
        draft.abandon()
    draft = vault.begin()
    with pytest.raises(BadStream, match="does not begin"):
        apply(draft.volume("home", b"/home", base=None), [], uuid=other, parent=None)
    draft.abandon()


def test_a_sparse_file_of_2_62_bytes_costs_nothing(tmp_path: Path) -> None:
    """D6."""
    tree = vault_kit.tree_of(
        tmp_path, full(mkfile(b"a"), command("truncate", path=b"a", size=1 << 62), write(b"a", 1 << 61, b"x"))
    )
    node = tree.lookup(b"a")
    assert node is not None
    assert node.size == 1 << 62
    assert len(list(tree.extents(node))) == 1
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 100_000


def test_a_clone_of_a_gigantic_hole_costs_nothing(tmp_path: Path) -> None:
    """D6."""
    size = 1 << 39
    tree = vault_kit.tree_of(
        tmp_path,
        full(mkfile(b"a"), command("truncate", path=b"a", size=size), mkfile(b"b"), clone(b"a", b"b", length=size)),
    )
    node = tree.lookup(b"b")
    assert node is not None
    assert (node.size, list(tree.extents(node))) == (size, [])


def test_clones_that_double_a_file_end_at_the_limit(tmp_path: Path) -> None:
    """D6: a stream of a few kilobytes cannot ask for petabytes."""
    start, doublings = 128 << 10, []
    for power in range(40):
        doublings.append(clone(b"a", b"a", offset=start << power, length=start << power))
    vault = vault_kit.vault_of(tmp_path)
    with pytest.raises(BadStream, match="cloned"):
        stream = full(mkfile(b"a"), *(write(b"a", at, b"x" * 32768) for at in range(0, start, 32768)), *doublings)
        vault_kit.take(vault, stream, Limits(cloned=1 << 30))


def test_more_attributes_than_a_file_can_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D6: in bytes and in number."""
    monkeypatch.setattr(editing, "_XATTR_NAMES", 100)
    many = (command("set_xattr", path=b"a", name=b"user.%d" % number, value=b"") for number in range(200))
    large = (command("set_xattr", path=b"a", name=b"user.%d" % number, value=b"v" * 60_000) for number in range(20))
    vault = vault_kit.vault_of(tmp_path)
    for commands in (many, large):
        with pytest.raises(BadStream, match="more extended attributes"):
            vault_kit.take(vault, full(mkfile(b"a"), *commands))


def test_a_tree_cannot_outgrow_its_limit_by_many_streams(tmp_path: Path) -> None:
    """D6."""
    vault = vault_kit.vault_of(tmp_path, full(*(mkfile(b"%d" % number) for number in range(90))))
    more = [mkfile(b"more%d" % number) for number in range(20)]
    with pytest.raises(BadStream, match="more than 10 new names"):
        vault_kit.take(vault, incremental(*more), Limits(tree=100))
    vault_kit.take(vault, incremental(*more), Limits(tree=110))


def test_memory_does_not_grow_with_the_content_of_a_stream(tmp_path: Path) -> None:
    """D4: pieces are applied as they come, and stored as blocks fill up."""

    def pieces(size: int) -> list[bytes]:
        parts = [kit.HEADER, kit.SUBVOL, mkfile(b"a")]
        return parts + [write(b"a", at, at.to_bytes(8, "big") * 4096) for at in range(0, size, 32768)] + [kit.END]

    def peak(name: str, size: int) -> int:
        stream = pieces(size)
        vault = Vault.open(tmp_path / name)
        tracemalloc.start()
        draft = vault.begin()
        receive(draft.volume("home", b"/home", base=None), stream, uuid=kit.UUID_TEXT, parent=None)
        draft.commit(vault_kit.NOON, {"home": ("t", kit.UUID_TEXT)})
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak("large", 64 << 20) < peak("small", 8 << 20) + (8 << 20)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_tampered_stream_becomes_a_sound_tree_or_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """D6: with checksums that are right; parents before the tampered step are real."""
    directory = tmp_path_factory.mktemp("tampered")
    scenario = data.draw(st.sampled_from([name for name in kit.SCENARIOS if name != "kinds"]))
    last = data.draw(st.integers(0, 1))
    vault = vault_kit.vault_of(directory, *(kit.stream(scenario, number) for number in range(last)))
    stream = bytearray(kit.stream(scenario, last))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(120, min(len(stream), 20_000) - 1))
        stream[at] = data.draw(st.integers(0, 255))
    try:
        generation = vault_kit.take(vault, kit.resealed(bytes(stream)), Limits(cloned=1 << 24))
    except BadStream:
        return
    for path, node in generation.tree(vault_kit.VOLUME).walk():
        assert all(part not in (b".", b"..") and b"\0" not in part for part in path.split(b"/"))
        assert node.mode <= 0o7777
    assert vault.check() == []


# --- what is pending


def test_what_is_pending_is_counted_from_a_stream_without_data() -> None:
    """PAY-8: files changed or gone, and their bytes; a directory whose names changed is no change of its own."""
    stamp = b"\0" * 12
    commands = (
        mkfile(b"o1"), command("rename", path=b"o1", to=b"d/new"), command("utimes", path=b"d", mtime=stamp),
        command("update_extent", path=b"d/new", offset=0, size=10), command("utimes", path=b"d/new", mtime=stamp),
        write(b"big", 0, b"12345"), write(b"big", 9, b"1"), command("utimes", path=b"big", mtime=stamp),
        command("unlink", path=b"d/gone"), command("utimes", path=b"d", mtime=stamp),
    )  # fmt: skip
    assert measure([full(*commands)]) == (3, 16)


def test_a_whole_real_stream_is_counted() -> None:
    """PAY-8: 38 files."""
    written = sum(len(one.data) for one in read([kit.stream("moves", 0)]) if isinstance(one, say.Write))
    assert measure([kit.stream("moves", 0)]) == (38, written)
