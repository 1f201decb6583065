"""Forgetting generations, and taking back the room of what nobody needs any more.

    1. packs/<seal>  what kept generations need of forgotten ones and of mostly dead packs; fsync, fsync of packs/
    2. ledger        names the packs that count and the generations that are forgotten: the commit
    3. unlink        of both kinds of files

A crash before 2 leaves packs that the ledger does not name, one after it files that it does not keep: `Vault.open`
removes either. Every address stays what it was.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.errors import InsufficientSpace
from limpet.ladder import rungs
from limpet.vault.errors import Damaged
from limpet.vault.generations import Generation
from limpet.vault.layout import Layout
from limpet.vault.ledger import Ledger
from limpet.vault.objectfile import Entry, ObjectFile, ObjectWriter
from limpet.vault.reaching import Live

_SMALL = 1 << 20  # bytes: such a file is not worth keeping for itself
_SMALL_PACKS = 16
_ALL_OF = timedelta(hours=1)


def superfluous(generations: Sequence[Generation], ledger: Ledger, now: datetime) -> list[int]:
    """Of generations in their order, those that nothing keeps: all of the last hour stay, one an hour for a day, one a
    day for a month, the newest, and those that are pinned."""
    kept = rungs(((generation.number, generation.time) for generation in generations), now)
    kept |= {generation.number for generation in generations if now - generation.time <= _ALL_OF}
    kept |= {number for number, pin in ledger.pins.items() if pin.holds(now)}
    return [generation.number for generation in generations[:-1] if generation.number not in kept]


@dataclass(frozen=True)
class _Source:
    """A file that may be replaced, with what is live in it."""

    path: Path
    file: ObjectFile
    live: list[Entry]
    in_packs: bool

    @property
    def mostly_live(self) -> bool:
        return 2 * sum(entry.length for entry in self.live) >= self.file.size


def forget(
    layout: Layout, ledger: Ledger, live: Live, doomed: Collection[int], broken: Collection[Path] = ()
) -> Ledger:
    """Steps 1 and 2. `live`: what kept generations need. `broken`: files that must not stay as they are; their live
    objects are sound. Returns the new ledger, which is durable; `sweep` does step 3."""
    sources = [_source(layout.generation(number), live, broken, in_packs=False) for number in sorted(doomed)]
    sources += [_source(layout.packs / seal, live, broken, in_packs=True) for seal in ledger.packs]
    useful = [source for source in sources if source is not None and source.live]
    crashpoint("vault.compact.before")
    try:
        packs = _compacted(layout, useful, broken)
    except InsufficientSpace:  # what is dead as a whole can go all the same
        if broken:
            raise
        packs = [_kept_as_it_is(layout, source) for source in useful]
    durable.sync_directory(layout.packs)
    crashpoint("vault.compact.after")
    changed = replace(
        ledger,
        packs=tuple(packs),
        forgotten=ledger.forgetting(doomed),
        pins={number: pin for number, pin in ledger.pins.items() if number not in doomed},
    )
    crashpoint("vault.forget.before")
    changed.write(layout.ledger)
    crashpoint("vault.forget.after")
    return changed


def sweep(layout: Layout, ledger: Ledger, head: int) -> None:
    """Remove what a crash left: files that are neither generations nor packs, or not yet, or no more."""
    for directory in (layout.directory, layout.gens, layout.packs):
        durable.sweep(directory)
    strays = [layout.generation(n) for n in layout.numbers() if n > head or ledger.forgets(n)]
    strays += [path for path in layout.packs.iterdir() if path.name not in ledger.packs]
    for stray in strays:
        crashpoint("vault.sweep.before")
        durable.unlink(stray)
        crashpoint("vault.sweep.after")


def places(layout: Layout, ledger: Ledger) -> dict[int, Path]:
    """Which file has the objects of each generation. Files that cannot be read are left out."""
    found: dict[int, Path] = {}
    for seal in ledger.packs:
        with contextlib.suppress(Damaged):
            found |= dict.fromkeys(_numbers(ObjectFile(layout.packs / seal)), layout.packs / seal)
    return found | {number: layout.generation(number) for number in layout.numbers() if not ledger.forgets(number)}


def rewritten(layout: Layout, number: int, live: Live) -> str:
    """Write a generation's file anew with nothing but what is live in it; returns its seal, which is another one."""
    source = ObjectFile(layout.generation(number))
    temporary = layout.draft(number)
    with durable.new_file(temporary) as file:
        seal = _write_live(file, [(entry, source) for entry in _live_in(source, live)], source.manifest())
    durable.rename(temporary, layout.generation(number))
    durable.sync_directory(layout.gens)
    return seal


def _source(path: Path, live: Live, broken: Collection[Path], in_packs: bool) -> _Source | None:
    try:
        file = ObjectFile(path)
        entries = _live_in(file, live)
    except Damaged:
        if path not in broken:
            raise
        return None
    return _Source(path, file, entries, in_packs)


def _compacted(layout: Layout, sources: Sequence[_Source], broken: Collection[Path]) -> list[str]:
    """The seals of the packs that take the place of these files."""
    small = [source for source in sources if source.in_packs and source.file.size < _SMALL]
    copied: list[_Source] = []
    packs: list[str] = []
    for source in sources:
        few = source.in_packs and len(small) <= _SMALL_PACKS
        if source.mostly_live and (few or source.file.size >= _SMALL) and source.path not in broken:
            packs.append(_kept_as_it_is(layout, source))
        else:
            copied.append(source)
    if copied:
        packs.append(_copied(layout, copied))
    return packs


def _kept_as_it_is(layout: Layout, source: _Source) -> str:
    target = layout.packs / source.file.seal
    if not source.in_packs and not target.exists():
        durable.link(source.path, target)
    return source.file.seal


def _copied(layout: Layout, sources: Iterable[_Source]) -> str:
    """A new pack of all that is live in these files."""
    temporary = layout.packs / ".tmp-compacting"
    entries = sorted(
        ((entry, source.file) for source in sources for entry in source.live), key=lambda pair: pair[0][:2]
    )
    numbers = sorted({entry.pack for entry, _ in entries})
    with durable.new_file(temporary) as file:
        seal = _write_live(file, entries, json.dumps({"numbers": numbers}).encode())
    durable.rename(temporary, layout.packs / seal)
    return seal


def _write_live(file: durable.NewFile, entries: Iterable[tuple[Entry, ObjectFile]], manifest: bytes) -> str:
    writer = ObjectWriter(file)
    for entry, source in entries:
        writer.append(entry.pack, entry.ordinal, entry.digest, source.frame(entry))
    return writer.finish(manifest)


def _live_in(file: ObjectFile, live: Live) -> list[Entry]:
    return [entry for entry in file.index() if live.has(entry.pack, entry.ordinal)]


def _numbers(file: ObjectFile) -> list[int]:
    """The generations whose objects a pack has; one that was a generation itself has its own."""
    manifest = json.loads(file.manifest())
    numbers: list[int] = manifest.get("numbers") or [manifest["generation"]]
    return numbers
