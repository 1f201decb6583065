"""Maps as trees of pages, against a dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet import durable
from limpet.vault import growing, pages
from limpet.vault.objectfile import ObjectWriter, Ref
from limpet.vault.objects import Objects, Sink
from limpet.vault.pages import Page, Root, Weight

keys = st.one_of(st.binary(min_size=1, max_size=3), st.integers(0, 400).map(lambda n: b"key-%05d" % n))
batches = st.lists(st.dictionaries(keys, st.none() | st.binary(max_size=5), max_size=120), max_size=6)


class Maps:
    """A place for pages; counts those that were stored."""

    def __init__(self, file: durable.NewFile) -> None:
        self.objects = Objects({})
        self._writer = ObjectWriter(file)
        self._sink = Sink(1, self._writer)
        self.objects.attach(self._sink)

    @property
    def stored(self) -> int:
        return self._writer.count

    def changed(self, root: Root, changes: dict[bytes, bytes | None], inline: int = 0) -> Root:
        return growing.changed(
            self.objects, self._sink, root, sorted(changes.items()), lambda v: Weight(1, len(v)), inline
        )

    def all(self, root: Root) -> list[tuple[bytes, bytes]]:
        return list(pages.items(self.objects.page, root))


@contextlib.contextmanager
def maps(path: Path, monkeypatch: pytest.MonkeyPatch | None = None, **limits: int) -> Iterator[Maps]:
    with pytest.MonkeyPatch.context() as patch, durable.new_file(path) as file:
        for name, value in limits.items():
            patch.setattr(pages, name, value)
        yield Maps(file)
    path.unlink()


@settings(deadline=None, max_examples=200)
@given(batches, st.sampled_from([0, 4]))
def test_a_map_has_what_was_put_in_and_one_form_only(
    tmp_path_factory: pytest.TempPathFactory, changes: list[dict[bytes, bytes | None]], inline: int
) -> None:
    """D4: pages depend on the content, not on how it came about: what was not changed is shared."""
    with maps(tmp_path_factory.getbasetemp() / "maps", _FEWEST=2, _MOST=6, _BITS=1) as found:
        root, model = Root(), dict[bytes, bytes]()
        for batch in changes:
            before, old = dict(model), root
            root = found.changed(root, batch, inline)
            for key, value in batch.items():
                if value is None:
                    model.pop(key, None)
                else:
                    model[key] = value
            assert found.all(root) == sorted(model.items())
            differing = {key for key in before.keys() | model.keys() if before.get(key) != model.get(key)}
            told = list(pages.differences(found.objects.page, old, root))
            assert told == [(key, before.get(key), model.get(key)) for key in sorted(differing)]
        assert root == found.changed(Root(), dict(model), inline)
        if root.child is not None:
            assert root.child.weight == Weight(len(model), sum(map(len, model.values())))
        for key in [*model, b"", b"key-00200", b"\xff\xff\xff\xff"]:
            assert pages.get(found.objects.page, root, key) == model.get(key)
            rest = sorted(item for item in model.items() if item[0] >= key)
            assert list(pages.items(found.objects.page, root, key)) == rest


def test_a_change_stores_one_page_of_each_height(tmp_path: Path) -> None:
    with maps(tmp_path / "maps") as found:
        root = found.changed(Root(), {b"name-%06d" % number: bytes(80) for number in range(100_000)})
        assert root.height in (2, 3)
        for number in range(0, 100_000, 9_973):
            before = found.stored
            root = found.changed(root, {b"name-%06d" % number: bytes(79)})
            assert found.stored - before == root.height + 1


@pytest.mark.parametrize("ends", [True, False])
def test_names_chosen_with_malice_make_neither_large_pages_nor_many(tmp_path: Path, ends: bool) -> None:
    """Issue 4: the guest knows how pages are cut: names that all end one, and names none of which does."""
    names = (b"%d" % number for number in range(300_000))
    chosen = [name for name in names if ends == Page(0, [name] * 8, [b""] * 8).ends()]
    with maps(tmp_path / "maps") as found:
        root = found.changed(Root(), dict.fromkeys(sorted(chosen)[:9000], b"x"))
        assert 9000 / 128 <= found.stored < 9000 / 8 * 1.2 and root.height < 5
        before = found.stored
        assert found.all(found.changed(root, {sorted(chosen)[4500]: None}))
        assert found.stored - before < before, "at worst as much as making it"


def test_values_too_long_for_a_page_end_it(tmp_path: Path) -> None:
    with maps(tmp_path / "maps") as found:
        root = found.changed(Root(), {b"%05d" % number: bytes(100_000) for number in range(100)})
        assert root.child is not None and found.stored >= 12
        assert len(found.objects.read(Ref(*root.child.ref))) < 1 << 20
