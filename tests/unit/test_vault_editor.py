"""An Editor against a model: whatever a guest does to a tree, a generation has exactly that."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limpet.vault import BLOCK, BadStream, Editor, Generation, Vault, editing
from limpet.vault.objectfile import MAGIC
from tests.unit.vault_model import EPOCH, Model, Refused, expected, filled, view

NAMES = [b"a", b"b", b"c", b"\xff\xfe", b"long" * 30]

# A path is drawn as what to look for in the tree as it is then: (a name for the new, which directory), or (which one of
# its files, directories, or any of them); now and then as a path that is probably not there.
nowhere = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(b"/".join)
numbers = st.integers(0, 30)
fresh = st.tuples(st.sampled_from(NAMES), numbers)
a_file, a_dir, any_one = (st.tuples(st.just(kind), numbers) for kind in ("file", "dir", "any"))
offsets = st.sampled_from([0, 1, 5, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 9 * BLOCK - 7])
lengths = st.sampled_from([0, 1, 7, 4096, BLOCK - 5, BLOCK, 2 * BLOCK, 2 * BLOCK + 3])
fills = st.sampled_from([b"\0", b"x", b"yz", b"\0\0\0\0\1"])

steps = st.one_of(
    st.tuples(st.just("mkfile"), fresh),
    st.tuples(st.just("mkdir"), fresh),
    st.tuples(st.just("symlink"), fresh, st.sampled_from([b"a", b"/etc/passwd", b"../../.."])),
    st.tuples(st.just("mknod"), fresh, st.sampled_from(["fifo", "socket", "char", "block"])),
    st.tuples(st.just("rename"), any_one, fresh | any_one),
    st.tuples(st.just("link"), fresh, any_one),
    st.tuples(st.just("unlink"), any_one),
    st.tuples(st.just("rmdir"), a_dir),
    st.tuples(st.just("write"), a_file, offsets, lengths, fills),
    st.tuples(st.just("write"), a_file, offsets, lengths, fills),
    st.tuples(st.just("truncate"), a_file, offsets),
    st.tuples(st.just("clone"), a_file, offsets, lengths, a_file, offsets, st.booleans()),
    st.tuples(st.just("clone"), a_file, offsets, lengths, a_file, offsets, st.booleans()),
    st.tuples(st.just("set_xattr"), any_one, st.sampled_from([b"user.a", b"user.b"]), st.binary(max_size=9)),
    st.tuples(st.just("remove_xattr"), any_one, st.sampled_from([b"user.a", b"user.b"])),
    st.tuples(st.just("chmod"), any_one, st.sampled_from([0o644, 0o6755, 0o1777])),
    st.tuples(st.just("chown"), any_one, st.sampled_from([0, 1000, 2**32 - 1])),
    st.tuples(st.just("utimes"), any_one, st.sampled_from([0, -1, 1_700_000_000_123_456_789, 2**62 * 10**9])),
    st.tuples(st.sampled_from(["mkfile", "mkdir", "unlink", "rmdir"]), nowhere),
    st.tuples(st.just("rename"), nowhere, nowhere),
)
beginning = [("mkfile", b"a"), ("write", b"a", 5, 3 * BLOCK, b"yz"), ("mkdir", b"b"), ("mkfile", b"b/c")]
some_steps = st.lists(steps, max_size=25)


def resolved(model: Model, drawn: object) -> Any:
    """The path that was drawn."""
    if not isinstance(drawn, tuple):
        return drawn
    what, number = drawn
    if isinstance(what, bytes):
        parents = [b"", *sorted(path for path, thing in model.things.items() if thing.kind == "dir")]
        parent = parents[number % len(parents)]
        return parent + b"/" + what if parent else what
    found = sorted(path for path, thing in model.things.items() if what in (thing.kind, "any"))
    return found[number % len(found)] if found else b"a"


def apply(model: Model, base: Model, editor: Editor, step: tuple[Any, ...]) -> None:
    """Do one step to both. What the model refuses, the editor refuses too, and nothing else."""
    on_model, on_editor = translated(model, base, editor, *(resolved(model, part) for part in step))
    try:
        on_model()
    except Refused:
        with pytest.raises(BadStream):
            on_editor()
    else:
        on_editor()


def translated(
    model: Model, base: Model, editor: Editor, what: str, path: bytes, *rest: Any
) -> tuple[Callable[[], object], Callable[[], object]]:
    if what in ("mkfile", "mkdir"):
        kind, mode = ("file", 0o600) if what == "mkfile" else ("dir", 0o700)
        return lambda: model.make(path, kind, mode), lambda: getattr(editor, what)(path)
    if what == "symlink":
        return lambda: model.make(path, "symlink", 0o777, rest[0]), lambda: editor.symlink(path, rest[0])
    if what == "mknod":
        return lambda: model.make(path, rest[0], 0o640, rdev=259), lambda: editor.mknod(path, rest[0], 0o60640, 259)
    if what in ("unlink", "rmdir"):
        return lambda: model.remove(path, what == "rmdir"), lambda: getattr(editor, what)(path)
    if what == "write":
        data = (rest[2] * rest[1])[: rest[1]]
        return lambda: model.write(path, rest[0], data), lambda: editor.write(path, rest[0], data)
    if what == "clone":
        offset, length, source, start, from_base = rest
        return (
            lambda: model.clone(path, offset, length, (base if from_base else model).at(source, "file"), start),
            lambda: editor.clone(path, offset, length, source, start, from_base),
        )
    if what == "chown":
        return lambda: changed(model.at(path), uid=rest[0], gid=7), lambda: editor.chown(path, rest[0], 7)
    if what == "chmod":
        return lambda: changed(model.at(path), mode=rest[0]), lambda: editor.chmod(path, rest[0] | 0o100000)
    if what == "utimes":
        return lambda: changed(model.at(path), mtime_ns=rest[0]), lambda: editor.utimes(path, rest[0])
    if what == "set_xattr":
        return lambda: model.at(path).xattrs.update({rest[0]: rest[1]}), lambda: editor.set_xattr(path, *rest)
    if what == "remove_xattr":
        return lambda: removed(model.at(path).xattrs, rest[0]), lambda: editor.remove_xattr(path, rest[0])
    return lambda: getattr(model, what)(path, *rest), lambda: getattr(editor, what)(path, *rest)


def changed(thing: object, **values: object) -> None:
    for name, value in values.items():
        setattr(thing, name, value)


def removed(xattrs: dict[bytes, bytes], name: bytes) -> None:
    if xattrs.pop(name, None) is None:
        raise Refused


@contextlib.contextmanager
def new_vault() -> Iterator[Vault]:
    with tempfile.TemporaryDirectory() as directory:
        yield Vault.open(Path(directory, "v"))


def committed(vault: Vault, number: int, edit: Callable[[Editor], None], base: Generation | None) -> Generation:
    draft = vault.begin()
    try:
        edit(draft.volume("home", b"/home", base=base))
        return draft.commit(EPOCH, {"home": (f"t{number}", f"u{number}")})
    except BaseException:
        draft.abandon()
        raise


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(some_steps, min_size=1, max_size=4), st.sampled_from([3, 20_000]))
def test_every_generation_has_what_the_guest_had(rounds: list[list[tuple[Any, ...]]], touched: int) -> None:
    """D3, D6: however the changes are folded in between; earlier generations stay what they were."""
    with new_vault() as vault, pytest.MonkeyPatch.context() as patch:
        patch.setattr(editing, "_TOUCHED", touched)
        patch.setattr(editing, "_CLONED", BLOCK if touched == 3 else 1 << 30)
        model, base, wanted = Model(), Model(), []

        def edit(editor: Editor) -> None:
            for step in changes:
                apply(model, base, editor, step)

        for number, changes in enumerate([beginning, *rounds]):  # noqa: B007  (edit does)
            committed(vault, number, edit, vault.head)
            base = model.copy()
            wanted.append(expected(base))
        for generation, then in zip(vault.generations(), wanted, strict=True):
            assert view(generation.tree("home")) == then
            names = [row for row in then.values() if row[0] != "dir"]
            size = sum(len(data) for data in {row[-1]: row[6] for row in names}.values() if isinstance(data, bytes))
            assert generation.tree("home").totals() == (len(names), size)
        assert vault.check() == []
        again = Vault.open(vault.directory)
        assert [view(generation.tree("home")) for generation in again.generations()] == wanted


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(some_steps, some_steps)
def test_comparing_two_generations_names_exactly_what_differs(
    first: list[tuple[Any, ...]], second: list[tuple[Any, ...]]
) -> None:
    """Issue 4: `limpet diff`"""
    with new_vault() as vault:
        model = base = Model()

        def edit(editor: Editor) -> None:
            for step in changes:
                apply(model, base, editor, step)

        for changes in (beginning + first, second):  # noqa: B007  (edit does)
            base = model.copy()
            committed(vault, 1, edit, vault.head)
        trees = [generation.tree("home") for generation in vault.generations()]
        before, after = map(view, trees)
        differing = {
            path
            for path in before.keys() | after.keys()
            if (before.get(path) or ())[:-1] != (after.get(path) or ())[:-1]  # not which name of it is the first
        }
        assert [path for path, _, _ in trees[0].compare(trees[1]) if path] == sorted(
            differing, key=lambda path: path.split(b"/")
        )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(some_steps)
def test_the_same_tree_sent_once_more_is_not_stored_once_more(changes: list[tuple[Any, ...]]) -> None:
    """D4: a full send, when the guest has lost the snapshot before. Hard links may be numbered otherwise."""
    with new_vault() as vault:
        model = Model()

        def edit(editor: Editor) -> None:
            for step in beginning + changes:
                apply(model, Model(), editor, step)

        committed(vault, 1, edit, None)
        committed(vault, 2, lambda editor: send(editor, model), None)
        first, second = vault.generations()
        assert list(first.tree("home").compare(second.tree("home"))) == []
        if all(not node.group for _, node in first.tree("home").walk()):
            assert second.new_bytes == len(MAGIC)


def send(editor: Editor, model: Model) -> None:
    """All of a tree, as Btrfs does it: made under another name, renamed, written, and its metadata last."""
    names: dict[int, bytes] = {}
    for path, thing in sorted(model.things.items(), key=lambda item: item[0].split(b"/")):
        if (other := names.setdefault(id(thing), path)) != path:
            editor.link(path, other)
            continue
        if thing.kind in ("file", "dir"):
            (editor.mkfile if thing.kind == "file" else editor.mkdir)(b"o257-1-0")
        elif thing.kind == "symlink":
            editor.symlink(b"o257-1-0", thing.target)
        else:
            editor.mknod(b"o257-1-0", thing.kind, thing.mode, thing.rdev)  # type: ignore[arg-type]
        editor.rename(b"o257-1-0", path)
        for offset in range(0, len(thing.data), 48 << 10):
            editor.write(path, offset, bytes(thing.data[offset : offset + (48 << 10)]))
        for name, value in thing.xattrs.items():
            editor.set_xattr(path, name, value)
        editor.chmod(path, thing.mode)
        editor.chown(path, thing.uid, thing.gid)
        editor.utimes(path, thing.mtime_ns)


def test_an_edit_of_a_large_directory_writes_little(tmp_path: Path) -> None:
    """D4: the cost depends on the change, not on the tree."""
    vault = Vault.open(tmp_path / "v")
    filled(vault, {b"big/file-%06d" % number: b"%d" % number for number in range(20_000)})
    before = vault.usage().size
    for path, content in ((b"big/file-010000", b"new"), (b"big/another", b"new"), (b"big/file-000007", b"")):
        generation = filled(vault, {path: content})
    assert vault.usage().size - before < 3 * 20_000
    tree = generation.tree("home")
    assert [name for name, _ in tree.entries(b"big")] == sorted(
        [b"another", *(b"file-%06d" % number for number in range(20_000) if number != 7)]
    )
    assert vault.check() == []


def test_a_large_sparse_file_takes_little_and_stays_sparse(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "v")

    def edit(editor: Editor) -> None:
        editor.mkfile(b"disk")
        for index in range(1000):
            editor.write(b"disk", index * 1000 * BLOCK, b"here")
        editor.truncate(b"disk", 1 << 62)

    tree = committed(vault, 0, edit, None).tree("home")
    node = tree.lookup(b"disk")
    assert node is not None and node.size == 1 << 62
    assert list(tree.extents(node)) == [(index * 1000 * BLOCK, BLOCK) for index in range(1000)]
    assert b"".join(tree.read(node, 500_000 * BLOCK - 2, 8)) == b"\0\0here\0\0"
    generation = committed(vault, 1, lambda editor: editor.write(b"disk", 7_000_001, b"!"), vault.head)
    assert generation.new_bytes < 20_000
    assert committed(vault, 2, lambda editor: editor.truncate(b"disk", 5), vault.head).info.bytes == 5


def test_a_clone_of_many_blocks_takes_little_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile guests: a few commands that double a file; wherever the parts begin, it has the right bytes."""
    monkeypatch.setattr(editing, "_CLONED", 4 * BLOCK)
    monkeypatch.setattr(editing, "_TOUCHED", 16)
    vault = Vault.open(tmp_path / "v")
    draft = vault.begin()
    editor = draft.volume("home", b"/home", base=None)
    content = b"one" * 50_000 + b"end"
    editor.mkfile(b"a")
    editor.write(b"a", 0, content)
    most = 0
    for offset in (len(content), 3 * BLOCK, 6 * BLOCK + 5, 20 * BLOCK):
        editor.clone(b"a", offset, len(content), b"a", 0, False)
        content = content.ljust(offset, b"\0")[:offset] + content + content[offset + len(content) :]
        most = max(most, editor._blocks.stored)
    generation = draft.commit(EPOCH, {})
    tree = generation.tree("home")
    node = tree.lookup(b"a")
    assert node is not None and b"".join(tree.read(node)) == content
    assert len(content) > 12 * 4 * BLOCK // 2 and most <= 32


