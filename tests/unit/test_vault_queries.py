"""What the vault tells: history, versions of a path, differences, listings."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from limpet.errors import BadRequest, NotFound
from limpet.vault import Vault, queries
from tests.unit import streams_kit as kit
from tests.unit import vault_kit
from tests.unit.streams_kit import command, full, incremental, mkdir, mkfile, write


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """Four generations: made, one file changed, the same again, a directory removed and another file made."""
    return vault_kit.vault_of(
        tmp_path,
        full(
            mkdir(b"d"),
            mkfile(b"d/a"),
            write(b"d/a", 0, b"one"),
            mkfile(b"b"),
            command("symlink", path=b"s", link=b"b"),
        ),
        incremental(write(b"d/a", 0, b"three")),
        incremental(command("chmod", path=b"b", mode=0o640)),
        incremental(command("unlink", path=b"d/a"), command("rmdir", path=b"d"), mkfile(b"\xff")),
    )


def test_history_lists_generations_with_their_sizes(vault: Vault) -> None:
    """D3: number, time, files, bytes."""
    told = queries.history(vault)
    numbers = [generation.number for generation in vault.generations()]
    assert [(info.generation, info.files, info.bytes) for info in told] == [
        (numbers[0], 3, 3), (numbers[1], 3, 5), (numbers[2], 3, 5), (numbers[3], 3, 0),
    ]  # fmt: skip
    assert told[1].time - told[0].time == timedelta(minutes=1)


def test_versions_of_a_file_are_those_in_which_it_changed(vault: Vault) -> None:
    """D3."""
    first = vault.generations()[0].number
    told = queries.versions(vault, b"/home/d/a")
    assert [(one.generation - first, one.change, one.files, one.bytes) for one in told] == [
        (0, "added", 1, 3), (1, "changed", 1, 5), (3, "removed", 0, 0),
    ]  # fmt: skip
    assert [one.mode for one in queries.versions(vault, b"/home/b")][1] == 0o640


def test_versions_of_a_directory_are_those_of_what_is_below_it(vault: Vault) -> None:
    """D3."""
    first = vault.generations()[0].number
    assert [one.generation - first for one in queries.versions(vault, b"/home/d")] == [0, 1, 3]
    assert [one.generation - first for one in queries.versions(vault, b"/home")] == [0, 1, 2, 3]
    assert [one.change for one in queries.versions(vault, b"/home/\xff")] == ["added"]


def test_a_path_that_never_was_is_told(vault: Vault) -> None:
    """D3."""
    for path in (b"/home/none", b"/home/b/x", b"/elsewhere", b"/home/s/x"):
        with pytest.raises(NotFound, match="in no generation"):
            queries.versions(vault, path)


def test_diff_names_what_differs(vault: Vault) -> None:
    """D3: with sizes of files, in any direction, names in any bytes."""
    made, changed, _, last = vault.generations()
    assert [(one.change, one.path, one.before, one.after) for one in queries.diff(made, changed)] == [
        ("changed", "/home/d/a", 3, 5)
    ]
    told = {(one.change, one.path, one.before, one.after) for one in queries.diff(made, last)}
    assert {
        ("removed", "/home/d", None, None),
        ("removed", "/home/d/a", 3, None),
        ("added", "/home/\udcff", None, 0),
    } <= told
    assert {one.change for one in queries.diff(last, made) if one.path.startswith("/home/d")} == {"added"}
    assert list(queries.diff(made, made)) == []


def test_diff_tells_a_volume_that_only_one_has(tmp_path: Path) -> None:
    """PAY-2: a payload that was added or removed between."""
    vault = vault_kit.vault_of(tmp_path, full(mkfile(b"a")))
    draft = vault.begin()
    draft.volume("payload-00000000", b"/data", base=None).mkfile(b"p")
    after = draft.commit(vault_kit.NOON + timedelta(hours=1), {"payload-00000000": ("t", kit.UUID_TEXT)})
    before = vault.generations()[0]
    assert [(one.change, one.path) for one in queries.diff(before, after)] == [("added", "/data"), ("added", "/data/p")]
    assert [(one.change, one.path) for one in queries.diff(after, before)] == [
        ("removed", "/data"), ("removed", "/data/p"),
    ]  # fmt: skip


def test_show_lists_a_directory_and_reads_a_file(vault: Vault) -> None:
    """D3."""
    made, changed, *_ = vault.generations()
    listed = {entry.path: entry for entry in queries.entries(made, b"/home")}
    assert list(listed) == ["/home/b", "/home/d", "/home/s"]
    assert (listed["/home/d"].kind, listed["/home/s"].target) == ("dir", "b")
    assert [entry.path for entry in queries.entries(made, b"/home/b")] == ["/home/b"]
    for generation, text in ((made, b"one"), (changed, b"three")):
        node, pieces = queries.content(generation, b"/home/d/a")
        assert (node.size, b"".join(pieces)) == (len(text), text)


def test_what_has_no_content_is_told(vault: Vault) -> None:
    """D3: with where a symlink leads."""
    made = vault.generations()[0]
    with pytest.raises(BadRequest, match="no file but a dir"):
        queries.content(made, b"/home/d")
    with pytest.raises(BadRequest, match="no file but a symlink") as caught:
        queries.content(made, b"/home/s")
    assert caught.value.hint == "it leads to b"
    with pytest.raises(NotFound, match=f"generation {made.number}"):
        queries.content(made, b"/home/none")


def test_times_of_all_centuries_can_be_shown(tmp_path: Path) -> None:
    """D3."""
    generation = vault_kit.vault_of(tmp_path, kit.stream("kinds", 0)).generations()[-1]
    years = {entry.path: entry.modified.year for entry in queries.entries(generation, b"/home")}
    assert (years["/home/old"], years["/home/far"]) == (1938, 2128)