def test_a_tree_deeper_than_any_stack_is_kept(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "v")

    def edit(editor: Editor) -> None:
        path = b""
        for _ in range(2000):
            path = path + b"/d" if path else b"d"
            editor.mkdir(path)
        editor.mkfile(path + b"/f")

    generation = committed(vault, 0, edit, None)
    assert generation.info.files == 1 and vault.check() == []
    moved = committed(vault, 1, lambda editor: editor.rename(b"d/d", b"e"), generation)
    assert sum(1 for _ in generation.tree("home").compare(moved.tree("home"))) > 3990
    assert vault.forget([1]) is not None and vault.check() == []


@pytest.mark.parametrize(
    "step",
    [
        lambda editor: editor.mkfile(b""), lambda editor: editor.mkfile(b"."), lambda editor: editor.mkfile(b"x" * 256),
        lambda editor: editor.mkfile(b"a/.."), lambda editor: editor.mkfile(b"file/x"), lambda e: e.mkfile(b"link/x"),
        lambda editor: editor.rename(b"dir", b"dir/x"), lambda editor: editor.unlink(b"dir"), lambda e: e.rmdir(b""),
        lambda editor: editor.write(b"file", 2**63, b"x"), lambda editor: editor.truncate(b"file", 2**63),
        lambda editor: editor.utimes(b"file", 2**63 * 10**9), lambda editor: editor.chown(b"file", 2**32, 0),
        lambda editor: editor.set_xattr(b"file", b"user.x", bytes(2 << 20)), lambda e: e.set_xattr(b"file", b"", b""),
        lambda editor: editor.write(b"dir", 0, b"x"), lambda e: e.clone(b"file", 0, 9, b"file", 2**62, False),
        lambda editor: editor.mknod(b"n", "dir", 0, 0), lambda editor: editor.link(b"dir2", b"dir"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_tree_is_refused(tmp_path: Path, step: Callable[[Editor], None]) -> None:
    """Issue 4: the guest is hostile"""
    vault = Vault.open(tmp_path / "v")
    draft = vault.begin()
    editor = draft.volume("home", b"/home", base=None)
    editor.mkfile(b"file")
    editor.mkdir(b"dir")
    editor.symlink(b"link", b"dir")
    with pytest.raises(BadStream):
        step(editor)
    draft.abandon()
    assert vault.generations() == [] and list((vault.directory / "gens").iterdir()) == []
